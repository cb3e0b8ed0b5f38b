"""Traces from the columns of an export; what `LoggedTraces` does with a Parquet file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from monitor.audit_log.export_schema import SCHEMA_VERSION, VERSION_KEY
from monitor.audit_log.logged_traces import (
    BATCH_RECORDS,
    LoggedTraces,
    Progress,
    TraceBatch,
)
from monitor.audit_log.query import Filter
from monitor.errors import AuditError
from sae_core.aggregation import SOURCES

_READABLE = {str(version).encode() for version in (2, SCHEMA_VERSION)}
"""Versions that have the columns which are read here."""
_NAMES = ("policy", "bundle_digest", "trace_clusters")
_PLAIN = ("decision_id", "time", "verdict", "session_id", "trace_stages", "trace_exponents")


def read_export(
    into: LoggedTraces,
    path: Path,
    wanted: Filter,
    sources: Sequence[bool],
    progress: Progress,
) -> Iterator[TraceBatch]:
    """The batches of a file; AuditError where it is not an export of this version."""
    asked = [
        f"trace_{source}" for source, is_asked in zip(SOURCES, sources, strict=True) if is_asked
    ]
    try:
        _check(path, pq.read_schema(path).metadata)
        with pq.ParquetFile(path, read_dictionary=list(_NAMES)) as file:
            done, total = 0, file.metadata.num_rows
            for table in file.iter_batches(BATCH_RECORDS, columns=[*_NAMES, *_PLAIN, *asked]):
                done += table.num_rows
                batch = _batch(into, _in_time(table, wanted), asked)
                progress(done, total)
                if batch is not None:
                    yield batch
    except (OSError, pa.ArrowInvalid) as error:
        raise AuditError(f"export {path}: cannot be read: {error}") from error


def _check(path: Path, metadata: dict[bytes, bytes] | None) -> None:
    found = (metadata or {}).get(VERSION_KEY)
    if found not in _READABLE:
        version = "no version" if found is None else f"version {found.decode(errors='replace')}"
        raise AuditError(
            f"export {path}: found {version}, expected {SCHEMA_VERSION}; audit export writes it"
        )


def _in_time(table: Any, wanted: Filter) -> Any:
    keep = None
    time_us = table.column("time").cast(pa.int64())
    if wanted.since is not None:
        keep = pc.greater_equal(time_us, round(wanted.since * 1e6))
    if wanted.until is not None:
        before = pc.less(time_us, round(wanted.until * 1e6))
        keep = before if keep is None else pc.and_(keep, before)
    return table if keep is None else table.filter(keep)


def _batch(into: LoggedTraces, table: Any, asked: Sequence[str]) -> TraceBatch | None:
    keep = _kept(into, table)
    if not keep.all():
        table = table.filter(pa.array(keep))
    if not table.num_rows:
        return None
    stages, bounds = _bytes(table.column("trace_stages"))
    exponents = _bytes(table.column("trace_exponents"))[0].view(np.int8)
    numbers = {}
    for name in asked:
        values, ends = _bytes(table.column(name))
        width = len(exponents) // (3 * table.num_rows)
        if not np.array_equal(ends, 2 * width * bounds):
            raise AuditError(f"export: column {name} does not have a number for every token")
        numbers[name] = values.view("<i2").reshape(-1, width)
    return TraceBatch(
        ids=_strings(table.column("decision_id")),
        policies=_strings(table.column("policy")),
        verdicts=_strings(table.column("verdict")),
        is_stream=pc.fill_null(pc.binary_length(table.column("session_id")), 0).to_numpy() > 0,
        bounds=bounds,
        stages=stages,
        exponents=exponents.reshape(table.num_rows, -1, 3),
        numbers=tuple(numbers.get(f"trace_{source}") for source in SOURCES),
    )


def _kept(into: LoggedTraces, table: Any) -> NDArray[np.bool_]:
    """Which rows are taken; the others are counted by reason."""
    columns = [table.column(name) for name in _NAMES]
    values = [[*column.dictionary.to_pylist(), None] for column in columns]
    shape = tuple(map(len, values))
    codes = [
        column.indices.fill_null(len(known) - 1).to_numpy()
        for column, known in zip(columns, values, strict=True)
    ]
    kinds = np.ravel_multi_index(codes, shape)
    lengths = pc.fill_null(pc.binary_length(table.column("trace_stages")), 0).to_numpy()
    ids = table.column("decision_id")
    keep = np.zeros(table.num_rows, np.bool_)
    for kind in np.flatnonzero(np.bincount(kinds)):
        rows = kinds == kind
        policy, digest, clusters = (
            known[code] for code, known in zip(np.unravel_index(kind, shape), values, strict=True)
        )
        reason = into.reason_of(
            digest or "",
            policy or "",
            tuple(clusters.split(",")) if clusters else None,
            has_trace=clusters is not None,
        )
        if reason is None:
            keep |= rows
        else:
            into.leave_out(reason, ids.filter(pa.array(rows)).to_pylist())
    empty = keep & (lengths == 0)
    into.n_empty += int(empty.sum())
    keep &= ~empty
    return keep


def _bytes(column: Any) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """A binary column's values one after the other, and where each begins, and the end."""
    _, offsets, data = column.buffers()
    bounds = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    bounds = bounds.astype(np.int64)
    values = (
        np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]] if data else np.zeros(0, np.uint8)
    )
    return values, bounds - bounds[0]


def _strings(column: Any) -> NDArray[np.object_]:
    return np.asarray(column.to_numpy(zero_copy_only=False), np.object_)
