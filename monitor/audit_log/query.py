"""Stored records by time, verdict, severity, cluster, caller or decision.

Reads while a server writes. Nothing is verified here; see `verify`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import ColumnElement, Row, Select, and_, false, or_, select, text, tuple_
from sqlalchemy.exc import SQLAlchemyError

from monitor.audit_log.reader import PAGE_RECORDS, chains, head
from monitor.audit_log.record import RecordKind
from monitor.audit_log.schema import open_reader, reason, records_table
from monitor.audit_log.sealing import KeyRing, unpack
from monitor.audit_log.trace import DecodedTrace, decode_trace
from monitor.errors import AuditError, NotFoundError
from monitor.records import Severity, Verdict

BESIDE = (records_table.c.trace, records_table.c.sealed)
"""What lies beside a record's body."""
Place = tuple[int, str, int]
"""Where a record is in the order of reading: its time in microseconds, chain and sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which records; what is None does not matter."""

    verdict: Verdict | None = None
    severity: Severity | None = None
    """Of the gravest cluster or rule that flagged or alerted."""
    cluster: str | None = None
    """Decisions in which this cluster flagged or alerted."""
    caller_hmac: str | None = None
    decision_id: str | None = None
    since: float | None = None
    """Unix seconds, included."""
    until: float | None = None
    """Unix seconds, not included."""
    kind: RecordKind | None = RecordKind.DECISION
    """None keeps every kind."""

    def statement(self) -> Select[Any]:
        """The rows in question, without what lies beside their bodies; `cluster` is left to do.

        Conditions of the partial indexes are written as literals: only so does SQLite see that
        they hold.
        """
        c = records_table.c
        statement = select(c.time_us, c.chain, c.sequence, c.body, c.hash, c.prev_hash)
        if self.kind is not None:
            statement = statement.where(text(f"kind = '{self.kind.value}'"))
        if self.decision_id is not None:
            statement = statement.where(c.decision_id == self.decision_id)
            if self.kind is None:
                statement = statement.where(text("kind IN ('decision', 'stream_alert')"))
        if self.verdict is not None:
            statement = statement.where(c.verdict == self.verdict.value)
        if self.severity is not None:
            statement = statement.where(c.severity == self.severity.value)
        raised = self.cluster is not None or self.severity is not None
        if raised or self.verdict in (Verdict.FLAG, Verdict.ALERT):
            statement = statement.where(text("verdict IN ('flag', 'alert')"))
        if self.caller_hmac is not None:
            statement = statement.where(c.caller_hmac == self.caller_hmac)
        if self.since is not None:
            statement = statement.where(c.time_us >= round(self.since * 1e6))
        if self.until is not None:
            statement = statement.where(c.time_us < round(self.until * 1e6))
        return statement


def query(
    url: str, *, limit: int | None = None, newest_first: bool = False, **wanted: Any
) -> Iterator[dict[str, Any]]:
    """The bodies of the records that match, each with its `hash` and `prev_hash`, by time.

    `wanted` are the fields of `Filter`.
    """
    for row, body in rows(url, Filter(**wanted), limit=limit, newest_first=newest_first):
        yield {**body, "hash": row.hash, "prev_hash": row.prev_hash}


def rows(
    url: str,
    wanted: Filter,
    *more: ColumnElement[Any],
    limit: int | None = None,
    newest_first: bool = False,
    start: Place | None = None,
    through: Mapping[str, int] | None = None,
) -> Iterator[tuple[Row[Any], dict[str, Any]]]:
    """The rows that match and their parsed bodies, by time; AuditError where one has no JSON.

    Args:
        more: columns beside those of `Filter.statement`.
        start: the first place of interest, in ascending order.
        through: the last sequence of interest of each chain; chains that it lacks are left out.
    """
    c = records_table.c
    found = 0
    statement = wanted.statement().add_columns(*more)
    if through is not None:
        ends = [and_(c.chain == chain, c.sequence <= end) for chain, end in through.items()]
        statement = statement.where(or_(false(), *ends))
    for page in pages(url, statement, newest_first=newest_first, start=start):
        for row in page:
            body = body_of(row)
            if wanted.cluster is None or _fired(body, wanted.cluster):
                if limit is not None and found >= limit:
                    return
                found += 1
                yield row, body


