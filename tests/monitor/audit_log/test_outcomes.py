"""What follows when a file is damaged, vanishes, or comes back from a copy."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from monitor.audit_log.query import query
from monitor.audit_log.record import AuditRecord, RecordKind
from monitor.audit_log.retention import export_checkpoints
from monitor.audit_log.schema import database_path
from monitor.audit_log.store import AuditStore
from monitor.audit_log.verify import verify
from monitor.audit_log.writer import AuditLog
from monitor.errors import AuditChainError, AuditError
from monitor.records import Decision, Verdict

MakeDecision = Callable[..., Decision]


async def write(url: str, decision: MakeDecision, names: list[str]) -> None:
    log = AuditLog.open(url)
    log.start()
    for name in names:
        await log.append_decision(decision(name, Verdict.ALERT), input_digest=None)
    await log.close()


def write_small(url: str) -> None:
    """Three records with everything that a row can hold, as short as they can be."""
    stored = b"\x00\x01beside"
    digest = hashlib.sha256(stored).hexdigest()
    store = AuditStore(url, "main", checkpoint_records=3)
    store.commit(
        store.link(
            [
                AuditRecord(
                    kind=RecordKind.DECISION,
                    time_us=number,
                    decision_id=("aa", "bd", "ch")[number - 1],  # no flip makes one another
                    verdict=Verdict.FLAG,
                    content={
                        "severity": "info",
                        "caller_hmac": "ab",
                        "trace": {"sha256": digest},
                        "sealed": {"sha256": digest},
                    },
                    trace=stored,
                    sealed=stored,
                )
                for number in range(1, 4)
            ]
        )
    )
    store.close()


@pytest.mark.parametrize(
    "column",
    [
        *("chain", "kind", "decision_id", "time", "verdict", "severity", "caller_hmac"),
        *("prev_hash", "hash", "body", "trace", "sealed"),
    ],
)
def test_every_flipped_byte_of_every_column_is_found_and_the_record_named(
    url: str, column: str
) -> None:
    write_small(url)
    connection = sqlite3.connect(database_path(url), isolation_level=None)
    connection.text_factory = bytes
    select = f"SELECT CAST({column} AS BLOB) FROM audit_records WHERE sequence = 2"
    (stored,) = connection.execute(select).fetchone()
    kind = "BLOB" if column in ("body", "trace", "sealed") else "TEXT"
    update = f"UPDATE audit_records SET {column} = CAST(? AS {kind}) WHERE sequence = 2"
    for place in range(len(stored)):
        flipped = bytearray(stored)
        flipped[place] ^= 1
        connection.execute(update, (bytes(flipped),))
        with pytest.raises(AuditChainError) as caught:
            verify(url)
        if column == "chain":  # it is then the only record of a chain of its own
            assert "record 1: sequence: found 2, expected 1" in str(caught.value) or (
                caught.value.sequence == 2
            )
        else:
            assert caught.value.sequence == 2, (place, str(caught.value))
        connection.execute(update, (stored,))
    connection.close()
    assert verify(url).records == 3


async def test_a_log_that_is_removed_under_a_server_is_said_and_not_written_to_nowhere(
    url: str, tmp_path: Path, decision: MakeDecision
) -> None:
    log = AuditLog.open(url)
    log.start()
    assert await log.append_decision(decision("d1", Verdict.ALERT), input_digest=None) == 1
    away = tmp_path / "away.db"
    os.rename(database_path(url), away)
    with pytest.raises(AuditError, match="the file was removed or replaced"):
        await log.append_decision(decision("d2", Verdict.ALERT), input_digest=None)
    assert not log.healthy
    os.rename(away, database_path(url))
    assert await log.append_decision(decision("d3", Verdict.ALERT), input_digest=None) == 3
    assert log.healthy
    await log.close()
    assert [record["decision_id"] for record in query(url)] == ["d1", "d2", "d3"]
    assert verify(url).records == 3


@pytest.mark.parametrize("removed", [("-wal",), ("-wal", "-shm")])
async def test_a_write_ahead_log_that_is_removed_takes_nothing_with_it(
    url: str, tmp_path: Path, decision: MakeDecision, removed: tuple[str, ...]
) -> None:
    log = AuditLog.open(url)
    log.start()
    await log.append_decision(decision("d1", Verdict.ALERT), input_digest=None)
    for suffix in removed:
        Path(f"{database_path(url)}{suffix}").unlink()
    assert await log.append_decision(decision("d2", Verdict.ALERT), input_digest=None) == 2
    as_after_a_crash = tmp_path / "copy.db"
    shutil.copyfile(database_path(url), as_after_a_crash)
    assert verify(f"sqlite:///{as_after_a_crash}").records == 2
    assert await log.append_decision(decision("d3", Verdict.ALERT), input_digest=None) == 3
    assert Path(f"{database_path(url)}-wal").exists()
    assert log.healthy
    await log.close()
    assert verify(url).records == 3


FAILING_WRITES = """
import asyncio, importlib.util, resource, sys
from monitor.audit_log.writer import AuditLog
from monitor.errors import AuditError
from monitor.records import Verdict

