"""Requests in files: JSON lines and Parquet, whose rows are those of `request_rows`.

The kind is told by the file's first bytes. A Parquet file has the same keys as columns; a null is
as an absent key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from monitor.errors import InvalidRequestError
from monitor.hash_cache import CHUNK_BYTES
from monitor.replay.rows import Input, Progress, ReplayRow, Start, Survey
from monitor.request_rows import INPUT_KEYS, ROW_KEYS, RequestRow, read_lines, row_of

PARQUET_MAGIC = b"PAR1"
BATCH_ROWS = 256
"""Of a Parquet file, read at a time."""


def open_file(path: Path) -> Input:
    """The file as an input; InvalidRequestError where it cannot be read."""
    try:
        with path.open("rb") as file:
            is_parquet = file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
    except OSError as error:
        raise _unreadable(path, error) from None
    return ParquetFile(path) if is_parquet else JsonLines(path)


@dataclass(frozen=True, slots=True)
class JsonLines:
    """A file of one JSON object a line."""

    path: Path

    def pinned(self, identity: Mapping[str, Any]) -> Input:
        """See `Input`."""
        return self

    def survey(self, part_rows: int, progress: Progress) -> Survey:
        """See `Input`."""
        digest = hashlib.sha256()
        starts: list[tuple[Start, int]] = []
        n_rows = n_bytes = 0
        first: Start = (0, 1)
        try:
            size = max(1, self.path.stat().st_size)
            with self.path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    digest.update(line)
                    if line.strip():
                        if n_rows % part_rows == 0:
                            first = (n_bytes, number)
                            progress(f"reading {self.path.name}", n_bytes / size)
                            starts.append((first, 0))
                        n_rows += 1
                        starts[-1] = (first, starts[-1][1] + 1)
                    n_bytes += len(line)
        except OSError as error:
            raise _unreadable(self.path, error) from None
        identity = {"kind": "jsonl", "name": self.path.name, "rows": n_rows, "bytes": n_bytes}
        return Survey(identity=identity | {"sha256": digest.hexdigest()}, starts=tuple(starts))

    def rows(self, start: Start, n_rows: int, *, policy: str) -> Iterator[ReplayRow]:
        """See `Input`."""
        offset, number = (int(at) for at in start)
        try:
            with self.path.open("rb") as lines:
                lines.seek(offset)
                for row in islice(read_lines(lines, policy=policy, first=number), n_rows):
                    yield _replay_row(self.path, row)
        except OSError as error:
            raise _unreadable(self.path, error) from None


@dataclass(frozen=True, slots=True)
class ParquetFile:
    """A Parquet file of one request a row."""

    path: Path

    def pinned(self, identity: Mapping[str, Any]) -> Input:
        """See `Input`."""
        return self

    def survey(self, part_rows: int, progress: Progress) -> Survey:
        """See `Input`."""
        digest = hashlib.sha256()
        try:
            with pq.ParquetFile(self.path) as opened:
                n_rows, columns = opened.metadata.num_rows, opened.schema_arrow.names
            size = self.path.stat().st_size
            with self.path.open("rb") as file:
                while piece := file.read(CHUNK_BYTES):
                    digest.update(piece)
                    progress(f"reading {self.path.name}", file.tell() / size)
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(self.path, error) from None
        if not set(INPUT_KEYS) & set(columns):
            raise InvalidRequestError(
                str(self.path),
                f"columns {', '.join(columns)}",
                f"one of {', '.join(INPUT_KEYS)} among them",
            )
        identity = {"kind": "parquet", "name": self.path.name, "rows": n_rows, "bytes": size}
        return Survey(
            identity=identity | {"sha256": digest.hexdigest()},
            starts=tuple(
                ((first,), min(part_rows, n_rows - first)) for first in range(0, n_rows, part_rows)
            ),
        )

    def rows(self, start: Start, n_rows: int, *, policy: str) -> Iterator[ReplayRow]:
        """See `Input`."""
        (first,) = (int(at) for at in start)
        try:
            for number, content in islice(self._contents(first), n_rows):
                yield _replay_row(self.path, row_of(content, number, policy=policy))
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(self.path, error) from None

    def _contents(self, first: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows from index `first` on, with their numbers from 1."""
        with pq.ParquetFile(self.path) as opened:
            metadata = opened.metadata
            columns = [name for name in opened.schema_arrow.names if name in ROW_KEYS]
            begins = 0
            for group in range(metadata.num_row_groups):
                ends = begins + metadata.row_group(group).num_rows
                index = begins
                if ends > first:
                    for batch in opened.iter_batches(
                        BATCH_ROWS, row_groups=[group], columns=columns
                    ):
                        skipped = min(max(0, first - index), batch.num_rows)
                        for content in batch.slice(skipped).to_pylist():
                            yield index + skipped + 1, content
                            index += 1
                        index += skipped
                begins = ends


def _replay_row(path: Path, row: RequestRow) -> ReplayRow:
    return ReplayRow(source=path.name, place=row.number, id=str(row.id), request=row.request)


def _unreadable(path: Path, error: Exception) -> InvalidRequestError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return InvalidRequestError(
        str(path), f"what cannot be read ({reason})", "a file of JSON lines or Parquet"
    )
