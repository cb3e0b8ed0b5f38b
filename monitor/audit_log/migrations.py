"""The layouts that a log has had, and the step from each to the next.

A new log is made by taking all the steps, so that an old one that took them later is no different.
A step is never changed once it is released: what it makes is written out here and not taken from
`schema`, which knows the newest layout only.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    insert,
    select,
    update,
)
from sqlalchemy.schema import CreateColumn

_LONG = BigInteger().with_variant(Integer(), "sqlite")

schema_table = Table(
    "audit_schema", MetaData(), Column("version", Integer, nullable=False), sqlite_strict=True
)
"""One row: the version of the layout."""


def _first_tables(connection: Connection) -> None:
    """Version 1: the chained records."""
    metadata = MetaData()
    records = Table(
        "audit_records",
        metadata,
        Column("chain", Text, nullable=False),
        Column("sequence", _LONG, nullable=False),
        Column("kind", Text, nullable=False),
        Column("decision_id", Text, nullable=True),
        Column("time", Text, nullable=False),
        Column("time_us", _LONG, nullable=False),
        Column("verdict", Text, nullable=True),
        Column("body", LargeBinary, nullable=False),
        Column("prev_hash", Text, nullable=False),
        Column("hash", Text, nullable=False),
        PrimaryKeyConstraint("chain", "sequence"),
        Index("audit_records_by_decision", "decision_id"),
        Index("audit_records_by_time", "time_us"),
        Index("audit_records_by_verdict", "verdict", "time_us"),
        sqlite_strict=True,
    )
    Index(
        "audit_records_one_decision",
        records.c.decision_id,
        unique=True,
        sqlite_where=records.c.kind == "decision",
        postgresql_where=records.c.kind == "decision",
    )
    schema_table.create(connection)
    metadata.create_all(connection)
    connection.execute(insert(schema_table).values(version=0))


def _traces_and_checkpoints(connection: Connection) -> None:
    """Version 2: what lies beside a body, what is asked for by column, checkpoints, prunings."""
    for column in (
        Column("severity", Text, nullable=True),
        Column("caller_hmac", Text, nullable=True),
        Column("trace", LargeBinary, nullable=True),
        Column("sealed", LargeBinary, nullable=True),
    ):
        definition = CreateColumn(column).compile(dialect=connection.dialect)
        connection.exec_driver_sql(f"ALTER TABLE audit_records ADD COLUMN {definition}")
    connection.exec_driver_sql("DROP INDEX audit_records_by_decision")
    connection.exec_driver_sql("DROP INDEX audit_records_by_verdict")
    # Partial ones: most records pass, have no caller, and are the only one of their decision.
    records = Table("audit_records", MetaData(), autoload_with=connection)
    c = records.c
    for name, columns, condition in (
        ("audit_records_by_stream_alert", (c.decision_id,), c.kind == "stream_alert"),
        ("audit_records_by_verdict", (c.verdict, c.time_us), c.verdict.in_(["flag", "alert"])),
        ("audit_records_by_caller", (c.caller_hmac, c.time_us), c.caller_hmac.is_not(None)),
    ):
        index = Index(name, *columns, sqlite_where=condition, postgresql_where=condition)
        index.create(connection)
    metadata = MetaData()
    Table(
        "audit_checkpoints",
        metadata,
        Column("chain", Text, nullable=False),
        Column("sequence", _LONG, nullable=False),
        Column("time_us", _LONG, nullable=False),
        Column("latest_us", _LONG, nullable=False),
        Column("body", LargeBinary, nullable=False),
        Column("signature", Text, nullable=True),
        Column("frontier", LargeBinary, nullable=False),
        PrimaryKeyConstraint("chain", "sequence"),
        sqlite_strict=True,
    )
    Table(
        "audit_prunings",
        metadata,
        Column("chain", Text, nullable=False),
        Column("sequence", _LONG, nullable=False),
        Column("body", LargeBinary, nullable=False),
        Column("signature", Text, nullable=True),
        PrimaryKeyConstraint("chain", "sequence"),
        sqlite_strict=True,
    )
    metadata.create_all(connection)


STEPS: tuple[Callable[[Connection], None], ...] = (_first_tables, _traces_and_checkpoints)
SCHEMA_VERSION = len(STEPS)


def migrate(connection: Connection, found: int) -> None:
    """Take the steps from version `found`, 0 being an empty database, in one transaction."""
    for version, step in enumerate(STEPS[found:], start=found + 1):
        step(connection)
        connection.execute(update(schema_table).values(version=version))


def stored_version(connection: Connection) -> list[int]:
    """What the version table holds: one number, unless somebody changed it."""
    return list(connection.execute(select(schema_table.c.version)).scalars())
