"""sha256 of large files, remembered until a file changes, so that a start need not read them all.

A file counts as unchanged while its size, its inode and both its times stay the same. The time of
change (ctime) is among them: a program can set a file's modification time back, but not that one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

CHUNK_BYTES = 8 * 1024 * 1024
"""Read at a time: large enough for the disk, small beside any SAE."""


class HashCache:
    """Hashes files, and keeps the results in one small JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = self._load()

    def sha256(
        self, file: Path, *, again: bool = False, report: Callable[[float], None] = lambda s: None
    ) -> str:
        """The file's sha256 in hex, read from disk unless it is known.

        Args:
            again: reads the file even where it seems unchanged.
            report: receives the share of the file that has been read, where it is read.
        """
        name = str(file.resolve())
        state = _state(file)
        known = self._known.get(name)
        if not again and isinstance(known, list) and known[:-1] == state:
            return str(known[-1])
        digest = _digest(file, report)
        if _state(file) == state:
            self._known[name] = [*state, digest]
            self._save()
        return digest

    def _load(self) -> dict[str, object]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # lost or damaged: everything is hashed once more
            return {}
        return content if isinstance(content, dict) else {}

    def _save(self) -> None:
        part = self.path.with_name(self.path.name + ".part")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(self._known, indent=0) + "\n", encoding="utf-8")
            part.replace(self.path)
        except OSError as error:
            log.warning(
                "hash_cache_unwritable",
                path=str(self.path),
                reason=error.strerror,
                consequence="files are hashed again at every start",
            )


def _state(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _digest(file: Path, report: Callable[[float], None]) -> str:
    digest = hashlib.sha256()
    n_read = 0
    with file.open("rb") as stream:
        n_bytes = max(1, file.stat().st_size)
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            n_read += len(chunk)
            report(n_read / n_bytes)
    return digest.hexdigest()
