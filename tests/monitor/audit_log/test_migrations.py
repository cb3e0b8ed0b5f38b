"""A log that an earlier version wrote is brought up to date and loses nothing."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect

from monitor.audit_log import migrations, schema
from monitor.audit_log.chain import canonical_bytes, genesis_hash, record_hash
from monitor.audit_log.record import AuditRecord, RecordKind, iso_time
from monitor.audit_log.store import AuditStore
from monitor.audit_log.verify import verify
from monitor.errors import AuditChainError, AuditError
from monitor.records import Verdict


def write_layout_1(url: str, n_records: int) -> None:
    """What the first version wrote: bodies of version 1 in tables of layout 1."""
    engine = create_engine(schema.parse_url(url))
    with engine.begin() as connection:
        migrations.STEPS[0](connection)
        connection.exec_driver_sql("UPDATE audit_schema SET version = 1")
        previous = genesis_hash("main")
        for sequence in range(1, n_records + 1):
            body = {
                "chain": "main",
                "decision_id": f"d{sequence}",
                "kind": "decision",
                "sequence": sequence,
                "time": iso_time(sequence),
                "time_us": sequence,
                "verdict": "pass",
                "version": 1,
            }
            digest = record_hash(previous, canonical_bytes(body))
            columns = {**body, "body": canonical_bytes(body), "prev_hash": previous, "hash": digest}
            del columns["version"]
            names = ", ".join(columns)
            marks = ", ".join("?" * len(columns))
            connection.exec_driver_sql(
                f"INSERT INTO audit_records ({names}) VALUES ({marks})", tuple(columns.values())
            )
            previous = digest
    engine.dispose()


def test_a_log_of_layout_1_verifies_and_goes_on_after_the_migration(url: str) -> None:
    write_layout_1(url, 700)
    with pytest.raises(AuditError, match="found schema version 1, expected 2; audit migrate"):
        verify(url)
    store = AuditStore(url, "main", checkpoint_records=1)
    record = AuditRecord(
        kind=RecordKind.DECISION, time_us=1, decision_id="new", verdict=Verdict.PASS, content={}
    )
    store.commit(store.link([record]))
    store.close()
    (report,) = verify(url).chains
    assert (report.records, report.checkpoints) == (701, 1)


def test_audit_migrate_alone_is_enough_to_read(url: str) -> None:
    write_layout_1(url, 3)
    schema.bring_up_to_date(url)
    assert verify(url).records == 3


def test_the_first_opening_after_the_migration_finds_what_was_broken(url: str) -> None:
    write_layout_1(url, 700)
    connection = sqlite3.connect(schema.database_path(url))
    connection.execute("UPDATE audit_records SET verdict = 'flag' WHERE sequence = 2")
    connection.commit()
    connection.close()
    with pytest.raises(AuditChainError, match="record 2 "):
        AuditStore(url, "main")


def test_a_log_migrated_is_no_different_from_a_new_one(url: str, tmp_path: Path) -> None:
    write_layout_1(url, 1)
    schema.bring_up_to_date(url)
    new = f"sqlite:///{tmp_path / 'new.db'}"
    AuditStore(new, "main").close()
    layouts = []
    for each in (url, new):
        connection = sqlite3.connect(schema.database_path(each))
        layouts.append(
            connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()
        )
        connection.close()
    assert layouts[0] == layouts[1]


def test_the_tables_that_queries_know_are_those_that_the_steps_make(url: str) -> None:
    AuditStore(url, "main").close()
    engine = schema.open_reader(url)
    with engine.connect() as connection:
        for table in schema.metadata.tables.values():
            stored = {
                column["name"]: column["nullable"]
                for column in inspect(connection).get_columns(table.name)
            }
            assert stored == {column.name: column.nullable for column in table.columns}
    engine.dispose()


def test_a_missing_log_is_not_made_by_migrating(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="no such file"):
        schema.bring_up_to_date(f"sqlite:///{tmp_path / 'absent.db'}")
    assert list(tmp_path.iterdir()) == []