def pages(
    url: str,
    statement: Select[Any],
    *,
    newest_first: bool = False,
    page_records: int = PAGE_RECORDS,
    start: Place | None = None,
) -> Iterator[Sequence[Row[Any]]]:
    """The rows of a `Filter.statement`, with whatever columns were added to it, by time.

    Args:
        start: the first place of interest, in ascending order.
    """
    c = records_table.c
    order = (c.time_us, c.chain, c.sequence)
    statement = statement.limit(page_records)
    statement = statement.order_by(*(one.desc() if newest_first else one for one in order))
    engine = open_reader(url)
    page_statement = statement
    if start is not None:
        page_statement = statement.where(tuple_(*order) >= start)
    try:
        while True:
            with engine.connect() as connection:
                page = connection.execute(page_statement).all()
            yield page
            if len(page) < page_records:
                return
            last = (page[-1].time_us, page[-1].chain, page[-1].sequence)
            beyond = tuple_(*order) < last if newest_first else tuple_(*order) > last
            page_statement = statement.where(beyond)
    except SQLAlchemyError as error:
        raise AuditError(f"audit log cannot be read: {reason(error)}") from error
    finally:
        engine.dispose()


def body_of(row: Row[Any]) -> dict[str, Any]:
    """The parsed body of a stored row; AuditError where it is no JSON."""
    try:
        return dict(orjson.loads(row.body))
    except ValueError as error:
        raise AuditError(
            "audit log holds a record whose body is not JSON; run audit verify"
        ) from error


def heads(url: str) -> dict[str, int]:
    """The last sequence of each chain that has records."""
    engine = open_reader(url)
    try:
        with engine.connect() as connection:
            last = {chain: head(connection, chain) for chain in chains(engine)}
    except SQLAlchemyError as error:
        raise AuditError(f"audit log cannot be read: {reason(error)}") from error
    finally:
        engine.dispose()
    return {chain: row.sequence for chain, row in last.items() if row is not None}


def trace_of(url: str, decision_id: str) -> DecodedTrace | None:
    """The scores of a decision's tokens; None below level scores.

    NotFoundError: no such decision.
    """
    stored = _decision(url, decision_id).trace
    return None if stored is None else decode_trace(stored)


def sealed_of(url: str, decision_id: str, keys: KeyRing | None) -> dict[str, Any]:
    """A decision's `token_ids`, and at level content its `texts`.

    Raises:
        NotFoundError: no such decision.
        AuditError: it holds neither, or the ring does not open it.
    """
    row = _decision(url, decision_id)
    if row.sealed is None:
        raise AuditError(f"decision {decision_id!r}: its level keeps no tokens")
    name = json.loads(row.body)["sealed"]["key"]
    if name is None:
        return dict(unpack(row.sealed))
    if keys is None:
        raise AuditError(
            f"decision {decision_id!r}: sealed under key {name!r}, expected a key ring that has it"
        )
    return dict(keys.open(row.sealed, name, decision_id))


def _decision(url: str, decision_id: str) -> Row[Any, Any, Any]:
    c = records_table.c
    engine = open_reader(url)
    try:
        with engine.connect() as connection:
            row = connection.execute(
                select(c.body, c.trace, c.sealed).where(
                    c.decision_id == decision_id, text("kind = 'decision'")
                )
            ).one_or_none()
    except SQLAlchemyError as error:
        raise AuditError(f"audit log cannot be read: {reason(error)}") from error
    finally:
        engine.dispose()
    if row is None:
        raise NotFoundError(f"decision: found none of id {decision_id!r} in the audit log")
    return row


def _fired(body: dict[str, Any], cluster: str) -> bool:
    result = body.get("clusters", {}).get(cluster)
    fired = result is not None and result["verdict"] != Verdict.PASS.value
    return fired or any(alert["cluster"] == cluster for alert in body.get("alerts", ()))
