"""Single answers from the log, for a server that is asked: a record, a checkpoint, a range."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, Row, select, text
from sqlalchemy.exc import SQLAlchemyError

from monitor.audit_log import reader
from monitor.audit_log.checkpoint import Statement
from monitor.audit_log.merkle import leaf_hash
from monitor.audit_log.schema import open_reader, reason, records_table, shown
from monitor.audit_log.verify import (
    ChainHead,
    check_against_checkpoint,
    check_checkpoint,
    check_row,
    first_base,
)
from monitor.errors import AuditError, NotFoundError


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedRange:
    """Part of a chain that holds."""

    first: int
    """At or before what was asked for: verification begins behind a checkpoint."""
    head: ChainHead
    checkpoints: int
    """Met on the way."""


def stored_decision(url: str, decision_id: str) -> Row[Any]:
    """A decision's row, unverified; NotFoundError when there is none."""
    table = records_table
    with _opened(url) as engine, engine.connect() as connection:
        row = connection.execute(
            select(table).where(table.c.decision_id == decision_id, text("kind = 'decision'"))
        ).one_or_none()
    if row is None:
        raise NotFoundError(f"decision: found none of id {decision_id!r} in the audit log")
    return row


def last_checkpoint(url: str, chain: str) -> Statement:
    """A chain's newest checkpoint, its signature checked; NotFoundError before the first."""
    with _opened(url) as engine, engine.connect() as connection:
        row = reader.last_checkpoint(connection, chain)
    if row is None:
        raise NotFoundError(f"checkpoint: found none of chain {chain!r} in the audit log")
    check_checkpoint(row, None)
    return Statement.read(row.body, row.signature)


def verify_range(
    url: str, chain: str, first: int, last: int, cancelled: Callable[[], bool]
) -> VerifiedRange:
    """Verifies the records `first` to `last` of a chain, 0 being the first and the last stored.

    Args:
        cancelled: asked for each record; once it is true there is no answer.

    Raises:
        NotFoundError: the chain has no such records.
        AuditChainError: a record or checkpoint on the way does not hold.
        AuditError: cancelled, or the log cannot be read.
    """
    with _opened(url) as engine:
        head, frontier = first_base(engine, chain)
        with engine.connect() as connection:
            before = reader.checkpoint_near(connection, chain, max(first - 1, 0))
        if before is not None and before.sequence > head.sequence:
            head, frontier = check_checkpoint(before, None)
        start, n_checkpoints = head.sequence, 0
        marks = reader.checkpoints(engine, chain, after=start)
        mark = next(marks, None)
        for row in reader.rows(engine, chain, start):
            if last and row.sequence > last:
                break
            if cancelled():
                raise AuditError("verification was cancelled")
            head = check_row(row, head)
            frontier = frontier.extended([leaf_hash(bytes.fromhex(head.hash))])
            if mark is not None and mark.sequence == head.sequence:
                check_against_checkpoint(mark, head, frontier, None)
                n_checkpoints += 1
                mark = next(marks, None)
    if head.sequence == start or head.sequence < max(first, last):
        raise NotFoundError(
            f"records: found {start + 1} to {head.sequence} of chain {chain!r}, expected "
            f"{max(first, 1)} to {last or 'the last'}"
        )
    return VerifiedRange(first=start + 1, head=head, checkpoints=n_checkpoints)


@contextmanager
def _opened(url: str) -> Iterator[Engine]:
    engine = open_reader(url)
    try:
        yield engine
    except SQLAlchemyError as error:
        raise AuditError(f"audit log {shown(url)} cannot be read: {reason(error)}") from error
    finally:
        engine.dispose()
