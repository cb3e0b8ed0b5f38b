"""The tables of the audit log as they are now, and the engines that open them.

Everything that depends on the kind of database is here and in `locks`.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    create_engine,
    event,
    inspect,
    text,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from monitor.audit_log.locks import hold_chain
from monitor.audit_log.migrations import SCHEMA_VERSION, migrate, schema_table, stored_version
from monitor.errors import AuditError, SettingsError

PAGE_BYTES = 8192
"""Of an SQLite file that is made here: a record of ten clusters takes 3 to 7 KB, and a page of 4 KB
is left half empty by it, or needs a second (benchmarks/LOG.md, 2026-11-24)."""
STATEMENT_ROWS = 64
"""Rows of one INSERT: 14 columns each, far from the 32,766 values that SQLite takes."""
WAL_PAGES = (16 << 20) // PAGE_BYTES
"""Pages that are gathered in the write-ahead log before they are copied into the file."""
CACHE_KIB = 16 << 10
"""Memory for pages of the file, of its indexes above all."""
BUSY_SECONDS = 1.0
"""How long a commit waits for another connection's lock before it counts as failed."""
CONNECT_SECONDS = 5
"""How long a PostgreSQL server may take to answer."""
EXPECTED_URL = "sqlite:///PATH or postgresql://USER@HOST/DATABASE"

metadata = MetaData()
_LONG = BigInteger().with_variant(Integer(), "sqlite")

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
    Column("severity", Text, nullable=True),
    Column("caller_hmac", Text, nullable=True),
    Column("trace", LargeBinary, nullable=True),
    Column("sealed", LargeBinary, nullable=True),
    PrimaryKeyConstraint("chain", "sequence"),
)

checkpoints_table = Table(
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
)

