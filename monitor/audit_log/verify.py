"""Proof that the stored log is the one that was written, or the first record where it is not.

Every record is checked in order: its sequence follows the one before, `prev_hash` is the hash of
the one before, `hash` is the hash of its body, and its columns say what its body says. Two things
cannot be seen without a copy of a head that was kept elsewhere: records cut off at the end, and a
log that somebody wrote anew from some record on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, func, select

from monitor.audit_log.chain import FIRST_SEQUENCE, genesis_hash, record_hash
from monitor.audit_log.reader import chains, rows
from monitor.audit_log.record import iso_time
from monitor.audit_log.schema import database_path, open_reader, records_table
from monitor.errors import AuditChainError

COLUMNS_IN_BODY = ("chain", "sequence", "kind", "decision_id", "time", "time_us", "verdict")
PROGRESS_RECORDS = 1000

NOT_PROVEN = (
    "records removed from the end, or a log rewritten whole from some record on, show only against "
    "a head (sequence and hash) that was kept elsewhere"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainHead:
    """Where a chain stands: sequence 0 and the genesis hash before its first record."""

    chain: str
    sequence: int
    hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainReport:
    """One chain that holds from its first record to its head."""

    head: ChainHead
    records: int
    first_time: str
    last_time: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """A log in which every record verifies."""

    path: str
    chains: tuple[ChainReport, ...]
    not_proven: str = NOT_PROVEN
    """What this proof does not cover, in a sentence for whoever reads the result."""

    @property
    def records(self) -> int:
        """Records verified, all chains together."""
        return sum(chain.records for chain in self.chains)


def verify(url: str, progress: Callable[[int, int], None] | None = None) -> AuditReport:
    """The log's heads once every record holds; AuditChainError names the first that does not.

    `progress` is called with records verified and records stored. A log that is being written is
    verified up to a record that was the head when its last page was read.
    """
    engine = open_reader(url)
    try:
        with engine.connect() as connection:
            total = connection.execute(select(func.count()).select_from(records_table)).scalar_one()
        done = 0
        reports = []
        for chain in chains(engine):
            head = start_of(chain)
            first_time = last_time = ""
            for row in rows(engine, chain):
                head = check_row(row, head)
                last_time = row.time
                first_time = first_time or row.time
                done += 1
                if progress is not None and done % PROGRESS_RECORDS == 0:
                    progress(done, max(total, done))
            reports.append(
                ChainReport(
                    head=head, records=head.sequence, first_time=first_time, last_time=last_time
                )
            )
        if progress is not None:
            progress(done, max(total, done))
        return AuditReport(path=str(database_path(url)), chains=tuple(reports))
    finally:
        engine.dispose()


def start_of(chain: str) -> ChainHead:
    """The head of a chain that has no record yet."""
    return ChainHead(chain=chain, sequence=FIRST_SEQUENCE - 1, hash=genesis_hash(chain))


def check_rows(stored: Iterable[Row[Any]], head: ChainHead) -> ChainHead:
    """The head after these rows, which follow `head`; AuditChainError at the first that fails."""
    for row in stored:
        head = check_row(row, head)
    return head


def check_row(row: Row[Any], head: ChainHead) -> ChainHead:
    """The head after this row, which must be the one that follows `head`."""
    expected = head.sequence + 1
    if row.sequence != expected:
        raise _broken(head.chain, expected, None, "sequence", row.sequence, expected)

    def broken(what: str, found: object, expected: object) -> AuditChainError:
        return _broken(head.chain, row.sequence, row.decision_id, what, found, expected)

    if row.prev_hash != head.hash:
        raise broken("prev_hash", row.prev_hash, head.hash)
    computed = record_hash(head.hash, row.body)
    if row.hash != computed:
        raise broken("hash", row.hash, computed)
    try:
        body = dict(json.loads(row.body))
    except (ValueError, TypeError):
        raise broken("body", "no JSON object", "a JSON object") from None
    for column in COLUMNS_IN_BODY:
        if column not in body or row._mapping[column] != body[column]:
            raise broken(f"column {column}", row._mapping[column], body.get(column))
    if row.time != iso_time(row.time_us):
        raise broken("time", row.time, iso_time(row.time_us))
    return ChainHead(chain=head.chain, sequence=row.sequence, hash=row.hash)


def _broken(
    chain: str, sequence: int, decision_id: str | None, what: str, found: object, expected: object
) -> AuditChainError:
    decision = "" if decision_id is None else f" (decision {decision_id!r})"
    return AuditChainError(
        f"chain {chain!r}, record {sequence}{decision}: {what}: found {found!r}, "
        f"expected {expected!r}",
        chain=chain,
        sequence=sequence,
        decision_id=decision_id,
    )
