from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from monitor.audit_log.reader import PAGE_RECORDS
from monitor.audit_log.record import AuditRecord, RecordKind
from monitor.audit_log.schema import database_path
from monitor.audit_log.store import AuditStore
from monitor.audit_log.verify import verify
from monitor.errors import AuditChainError, AuditError


def change(url: str, *statements: str) -> None:
    """What an intruder with the file can do."""
    connection = sqlite3.connect(database_path(url))
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def test_a_log_as_it_was_written_verifies(written_log: str) -> None:
    report = verify(written_log)
    (chain,) = report.chains
    assert (report.records, chain.records, chain.head.sequence) == (10, 10, 10)
    assert len(chain.head.hash) == 64
    assert chain.first_time < chain.last_time
    assert (chain.checkpoints, chain.signed, chain.pruned) == (1, 0, 0)
    assert "removed from the end" in report.not_proven


def test_an_empty_log_verifies(url: str) -> None:
    AuditStore(url, "main").close()
    assert verify(url).records == 0


@pytest.mark.parametrize(
    ("assignment", "found"),
    [
        ("sequence = 77", "record 5: sequence: found 6, expected 5"),
        ("kind = 'server_stop'", "record 5 (decision 'd5'): column kind"),
        ("decision_id = 'other'", "record 5 (decision 'other'): column decision_id"),
        ("decision_id = NULL", "record 5: column decision_id"),
        ("time = '2020-01-01T00:00:00.000000Z'", "record 5 (decision 'd5'): column time:"),
        ("time_us = time_us + 1", "record 5 (decision 'd5'): column time_us"),
        ("verdict = 'alert'", "record 5 (decision 'd5'): column verdict"),
        ("verdict = NULL", "record 5 (decision 'd5'): column verdict: found None"),
        (
            "body = CAST(replace(body, '\"pass\"', '\"flag\"') AS BLOB)",
            "record 5 (decision 'd5'): hash",
        ),
        ("body = CAST(body || ' ' AS BLOB)", "record 5 (decision 'd5'): hash"),
        ("prev_hash = hash", "record 5 (decision 'd5'): prev_hash"),
        ("hash = prev_hash", "record 5 (decision 'd5'): hash"),
        ("chain = 'shadow'", "record 5: sequence: found 6, expected 5"),
    ],
)
def test_a_change_to_any_column_is_found_and_named(
    written_log: str, assignment: str, found: str
) -> None:
    change(written_log, f"UPDATE audit_records SET {assignment} WHERE sequence = 5")
    with pytest.raises(AuditChainError) as caught:
        verify(written_log)
    assert found in str(caught.value)
    assert caught.value.sequence == 5


def test_a_record_taken_out_of_the_middle_is_found(written_log: str) -> None:
    change(written_log, "DELETE FROM audit_records WHERE sequence = 4")
    with pytest.raises(AuditChainError, match="record 4: sequence: found 5, expected 4"):
        verify(written_log)


def test_the_first_record_taken_away_is_found(written_log: str) -> None:
    change(written_log, "DELETE FROM audit_records WHERE sequence = 1")
    with pytest.raises(AuditChainError, match="record 1: sequence: found 2, expected 1"):
        verify(written_log)


def test_a_gap_closed_by_renumbering_is_found(written_log: str) -> None:
    change(
        written_log,
        "DELETE FROM audit_records WHERE sequence = 4",
        "UPDATE audit_records SET sequence = sequence - 1 WHERE sequence > 4",
    )
    with pytest.raises(AuditChainError, match="record 4 .*prev_hash"):
        verify(written_log)


def test_two_records_that_changed_places_are_found(written_log: str) -> None:
    change(
        written_log,
        "UPDATE audit_records SET sequence = 99 WHERE sequence = 3",
        "UPDATE audit_records SET sequence = 3 WHERE sequence = 6",
        "UPDATE audit_records SET sequence = 6 WHERE sequence = 99",
    )
    with pytest.raises(AuditChainError) as caught:
        verify(written_log)
    assert (caught.value.sequence, caught.value.decision_id) == (3, "d6")


def test_a_body_changed_together_with_its_hash_breaks_the_next_record(written_log: str) -> None:
    connection = sqlite3.connect(database_path(written_log))
    body, prev_hash = connection.execute(
        "SELECT body, prev_hash FROM audit_records WHERE sequence = 7"
    ).fetchone()
    forged = json.dumps(
        {**json.loads(body), "verdict": "pass"}, sort_keys=True, separators=(",", ":")
    ).encode()
    message = b"sae-monitor audit record v1\n" + bytes.fromhex(prev_hash) + forged
    connection.execute(
        "UPDATE audit_records SET body = ?, hash = ?, verdict = 'pass' WHERE sequence = 7",
        (forged, hashlib.sha256(message).hexdigest()),
    )
    connection.commit()
    connection.close()
    with pytest.raises(AuditChainError, match=r"record 8 \(decision 'd8'\): prev_hash"):
        verify(written_log)


