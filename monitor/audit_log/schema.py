"""The tables of the audit log, their version, and the engines that open them.

Everything that depends on the kind of database is here: another one is another branch of
`open_writer` and `open_reader`, not another log.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    create_engine,
    event,
    insert,
    inspect,
    select,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from monitor.errors import AuditError, SettingsError

SCHEMA_VERSION = 1
BUSY_SECONDS = 1.0
"""How long a commit waits for another connection's lock before it counts as failed."""

metadata = MetaData()
_LONG = BigInteger().with_variant(Integer(), "sqlite")

schema_table = Table(
    "audit_schema", metadata, Column("version", Integer, nullable=False), sqlite_strict=True
)

records_table = Table(
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
    records_table.c.decision_id,
    unique=True,
    sqlite_where=records_table.c.kind == "decision",
    postgresql_where=records_table.c.kind == "decision",
)


def parse_url(url: str) -> URL:
    """The URL's parts; SettingsError for anything but an SQLite file."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise SettingsError(f"audit: found {url!r}, expected sqlite:///PATH") from None
    if parsed.get_backend_name() != "sqlite" or parsed.query:
        shown = parsed.render_as_string(hide_password=True)
        raise SettingsError(f"audit: found {shown!r}, expected sqlite:///PATH")
    if parsed.database in (None, "", ":memory:"):
        raise SettingsError(f"audit: {url!r} names no file, expected sqlite:///PATH")
    return parsed


def database_path(url: str) -> Path:
    """The file that an SQLite URL names."""
    return Path(str(parse_url(url).database))


def open_writer(url: str) -> Engine:
    """An engine that commits with full sync, on tables of the current version.

    The file is created when it is missing, readable by its owner only.
    """
    path = database_path(url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise AuditError(f"audit log {path} cannot be opened for writing: {error}") from error
    engine = create_engine(
        parse_url(url), connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}
    )
    event.listen(engine, "connect", _on_writer_connect)
    event.listen(engine, "begin", _begin_immediate)
    try:
        with engine.begin() as connection:
            _migrate(connection, path)
    except SQLAlchemyError as error:
        engine.dispose()
        raise AuditError(f"audit log {path} cannot be opened: {reason(error)}") from error
    except AuditError:
        engine.dispose()
        raise
    return engine


def open_reader(url: str) -> Engine:
    """An engine that only reads, also while a server writes, and also on a read-only medium.

    Text that is no longer UTF-8 is read, so that `verify` can name it, and not refused.
    """
    path = database_path(url)
    if not path.is_file():
        raise AuditError(f"audit log {path}: no such file")
    # SQLite cannot make its shared-memory file beside a log that lies on a read-only medium.
    sealed = not os.access(path.parent, os.W_OK) and not Path(f"{path}-wal").exists()
    location = f"{path.absolute().as_uri()}?mode=ro" + ("&immutable=1" if sealed else "")

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            location, uri=True, timeout=BUSY_SECONDS, check_same_thread=False
        )
        connection.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
        return connection

    engine = create_engine("sqlite://", creator=connect, poolclass=NullPool)
    try:
        with engine.connect() as connection:
            _check_version(connection, path)
    except SQLAlchemyError as error:
        engine.dispose()
        raise AuditError(f"audit log {path} cannot be read: {reason(error)}") from error
    except AuditError:
        engine.dispose()
        raise
    return engine


def reason(error: SQLAlchemyError) -> str:
    """The database's own words, without the statement and its values."""
    return str(getattr(error, "orig", None) or error)


def _on_writer_connect(connection: DBAPIConnection, _record: object) -> None:
    connection.isolation_level = None  # transactions begin where _begin_immediate says
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _migrate(connection: Connection, path: Path) -> None:
    """Make the tables, or bring them to the current version; there is only one as yet."""
    if inspect(connection).has_table(schema_table.name):
        _check_version(connection, path)
        return
    metadata.create_all(connection)
    connection.execute(insert(schema_table).values(version=SCHEMA_VERSION))


def _check_version(connection: Connection, path: Path) -> None:
    if not inspect(connection).has_table(schema_table.name):
        raise AuditError(f"{path} holds no audit log: table {schema_table.name} is missing")
    found = connection.execute(select(schema_table.c.version)).scalars().all()
    if list(found) != [SCHEMA_VERSION]:
        raise AuditError(
            f"audit log {path}: found schema version {found}, expected [{SCHEMA_VERSION}]"
        )
