"""The numbers of many decisions' traces at once, from a log or from what `audit export` wrote.

Only decisions of one bundle are read, as scores of others mean something else; the rest is counted
by reason. Nothing is verified here; see `verify`. An export is read column by column and is many
times as fast as the log itself (benchmarks/LOG.md, 2026-11-24).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from monitor.audit_log.query import Filter, body_of, pages
from monitor.audit_log.schema import open_reader, reason, records_table
from monitor.audit_log.trace import TraceNumbers, decode_numbers
from monitor.errors import AuditError

BATCH_RECORDS = 8192
"""Of an export, whose row groups are bounded in bytes."""
PAGE_RECORDS = 2048
"""Of a log: of 4,096 tokens and ten clusters each they take half a gigabyte."""
EXAMPLES = 5
"""Decisions that are named of those left out for one reason."""

Progress = Callable[[int, int], None]
"""Decisions read and decisions there are."""


class LeftOut(StrEnum):
    """Why nothing can be said of a decision."""

    NO_TRACE = "no_trace"
    """It was stored at a level that keeps no scores."""
    OTHER_BUNDLE = "other_bundle"
    """Another bundle scored it."""
    OTHER_CLUSTERS = "other_clusters"
    """Its trace does not have the bundle's clusters."""
    UNREADABLE = "unreadable"
    """Its trace is truncated or damaged."""
    UNKNOWN_POLICY = "unknown_policy"
    """Its policy is not in both bundles."""


@dataclass(slots=True)
class Counted:
    """How many decisions, and the first few of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, ids: Sequence[str]) -> None:
        """Counts these."""
        self.count += len(ids)
        self.examples += ids[: max(0, EXAMPLES - len(self.examples))]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TraceBatch:
    """Decisions with at least one token, their tokens one after the other."""

    ids: NDArray[np.object_]
    """[n] decision ids."""
    policies: NDArray[np.object_]
    """[n] names."""
    verdicts: NDArray[np.object_]
    """[n] as recorded."""
    is_stream: NDArray[np.bool_]
    """[n] whether joint rules were asked after every token, and not once at the end."""
    bounds: NDArray[np.int64]
    """[n + 1]: decision i has tokens bounds[i] to bounds[i + 1]."""
    stages: NDArray[np.uint8]
    """[n_tokens]: 0 read and not scored, 1 prompt, 2 completion."""
    exponents: NDArray[np.int8]
    """[n, n_clusters, 3]: a score is `number * 2**exponent`."""
    numbers: tuple[NDArray[np.int16] | None, ...]
    """fused, dense, sae: [n_tokens, n_clusters], `trace.ABSENT` where there is no score; None for
    sources that were not asked for."""

    def __len__(self) -> int:
        return len(self.ids)


class LoggedTraces:
    """What can be read of a log or an export; iterate over it once.

    Args:
        place: the log's URL, or the path of a Parquet file.
        bundle_digest: only decisions of this bundle.
        clusters: the bundle's, in its order.
        policies: only decisions under one of these.
        sources: which of fused, dense and sae are wanted.
        wanted: time filter; the rest of it is not looked at.

    Raises:
        AuditError: the log or the file cannot be read, or is not what `audit export` writes.
    """

    def __init__(
        self,
        place: str | Path,
        *,
        bundle_digest: str,
        clusters: Sequence[str],
        policies: Sequence[str],
        sources: Sequence[bool] = (True, True, True),
        wanted: Filter | None = None,
        progress: Progress = lambda done, total: None,
    ) -> None:
        self.left_out: dict[LeftOut, Counted] = {}
        self.n_empty = 0
        """Decisions without a token, which pass whatever is asked of them."""
        self._place = place
        self._digest = bundle_digest
        self._clusters = tuple(clusters)
        self._policies = frozenset(policies)
        self._sources = tuple(sources)
        self._wanted = wanted or Filter()
        self._progress = progress

    def __iter__(self) -> Iterator[TraceBatch]:
        if isinstance(self._place, Path):
            try:
                from monitor.audit_log.exported_traces import read_export
            except ModuleNotFoundError as error:
                raise AuditError(
                    f"reading an export needs {error.name}, which is not installed; "
                    "pip install 'sae-monitor[parquet]' brings it"
                ) from None
            return read_export(self, self._place, self._wanted, self._sources, self._progress)
        return self._from_log(self._place)

    def leave_out(self, reason: LeftOut, ids: Sequence[str]) -> None:
        """Counts decisions of which nothing can be said."""
        if ids:
            self.left_out.setdefault(reason, Counted()).add(ids)

    def reason_of(
        self, digest: str, policy: str, clusters: tuple[str, ...] | None, *, has_trace: bool
    ) -> LeftOut | None:
        """Why a decision is left out, or None.

        Args:
            clusters: the trace's; None where it cannot be read.
        """
        if digest != self._digest:
            return LeftOut.OTHER_BUNDLE
        if not has_trace:
            return LeftOut.NO_TRACE
        if policy not in self._policies:
            return LeftOut.UNKNOWN_POLICY
        if clusters is None:
            return LeftOut.UNREADABLE
        return None if clusters == self._clusters else LeftOut.OTHER_CLUSTERS

    def _from_log(self, url: str) -> Iterator[TraceBatch]:
        c = records_table.c
        statement = self._wanted.statement().add_columns(c.decision_id, c.verdict, c.trace)
        total, done = _count(url, self._wanted), 0
        for page in pages(url, statement, page_records=PAGE_RECORDS):
            kept: list[tuple[str, str, str, bool, TraceNumbers]] = []
            for row in page:
                body = body_of(row)
                found = _numbers(row.trace)
                why = self.reason_of(
                    body["provenance"]["bundle_digest"],
                    body["policy"],
                    None if found is None else found.clusters,
                    has_trace=row.trace is not None,
                )
                if why is not None:
                    self.leave_out(why, [row.decision_id])
                elif found is not None and len(found.stages):
                    is_stream = bool(body["session_id"])
                    kept.append((row.decision_id, body["policy"], row.verdict, is_stream, found))
                else:
                    self.n_empty += 1
            done += len(page)
            self._progress(done, max(total, done))
            if kept:
                yield self._joined(kept)

    def _joined(self, kept: Sequence[tuple[str, str, str, bool, TraceNumbers]]) -> TraceBatch:
        ids, policies, verdicts, is_stream, traces = zip(*kept, strict=True)
        lengths = np.array([len(trace.stages) for trace in traces])
        numbers = np.concatenate([trace.numbers for trace in traces], axis=2)
        return TraceBatch(
            ids=np.array(ids, np.object_),
            policies=np.array(policies, np.object_),
            verdicts=np.array(verdicts, np.object_),
            is_stream=np.array(is_stream, np.bool_),
            bounds=np.concatenate(([0], np.cumsum(lengths))),
            stages=np.concatenate([trace.stages for trace in traces]),
            exponents=np.stack([trace.exponents for trace in traces]),
            numbers=tuple(
                numbers[:, source].T if wanted else None
                for source, wanted in enumerate(self._sources)
            ),
        )


def _numbers(trace: bytes | None) -> TraceNumbers | None:
    if trace is None:
        return None
    try:
        return decode_numbers(trace)
    except AuditError:
        return None


def _count(url: str, wanted: Filter) -> int:
    engine = open_reader(url)
    try:
        with engine.connect() as connection:
            counted: Any = select(func.count()).select_from(wanted.statement().subquery())
            return int(connection.execute(counted).scalar_one())
    except SQLAlchemyError as error:
        raise AuditError(f"audit log cannot be read: {reason(error)}") from error
    finally:
        engine.dispose()