def test_a_record_put_before_the_first_is_found(written_log: str) -> None:
    change(
        written_log,
        "INSERT INTO audit_records SELECT chain, 0, kind, 'extra', time, time_us, verdict, body, "
        "prev_hash, hash, severity, caller_hmac, trace, sealed FROM audit_records "
        "WHERE sequence = 1",
    )
    with pytest.raises(AuditChainError, match="found 0, expected 1"):
        verify(written_log)


def test_records_cut_off_at_the_end_are_missed_by_a_checkpoint(written_log: str) -> None:
    change(written_log, "DELETE FROM audit_records WHERE sequence > 6")
    with pytest.raises(AuditChainError, match="record 7: found none, expected records up to 10"):
        verify(written_log)
    with pytest.raises(AuditChainError, match="found 6 records, expected 10 or more"):
        AuditStore(written_log, "main")


def test_records_cut_off_with_their_checkpoint_are_not_seen_and_the_report_says_so(
    written_log: str,
) -> None:
    change(
        written_log,
        "DELETE FROM audit_records WHERE sequence > 6",
        "DELETE FROM audit_checkpoints",
    )
    report = verify(written_log)
    assert report.records == 6
    assert "kept elsewhere" in report.not_proven


def test_the_first_of_several_breaks_is_named(written_log: str) -> None:
    change(written_log, "UPDATE audit_records SET verdict = 'flag' WHERE sequence IN (3, 8)")
    with pytest.raises(AuditChainError, match="record 3 "):
        verify(written_log)


def test_a_column_that_is_no_longer_text_is_named_and_not_a_crash(written_log: str) -> None:
    change(
        written_log,
        "UPDATE audit_records SET decision_id = CAST(X'ff41' AS TEXT) WHERE sequence = 5",
    )
    with pytest.raises(AuditChainError, match="record 5 .*column decision_id"):
        verify(written_log)


def test_every_flipped_byte_of_a_record_is_found(written_log: str, tmp_path: Path) -> None:
    path = database_path(written_log)
    content = path.read_bytes()
    start = content.index(b'{"action":"flag"')  # the body of the alert, record 7 or 4
    copy = tmp_path / "flipped.db"
    for place in range(start, start + 400, 13):
        flipped = bytearray(content)
        flipped[place] ^= 1
        copy.write_bytes(flipped)
        with pytest.raises(AuditChainError, match="record [47] .*hash"):
            verify(f"sqlite:///{copy}")


def test_a_damaged_page_is_an_audit_error(written_log: str) -> None:
    path = database_path(written_log)
    content = bytearray(path.read_bytes())
    content[4096 : len(content)] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(AuditError):
        verify(written_log)


def test_a_missing_file_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="no such file"):
        verify(f"sqlite:///{tmp_path / 'absent.db'}")
    assert list(tmp_path.iterdir()) == []


def test_a_copied_file_verifies_elsewhere(written_log: str, tmp_path: Path) -> None:
    target = tmp_path / "restored" / "copy.db"
    target.parent.mkdir()
    shutil.copyfile(database_path(written_log), target)
    assert verify(f"sqlite:///{target}").records == 10


def test_a_log_on_a_read_only_medium_verifies(written_log: str, small_disk: Path) -> None:
    target = small_disk / "audit.db"
    shutil.copyfile(database_path(written_log), target)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert verify(f"sqlite:///{target}").records == 10
    with pytest.raises(AuditError, match="[Rr]ead-only"):
        AuditStore(f"sqlite:///{target}", "main")


def test_a_log_is_verified_while_it_is_written(url: str) -> None:
    store = AuditStore(url, "main")
    event = AuditRecord(kind=RecordKind.SERVER_START, time_us=1, content={})
    store.commit(store.link([event]))
    assert verify(url).records == 1
    store.commit(store.link([event]))
    assert verify(url).records == 2
    store.close()


def test_progress_reaches_the_end_over_several_pages(url: str) -> None:
    store = AuditStore(url, "main")
    event = AuditRecord(kind=RecordKind.SERVER_START, time_us=1, content={})
    n_records = 2 * PAGE_RECORDS + 300
    store.commit(store.link([event] * n_records))
    store.close()
    seen: list[tuple[int, int]] = []
    progress: Callable[[int, int], None] = lambda done, total: seen.append((done, total))  # noqa: E731
    assert verify(url, progress).records == n_records
    assert seen == [(1000, n_records), (n_records, n_records)]
