"""Stored records by time, verdict, cluster or decision; reads while a server writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from sqlalchemy import select, tuple_
from sqlalchemy.exc import SQLAlchemyError

from monitor.audit_log.reader import PAGE_RECORDS
from monitor.audit_log.record import RecordKind
from monitor.audit_log.schema import open_reader, reason, records_table
from monitor.errors import AuditError
from monitor.records import Verdict


def query(
    url: str,
    *,
    verdict: Verdict | None = None,
    cluster: str | None = None,
    since: float | None = None,
    until: float | None = None,
    decision_id: str | None = None,
    kind: RecordKind | None = RecordKind.DECISION,
    limit: int | None = None,
    newest_first: bool = False,
) -> Iterator[dict[str, Any]]:
    """The bodies of the records that match, each with its `hash` and `prev_hash`, by time.

    `cluster` keeps decisions in which that cluster flagged or alerted; `since` and `until` are
    Unix seconds, the first included and the second not; `kind` None keeps every kind. Nothing is
    verified here; see `monitor.audit_log.verify`.
    """
    table = records_table
    order = (table.c.time_us, table.c.chain, table.c.sequence)
    statement = select(table).limit(PAGE_RECORDS)
    statement = statement.order_by(*(c.desc() if newest_first else c for c in order))
    if kind is not None:
        statement = statement.where(table.c.kind == kind.value)
    if decision_id is not None:
        statement = statement.where(table.c.decision_id == decision_id)
    if verdict is not None:
        statement = statement.where(table.c.verdict == verdict.value)
    elif cluster is not None:
        statement = statement.where(table.c.verdict.in_([Verdict.FLAG.value, Verdict.ALERT.value]))
    if since is not None:
        statement = statement.where(table.c.time_us >= round(since * 1e6))
    if until is not None:
        statement = statement.where(table.c.time_us < round(until * 1e6))

    engine = open_reader(url)
    found = 0
    page_statement = statement
    try:
        while True:
            with engine.connect() as connection:
                page = connection.execute(page_statement).all()
            for row in page:
                body = dict(json.loads(row.body))
                if cluster is None or _fired(body, cluster):
                    if limit is not None and found >= limit:
                        return
                    found += 1
                    yield {**body, "hash": row.hash, "prev_hash": row.prev_hash}
            if len(page) < PAGE_RECORDS:
                return
            last = (page[-1].time_us, page[-1].chain, page[-1].sequence)
            beyond = tuple_(*order) < last if newest_first else tuple_(*order) > last
            page_statement = statement.where(beyond)
    except SQLAlchemyError as error:
        raise AuditError(f"audit log cannot be read: {reason(error)}") from error
    except ValueError as error:
        raise AuditError(
            "audit log holds a record whose body is not JSON; run audit verify"
        ) from error
    finally:
        engine.dispose()


def _fired(body: dict[str, Any], cluster: str) -> bool:
    result = body.get("clusters", {}).get(cluster)
    fired = result is not None and result["verdict"] != Verdict.PASS.value
    return fired or any(alert["cluster"] == cluster for alert in body.get("alerts", ()))
