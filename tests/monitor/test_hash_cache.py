from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from monitor import hash_cache
from monitor.hash_cache import HashCache


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    return path


def n_reads(cache: HashCache, file: Path, *, again: bool = False) -> int:
    reports: list[float] = []
    cache.sha256(file, again=again, report=reports.append)
    return len(reports)


def test_equals_hashlib_over_several_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hash_cache, "CHUNK_BYTES", 1000)
    content = os.urandom(2500)
    (tmp_path / "f").write_bytes(content)
    reports: list[float] = []
    digest = HashCache(tmp_path / "h").sha256(tmp_path / "f", report=reports.append)
    assert digest == hashlib.sha256(content).hexdigest()
    assert reports == [0.4, 0.8, 1.0]


def test_unchanged_file_is_read_once_over_processes(tmp_path: Path, file: Path) -> None:
    assert n_reads(HashCache(tmp_path / "h"), file) == 1
    assert n_reads(HashCache(tmp_path / "h"), file) == 0
    assert n_reads(HashCache(tmp_path / "h"), file, again=True) == 1


def test_changed_file_is_read_although_its_time_was_set_back(tmp_path: Path, file: Path) -> None:
    cache = HashCache(tmp_path / "h")
    before = file.stat()
    cache.sha256(file)
    # The kernel's clock ticks every few milliseconds; a change within one tick is not seen.
    while file.stat().st_ctime_ns == before.st_ctime_ns:
        file.write_bytes(b"two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert cache.sha256(file) == hashlib.sha256(b"two").hexdigest()


def test_link_and_its_target_are_one_file(tmp_path: Path, file: Path) -> None:
    cache = HashCache(tmp_path / "h")
    cache.sha256(file)
    (tmp_path / "link").symlink_to(file)
    assert n_reads(cache, tmp_path / "link") == 0


@pytest.mark.parametrize("content", ["", "[1]", '{"x": 3}'])
def test_damaged_memory_is_forgotten(tmp_path: Path, file: Path, content: str) -> None:
    (tmp_path / "h").write_text(content.replace('"x"', f'"{file}"'))
    assert HashCache(tmp_path / "h").sha256(file) == hashlib.sha256(b"one").hexdigest()


def test_unwritable_memory_only_costs_time(tmp_path: Path, file: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder is wanted")
    cache = HashCache(tmp_path / "taken" / "h")
    assert cache.sha256(file) == hashlib.sha256(b"one").hexdigest()