prunings_table = Table(
    "audit_prunings",
    metadata,
    Column("chain", Text, nullable=False),
    Column("sequence", _LONG, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("signature", Text, nullable=True),
    PrimaryKeyConstraint("chain", "sequence"),
)


def parse_url(url: str) -> URL:
    """The URL's parts; SettingsError for anything but an SQLite file or a PostgreSQL database."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise SettingsError(f"audit: found {url!r}, expected {EXPECTED_URL}") from None
    shown = parsed.render_as_string(hide_password=True)
    if parsed.drivername in ("postgresql", "postgresql+psycopg"):
        if not parsed.database:
            raise SettingsError(f"audit: {shown!r} names no database, expected {EXPECTED_URL}")
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() != "sqlite" or parsed.query:
        raise SettingsError(f"audit: found {shown!r}, expected {EXPECTED_URL}")
    if parsed.database in (None, "", ":memory:"):
        raise SettingsError(f"audit: {url!r} names no file, expected {EXPECTED_URL}")
    return parsed


def is_sqlite(url: str) -> bool:
    """Whether the log is a file, so that only one process may write it."""
    return parse_url(url).get_backend_name() == "sqlite"


def database_path(url: str) -> Path:
    """The file that an SQLite URL names."""
    return Path(str(parse_url(url).database))


def shown(url: str) -> str:
    """What messages call the log: its file, or its URL without the password."""
    if is_sqlite(url):
        return str(database_path(url))
    return parse_url(url).set(drivername="postgresql").render_as_string(hide_password=True)


def open_writer(url: str, chain: str) -> Engine:
    """An engine that commits to this chain with full sync, on tables of the current version.

    An SQLite file is created when it is missing, readable by its owner only. Of PostgreSQL there is
    one connection; it holds the chain's lock as long as it lives.
    """
    return _up_to_date(url, _sqlite_writer(url) if is_sqlite(url) else _postgres_writer(url, chain))


def open_pruner(url: str) -> Engine:
    """An engine that may delete while servers write; it holds no chain. The log must exist.

    It brings the tables to the current version, as a writer does.
    """
    if is_sqlite(url) and not database_path(url).is_file():
        raise AuditError(f"audit log {database_path(url)}: no such file")
    return _up_to_date(url, _sqlite_writer(url) if is_sqlite(url) else _postgres_writer(url, None))


def bring_up_to_date(url: str) -> None:
    """Bring an existing log to the current version."""
    open_pruner(url).dispose()


def open_reader(url: str) -> Engine:
    """An engine that only reads, also while a server writes, and also on a read-only medium.

    Text that is no longer UTF-8 is read, so that `verify` can name it, and not refused.
    """
    engine = _sqlite_reader(url) if is_sqlite(url) else _postgres_reader(url)
    try:
        with engine.connect() as connection:
            found = _version(connection, shown(url))
            if found != SCHEMA_VERSION:
                advice = "; audit migrate brings it up to date" if found else ""
                raise AuditError(
                    f"audit log {shown(url)}: found schema version {found}, expected "
                    f"{SCHEMA_VERSION}{advice}"
                )
    except SQLAlchemyError as error:
        engine.dispose()
        raise AuditError(f"audit log {shown(url)} cannot be read: {reason(error)}") from error
    except AuditError:
        engine.dispose()
        raise
    return engine


def insert_rows(connection: Connection, rows: Sequence[tuple[object, ...]]) -> None:
    """Insert rows of all columns in their order, in as few statements as keep within limits.

    `executemany` would hand the interpreter's lock to the other threads once a row.
    """
    marker = "?" if connection.dialect.paramstyle == "qmark" else "%s"
    names = records_table.columns.keys()
    into = f"INSERT INTO {records_table.name} ({', '.join(names)}) VALUES "
    values = f"({', '.join(marker for _ in names)})"
    for start in range(0, len(rows), STATEMENT_ROWS):
        some = rows[start : start + STATEMENT_ROWS]
        connection.exec_driver_sql(
            into + ", ".join([values] * len(some)), tuple(itertools.chain.from_iterable(some))
        )


def save_lost_wal(engine: Engine, name: str) -> None:
    """Copy a write-ahead log that no name leads to any more into the file, and begin a new one.

    Only the writer still has it open: what it holds would be gone with the process.
    """
    connection = engine.raw_connection()
    try:
        cursor = connection.cursor()
        cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (is_busy, _, _) = cursor.fetchone() or (1, 0, 0)
    except sqlite3.Error as error:
        raise AuditError(f"audit log {name}: its -wal file is lost: {error}") from error
    finally:
        connection.close()
    if is_busy:
        raise AuditError(
            f"audit log {name}: its -wal file was removed, and another program keeps its records "
            "from being saved into the file; end what reads the log"
        )
    engine.dispose()


def reason(error: SQLAlchemyError) -> str:
    """The database's own words, without the statement and its values."""
    return " ".join(str(getattr(error, "orig", None) or error).split())


def _up_to_date(url: str, engine: Engine) -> Engine:
    try:
        with engine.begin() as connection:
            _bring_up_to_date(connection, shown(url))
    except SQLAlchemyError as error:
        engine.dispose()
        raise AuditError(f"audit log {shown(url)} cannot be opened: {reason(error)}") from error
    except AuditError:
        engine.dispose()
        raise
    return engine


def _sqlite_writer(url: str) -> Engine:
    path = database_path(url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise AuditError(f"audit log {path} cannot be opened for writing: {error}") from error
    engine = create_engine(
        parse_url(url), connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}
    )
    event.listen(engine, "connect", _on_sqlite_writer)
    event.listen(engine, "begin", _begin_immediate)
    return engine


def _sqlite_reader(url: str) -> Engine:
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

    return create_engine("sqlite://", creator=connect, poolclass=NullPool)


def _on_sqlite_writer(connection: DBAPIConnection, _record: object) -> None:
    connection.isolation_level = None  # transactions begin where _begin_immediate says
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA page_size={PAGE_BYTES}")  # nothing happens to a file that has pages
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute(f"PRAGMA wal_autocheckpoint={WAL_PAGES}")
    cursor.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
    cursor.close()


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _postgres_writer(url: str, chain: str | None) -> Engine:
    try:
        engine = create_engine(
            parse_url(url),
            pool_size=1,
            max_overflow=0,
            pool_pre_ping=True,
            connect_args={
                "connect_timeout": CONNECT_SECONDS,
                "options": "-c synchronous_commit=on",
                "application_name": "sae-monitor",
            },
        )
    except ModuleNotFoundError as error:
        raise _without_driver(error) from None

    def on_connect(connection: DBAPIConnection, _record: object) -> None:
        assert chain is not None
        hold_chain(connection, chain, shown(url))

    if chain is not None:
        event.listen(engine, "connect", on_connect)
    return engine


def _postgres_reader(url: str) -> Engine:
    options = {
        "connect_timeout": CONNECT_SECONDS,
        "options": "-c default_transaction_read_only=on",
        "application_name": "sae-monitor reader",
    }
    try:
        return create_engine(parse_url(url), poolclass=NullPool, connect_args=options)
    except ModuleNotFoundError as error:
        raise _without_driver(error) from None


def _without_driver(error: ModuleNotFoundError) -> SettingsError:
    return SettingsError(
        f"audit: PostgreSQL needs {error.name}, which is not installed; "
        "pip install 'sae-monitor[postgres]' brings it"
    )


def _bring_up_to_date(connection: Connection, name: str) -> None:
    if connection.dialect.name == "postgresql":  # instances that start together migrate in turn
        connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('sae-monitor audit'))"))
    found = 0
    if inspect(connection).has_table(schema_table.name):
        found = _version(connection, name)
    if found > SCHEMA_VERSION:
        raise AuditError(
            f"audit log {name}: found schema version {found}, expected at most {SCHEMA_VERSION}; "
            "a later version of sae-monitor wrote it"
        )
    migrate(connection, found)


def _version(connection: Connection, name: str) -> int:
    if not inspect(connection).has_table(schema_table.name):
        raise AuditError(f"{name} holds no audit log: table {schema_table.name} is missing")
    found = stored_version(connection)
    if len(found) != 1 or found[0] < 1:
        raise AuditError(f"audit log {name}: found schema version {found}, expected one number")
    return found[0]
