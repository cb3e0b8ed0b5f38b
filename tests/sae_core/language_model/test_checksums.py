"""What a digest covers, and how damage is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_core.errors import ModelLoadError
from sae_core.language_model.checksums import (
    CHECKSUMS,
    digest_folder,
    verify_folder,
    write_checksums,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text(name)
    return tmp_path


def test_digest_changes_with_any_counted_file(folder: Path) -> None:
    first = digest_folder(folder)
    assert digest_folder(folder) == first
    (folder / "README.md").write_text("other words")
    assert digest_folder(folder) == first
    (folder / "model.safetensors").write_text("other weights")
    second = digest_folder(folder)
    assert second != first
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert digest_folder(folder) not in (first, second)


def test_renaming_a_file_changes_the_digest(folder: Path) -> None:
    first = digest_folder(folder)
    (folder / "model.safetensors").rename(folder / "model-2.safetensors")
    assert digest_folder(folder) != first


def test_whole_folder_verifies_to_its_digest(folder: Path) -> None:
    write_checksums(folder)
    assert verify_folder(folder) == digest_folder(folder)


def test_damaged_file_is_named(folder: Path) -> None:
    write_checksums(folder)
    (folder / "model.safetensors").write_text("model.safetensorS")
    with pytest.raises(
        ModelLoadError, match="model.safetensors: damaged, found sha256 [0-9a-f]{16}"
    ):
        verify_folder(folder)


def test_missing_file_is_named(folder: Path) -> None:
    write_checksums(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match="tokenizer.json: cannot be read"):
        verify_folder(folder)


def test_file_without_a_checksum_is_named(folder: Path) -> None:
    write_checksums(folder)
    (folder / "extra.safetensors").write_text("x")
    with pytest.raises(ModelLoadError, match="extra.safetensors: found a file that"):
        verify_folder(folder)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_missing_or_malformed_checksums_are_named(text: str | None, folder: Path) -> None:
    if text is not None:
        (folder / CHECKSUMS).write_text(text)
    with pytest.raises(ModelLoadError, match=f"{CHECKSUMS}: cannot be read"):
        verify_folder(folder)


def test_folder_without_a_model_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="found no config.json"):
        digest_folder(tmp_path)
