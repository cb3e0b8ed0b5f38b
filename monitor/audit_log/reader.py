"""Stored rows in pages: memory stays bounded and no read keeps the writer waiting."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, Engine, Row, select
from sqlalchemy.exc import SQLAlchemyError

from monitor.audit_log.schema import checkpoints_table, prunings_table, reason, records_table
from monitor.errors import AuditError

PAGE_RECORDS = 500


def chains(engine: Engine) -> list[str]:
    """The names of the chains that the log speaks of, in order."""
    tables = (records_table, checkpoints_table, prunings_table)
    try:
        with engine.connect() as connection:
            found = {
                name
                for table in tables
                for name in connection.execute(select(table.c.chain).distinct()).scalars()
            }
    except SQLAlchemyError as error:
        raise AuditError(f"audit log cannot be read: {reason(error)}") from error
    return sorted(found)


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


def checkpoints(engine: Engine, chain: str, after: int = -1) -> Iterator[Row[Any]]:
    """The stored checkpoints of one chain by sequence, those after `after`, a page at a time."""
    table = checkpoints_table
    while True:
        statement = (
            select(table)
            .where(table.c.chain == chain, table.c.sequence > after)
            .order_by(table.c.sequence)
            .limit(PAGE_RECORDS)
        )
        try:
            with engine.connect() as connection:
                page = connection.execute(statement).all()
        except SQLAlchemyError as error:
            raise AuditError(
                f"audit log, chain {chain}, checkpoints cannot be read: {reason(error)}"
            ) from error
        yield from page
        if len(page) < PAGE_RECORDS:
            return
        after = page[-1].sequence


def checkpoint_near(connection: Connection, chain: str, sequence: int) -> Row[Any] | None:
    """The last checkpoint at or before a sequence."""
    table = checkpoints_table
    return connection.execute(
        select(table)
        .where(table.c.chain == chain, table.c.sequence <= sequence)
        .order_by(table.c.sequence.desc())
        .limit(1)
    ).one_or_none()


def last_checkpoint(connection: Connection, chain: str) -> Row[Any] | None:
    """The newest checkpoint."""
    table = checkpoints_table
    return connection.execute(
        select(table).where(table.c.chain == chain).order_by(table.c.sequence.desc()).limit(1)
    ).one_or_none()


def checkpoint_covering(connection: Connection, chain: str, sequence: int) -> Row[Any] | None:
    """The first checkpoint at or after a sequence."""
    table = checkpoints_table
    return connection.execute(
        select(table)
        .where(table.c.chain == chain, table.c.sequence >= sequence)
        .order_by(table.c.sequence)
        .limit(1)
    ).one_or_none()


def pruning(connection: Connection, chain: str) -> Row[Any] | None:
    """What says that the beginning of a chain was deleted on purpose, if it was."""
    table = prunings_table
    return connection.execute(
        select(table).where(table.c.chain == chain).order_by(table.c.sequence.desc()).limit(1)
    ).one_or_none()


def head(connection: Connection, chain: str) -> Row[Any, Any] | None:
    """The last row of a chain: its sequence and hash."""
    table = records_table
    return connection.execute(
        select(table.c.sequence, table.c.hash)
        .where(table.c.chain == chain)
        .order_by(table.c.sequence.desc())
        .limit(1)
    ).one_or_none()
