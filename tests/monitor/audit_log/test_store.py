from __future__ import annotations

import dataclasses
import os
import sqlite3
import stat
from pathlib import Path

import pytest

from monitor.audit_log import schema
from monitor.audit_log.chain import genesis_hash
from monitor.audit_log.record import AuditRecord, RecordKind
from monitor.audit_log.store import TAIL_RECORDS, AuditStore, Batch, DuplicateDecisionError
from monitor.audit_log.verify import verify
from monitor.errors import AuditChainError, AuditError, SettingsError
from monitor.records import Verdict


def record(name: str) -> AuditRecord:
    return AuditRecord(
        kind=RecordKind.DECISION,
        time_us=1,
        decision_id=name,
        verdict=Verdict.PASS,
        content={"policy": "default"},
    )


def fill(url: str, names: list[str]) -> None:
    store = AuditStore(url, "main")
    store.commit(store.link([record(name) for name in names]))
    store.close()


def path_of(url: str) -> Path:
    return schema.database_path(url)


def test_a_new_chain_starts_at_its_genesis_and_goes_on_after_reopening(url: str) -> None:
    store = AuditStore(url, "main")
    assert (store.head.sequence, store.head.hash) == (0, genesis_hash("main"))
    batch = store.link([record("a"), record("b")])
    store.commit(batch)
    assert [row.sequence for row in batch.rows] == [1, 2]
    store.close()
    again = AuditStore(url, "main")
    assert again.head == batch.head
    again.commit(again.link([record("c")]))
    again.close()
    assert verify(url).records == 3


def test_commits_are_synced_in_full_through_a_write_ahead_log(url: str) -> None:
    engine = schema.open_writer(url, "main")
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    engine.dispose()


def test_the_file_is_its_owner_s_alone(url: str) -> None:
    fill(url, ["a"])
    assert stat.S_IMODE(path_of(url).stat().st_mode) == 0o600


def test_a_second_writer_is_refused_and_told_who_writes(url: str) -> None:
    store = AuditStore(url, "main")
    with pytest.raises(AuditError, match=f"being written by process {os.getpid()}"):
        AuditStore(url, "main")
    store.close()
    AuditStore(url, "main").close()


def test_a_store_that_fails_to_open_lets_go_of_its_lock(url: str) -> None:
    fill(url, ["a"])
    with sqlite3.connect(path_of(url)) as connection:
        connection.execute("UPDATE audit_records SET hash = 'x'")
    connection.close()
    for _ in range(2):
        with pytest.raises(AuditChainError, match="record 1 .*hash"):
            AuditStore(url, "main")


def test_a_broken_tail_is_found_on_opening_also_behind_a_long_chain(url: str) -> None:
    fill(url, [f"d{number}" for number in range(TAIL_RECORDS + 20)])
    AuditStore(url, "main").close()
    with sqlite3.connect(path_of(url)) as connection:
        connection.execute("UPDATE audit_records SET verdict = 'alert' WHERE sequence = 50")
    connection.close()
    with pytest.raises(AuditChainError, match="record 50 "):
        AuditStore(url, "main")


def test_a_head_moved_by_another_program_is_not_built_upon(url: str) -> None:
    fill(url, ["a", "b"])
    store = AuditStore(url, "main")
    with sqlite3.connect(path_of(url)) as connection:
        connection.execute("DELETE FROM audit_records WHERE sequence = 2")
    connection.close()
    with pytest.raises(AuditChainError, match="found head 1 .*expected 2 "):
        store.commit(store.link([record("c")]))
    store.close()
    assert verify(url).records == 1


def test_a_batch_given_again_after_it_reached_the_disk_is_not_written_twice(url: str) -> None:
    store = AuditStore(url, "main")
    batch = store.link([record("a"), record("b")])
    store.commit(batch)
    store.commit(batch)
    store.close()
    assert verify(url).records == 2


def test_a_decision_stored_once_is_refused_the_second_time(url: str) -> None:
    store = AuditStore(url, "main")
    store.commit(store.link([record("a")]))
    with pytest.raises(DuplicateDecisionError) as caught:
        store.commit(store.link([record("b"), record("a"), record("c"), record("b")]))
    assert caught.value.places == {1, 3}
    alert = dataclasses.replace(record("a"), kind=RecordKind.STREAM_ALERT)
    store.commit(store.link([alert, alert]))
    store.close()
    assert verify(url).records == 3


def test_two_chains_share_a_file_and_verify_each(url: str) -> None:
    for chain, names in (("main", ["a", "b"]), ("other", ["c"]), ("main", ["d"])):
        store = AuditStore(url, chain)
        batch: Batch = store.link([record(name) for name in names])
        store.commit(batch)
        store.close()
    found = {chain.head.chain: chain.records for chain in verify(url).chains}
    assert found == {"main": 3, "other": 1}


@pytest.mark.parametrize(
    "bad",
    [
        "audit.db",
        "mysql://localhost/audit",
        "postgresql://host",
        "sqlite://",
        "sqlite:///:memory:",
        "not a url",
    ],
)
def test_a_url_that_names_no_database_is_a_setting_refused(bad: str) -> None:
    with pytest.raises(SettingsError, match="sqlite:///PATH"):
        AuditStore(bad, "main")


def test_a_refused_url_does_not_show_its_password() -> None:
    with pytest.raises(SettingsError) as caught:
        AuditStore("mysql://user:hunter2@localhost/audit", "main")
    assert "hunter2" not in str(caught.value)


def test_a_file_that_is_no_database_is_refused(url: str) -> None:
    path_of(url).write_bytes(b"these are minutes of a meeting, not a database" * 30)
    with pytest.raises(AuditError, match="not a database"):
        AuditStore(url, "main")
    with pytest.raises(AuditError, match="not a database"):
        verify(url)


def test_a_later_schema_is_refused_with_both_versions(url: str) -> None:
    fill(url, ["a"])
    with sqlite3.connect(path_of(url)) as connection:
        connection.execute("UPDATE audit_schema SET version = 99")
    connection.close()
    with pytest.raises(AuditError, match=r"found schema version 99, expected at most 2"):
        AuditStore(url, "main")


def test_a_folder_that_cannot_hold_the_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(AuditError, match="cannot be opened"):
        AuditStore(f"sqlite:///{tmp_path}/file/audit.db", "main")