spec = importlib.util.spec_from_file_location("made", sys.argv[2])
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)

def limit(n_bytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))

async def main():
    log = AuditLog.open(sys.argv[1])
    log.start()
    append = lambda name: log.append_decision(
        made.make_decision(name, Verdict.ALERT), input_digest=None
    )
    print(await append("d1"))
    limit(4096)
    try:
        await append("d2")
    except AuditError as error:
        print(error)
    print(log.healthy)
    limit(resource.RLIM_INFINITY)
    print(await append("d3"), log.healthy, log.statistics().dropped)
    await log.close()

asyncio.run(main())
"""


def test_writes_that_fail_are_said_and_made_when_they_can_be(url: str) -> None:
    made = Path(__file__).with_name("conftest.py")
    ran = subprocess.run(
        [sys.executable, "-c", FAILING_WRITES, url, str(made)],
        capture_output=True,
        text=True,
        check=True,
    )
    first, failed, healthy, after = ran.stdout.splitlines()
    assert (first, healthy, after) == ("1", "False", "3 True 0")
    assert f"audit log {database_path(url)} cannot be written: " in failed
    assert [record["decision_id"] for record in query(url)] == ["d1", "d2", "d3"]
    assert verify(url).records == 3


async def test_a_log_restored_from_a_copy_goes_on_and_what_is_missing_shows(
    url: str, tmp_path: Path, decision: MakeDecision
) -> None:
    await write(url, decision, ["d1", "d2"])
    copy = tmp_path / "copy.db"
    shutil.copyfile(database_path(url), copy)
    await write(url, decision, ["d3", "d4"])
    elsewhere = list(export_checkpoints(url))

    shutil.copyfile(copy, database_path(url))
    assert verify(url).records == 2
    with pytest.raises(AuditChainError, match="record 3: found none, expected records up to 4"):
        verify(url, kept=elsewhere)
    await write(url, decision, ["d5", "d6"])
    assert [record["decision_id"] for record in query(url)] == ["d1", "d2", "d5", "d6"]
    assert verify(url).records == 4
    with pytest.raises(AuditChainError, match="record 4: checkpoint head"):
        verify(url, kept=elsewhere)


async def test_a_copy_taken_while_a_server_writes_is_a_whole_log(
    url: str, tmp_path: Path, decision: MakeDecision
) -> None:
    log = AuditLog.open(url, checkpoint_records=2)
    log.start()
    for number in range(7):
        await log.append_decision(decision(f"d{number}", Verdict.ALERT), input_digest=None)
    copy = tmp_path / "copy.db"
    source, target = sqlite3.connect(database_path(url)), sqlite3.connect(copy)
    source.backup(target)
    source.close()
    target.close()
    await log.append_decision(decision("later", Verdict.ALERT), input_digest=None)
    await log.close()
    assert verify(f"sqlite:///{copy}").records == 7
    await write(f"sqlite:///{copy}", decision, ["elsewhere"])
    assert verify(f"sqlite:///{copy}").records == 8
