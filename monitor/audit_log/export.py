"""Decisions as one Parquet table, a row each, for pandas, DuckDB and whatever else reads Parquet.

`export_schema` is the layout, `export_columns` makes its columns. Needs pyarrow.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Row

from monitor.audit_log.export_columns import table_of
from monitor.audit_log.export_schema import REPEATED, SCHEMA, SEARCHED
from monitor.audit_log.query import Filter, pages, rows
from monitor.audit_log.schema import records_table
from monitor.errors import AuditError

GROUP_RECORDS = 8192
GROUP_BYTES = 64 << 20
"""Rows, or bytes of them in the log, that are gathered in memory before they are written."""


def export(
    url: str, target: Path, wanted: Filter, progress: Callable[[int], None] | None = None
) -> int:
    """Writes the decisions that match to a Parquet file; gives their number.

    The file appears whole or not at all. What is sealed stays in the log.

    Raises:
        AuditError: the log cannot be read, or the file cannot be written.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    done = 0
    try:
        with pq.ParquetWriter(
            partial,
            SCHEMA,
            compression="zstd",
            use_dictionary=list(REPEATED),
            write_statistics=list(SEARCHED),
        ) as writer:
            for group in _groups(url, wanted):
                writer.write_table(group)
                done += group.num_rows
                if progress is not None:
                    progress(done)
        os.replace(partial, target)
    except OSError as error:
        raise AuditError(f"export {target}: cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return done


def _groups(url: str, wanted: Filter) -> Iterator[pa.Table]:
    group: list[Row[Any]] = []
    n_bytes = 0
    for row in _rows(url, wanted):
        group.append(row)
        n_bytes += len(row.body) + 3 * len(row.trace or b"")
        if len(group) == GROUP_RECORDS or n_bytes >= GROUP_BYTES:
            yield table_of(group)
            group, n_bytes = [], 0
    if group:
        yield table_of(group)


def _rows(url: str, wanted: Filter) -> Iterator[Row[Any]]:
    """The rows that match; their bodies are parsed only where the filter asks for it."""
    trace = records_table.c.trace
    if wanted.cluster is None:
        for page in pages(url, wanted.statement().add_columns(trace)):
            yield from page
    else:
        for row, _ in rows(url, wanted, trace):
            yield row
