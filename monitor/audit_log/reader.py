"""Stored rows in pages: memory stays bounded and no read keeps the writer waiting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, Engine, Row, select
from sqlalchemy.exc import SQLAlchemyError

from monitor.audit_log.schema import reason, records_table
from monitor.errors import AuditError

PAGE_RECORDS = 500


def chains(engine: Engine) -> list[str]:
    """The names of the chains in the log, in order."""
    column = records_table.c.chain
    try:
        with engine.connect() as connection:
            return list(connection.execute(select(column).distinct().order_by(column)).scalars())
    except SQLAlchemyError as error:
        raise AuditError(f"audit log cannot be read: {reason(error)}") from error


def rows(engine: Engine, chain: str, after: int | None = None) -> Iterator[Row[Any]]:
    """The rows of one chain by sequence: all of them, or those after `after`."""
    table = records_table
    while True:
        statement = (
            select(table)
            .where(table.c.chain == chain)
            .order_by(table.c.sequence)
            .limit(PAGE_RECORDS)
        )
        if after is not None:
            statement = statement.where(table.c.sequence > after)
        try:
            with engine.connect() as connection:
                page = connection.execute(statement).all()
        except SQLAlchemyError as error:
            place = "" if after is None else f" after record {after}"
            raise AuditError(
                f"audit log, chain {chain}, cannot be read{place}: {reason(error)}"
            ) from error
        yield from page
        if len(page) < PAGE_RECORDS:
            return
        after = page[-1].sequence


def head(connection: Connection, chain: str) -> Row[Any, Any] | None:
    """The last row of a chain: its sequence and hash."""
    table = records_table
    return connection.execute(
        select(table.c.sequence, table.c.hash)
        .where(table.c.chain == chain)
        .order_by(table.c.sequence.desc())
        .limit(1)
    ).one_or_none()
