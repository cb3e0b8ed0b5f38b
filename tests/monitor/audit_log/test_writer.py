from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest

from monitor.audit_log.query import query
from monitor.audit_log.record import RecordKind
from monitor.audit_log.schema import database_path
from monitor.audit_log.verify import verify
from monitor.audit_log.writer import AuditLog
from monitor.errors import AuditError, SettingsError
from monitor.records import Decision, Mode, StreamUpdate, Verdict

MakeDecision = Callable[..., Decision]


@asynccontextmanager
async def open_log(url: str, **options: Any) -> AsyncIterator[AuditLog]:
    log = AuditLog.open(url, **options)
    log.start()
    try:
        yield log
    finally:
        await log.close()


@contextmanager
def locked(url: str) -> Iterator[None]:
    """Another program holds the database's write lock, so that no commit succeeds."""
    connection = sqlite3.connect(database_path(url), isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def test_an_alert_is_on_disk_when_its_append_returns(
    url: str, decision: MakeDecision
) -> None:
    async with open_log(url) as log:
        sequence = await log.append_decision(decision("d1", Verdict.ALERT), input_digest=None)
        assert sequence == 1
        assert [record["decision_id"] for record in query(url)] == ["d1"]


async def test_a_benign_decision_is_queued_without_a_number_and_written_soon(
    url: str, decision: MakeDecision
) -> None:
    async with open_log(url) as log:
        assert await log.append_decision(decision("d1"), input_digest=None) is None
        assert log.statistics().pending == 1
        await until(lambda: log.statistics().written == 1)
        assert log.statistics().pending == 0
    assert verify(url).records == 1


async def test_records_are_stored_in_the_order_of_their_appends(
    url: str, decision: MakeDecision
) -> None:
    async with open_log(url) as log:
        for number in range(150):
            await log.append_decision(decision(f"d{number}"), input_digest=None)
        sequence = await log.append_decision(decision("last", Verdict.ALERT), input_digest=None)
        assert sequence == 151
    stored = [record["decision_id"] for record in query(url)]
    assert stored == [f"d{number}" for number in range(150)] + ["last"]


async def test_waiting_appends_share_commits_and_get_their_own_numbers(
    url: str, decision: MakeDecision
) -> None:
    commits: list[float] = []
    log = AuditLog.open(url, on_sync=commits.append, commit_records=64)
    log.start()
    appends = [
        log.append_decision(decision(f"d{number}", Verdict.ALERT), input_digest=None)
        for number in range(100)
    ]
    assert await asyncio.gather(*appends) == list(range(1, 101))
    await log.close()
    assert 2 <= len(commits) < 20
    assert all(seconds > 0 for seconds in commits)


async def test_close_writes_what_is_queued_and_frees_the_log(
    url: str, decision: MakeDecision
) -> None:
    async with open_log(url, commit_delay_seconds=30.0) as log:
        await log.append_decision(decision("d1"), input_digest=None)
    async with open_log(url) as log:
        assert log.statistics().sequence == 1
        assert await log.append_event(RecordKind.SERVER_STOP, {"reason": "test"}) == 2
    assert verify(url).records == 2


async def test_statistics_tell_the_last_sync_by_the_clock_that_was_given(
    url: str, decision: MakeDecision
) -> None:
    log = AuditLog.open(url, clock=lambda: 1_700_000_000.5)
    log.start()
    assert log.statistics().last_sync_timestamp == 0.0
    await log.append_decision(decision("d1", Verdict.ALERT), input_digest=None)
    await log.close()
    assert log.statistics().last_sync_timestamp == 1_700_000_000.5
    (record,) = query(url)
    assert record["time"] == "2023-11-14T22:13:20.500000Z"


async def test_a_clock_that_steps_back_leaves_the_chain_whole(
    url: str, decision: MakeDecision
) -> None:
    log = AuditLog.open(url, clock=chain([2000.0, 1000.0], repeat(3000.0)).__next__)
    log.start()
    await log.append_decision(decision("late"), input_digest=None)
    await log.append_decision(decision("early", Verdict.ALERT), input_digest=None)
    await log.close()
    (report,) = verify(url).chains
    assert (report.records, report.clock_steps) == (2, 1)
    assert [record["decision_id"] for record in query(url)] == ["early", "late"]


async def test_level_none_opens_no_file(tmp_path: Path, decision: MakeDecision) -> None:
    async with open_log(f"sqlite:///{tmp_path / 'audit.db'}", level="none") as log:
        assert await log.append_decision(decision("d1", Verdict.ALERT), input_digest=None) is None
        assert await log.append_event(RecordKind.SERVER_START, {}) is None
        assert log.healthy
        assert log.statistics().sequence == 0
    assert list(tmp_path.iterdir()) == []


async def test_a_stream_alert_and_its_decision_have_one_id(
    url: str, decision: MakeDecision
) -> None:
    done = decision("d1", Verdict.ALERT)
    update = StreamUpdate(
        decision_id="d1",
        session_id="s",
        start_index=0,
        processed_index=5,
        verdict=done.verdict,
        action=done.action,
        overall=done.overall,
        clusters=done.clusters,
        new_alerts=done.alerts,
        tokens=(),
        coverage=done.coverage,
    )
    async with open_log(url) as log:
        first = await log.append_stream_alert(
            update, policy="default", mode=Mode.MONITOR, provenance=done.provenance
        )
        last = await log.append_decision(done, input_digest=None)
    assert (first, last) == (1, 2)
    kinds = [record["kind"] for record in query(url, decision_id="d1", kind=None)]
    assert kinds == ["stream_alert", "decision"]


async def test_an_alert_that_cannot_be_stored_raises_and_is_written_when_it_can(
    url: str, decision: MakeDecision
) -> None:
    async with open_log(url) as log:
        with locked(url):
            with pytest.raises(AuditError, match="cannot be written: database is locked"):
                await log.append_decision(decision("d1", Verdict.ALERT), input_digest=None)
            assert not log.healthy
            assert log.statistics().pending == 1
            assert log.statistics().failed >= 1
        await until(lambda: log.healthy)
        assert await log.append_decision(decision("d2", Verdict.ALERT), input_digest=None) == 2
        assert log.statistics().dropped == 0
    assert [record["decision_id"] for record in query(url)] == ["d1", "d2"]
    assert verify(url).records == 2


async def test_appends_behind_a_failing_commit_are_told_too(
    url: str, decision: MakeDecision
) -> None:
    async with open_log(url, commit_records=1) as log:
        with locked(url):
            outcomes = await asyncio.gather(
                *(
                    log.append_decision(decision(f"d{number}", Verdict.ALERT), input_digest=None)
                    for number in range(5)
                ),
                return_exceptions=True,
            )
            assert all(isinstance(outcome, AuditError) for outcome in outcomes)
        await until(lambda: log.statistics().written == 5)
    assert verify(url).records == 5


async def test_drop_counts_what_found_no_room_and_never_drops_an_alert(
    url: str, decision: MakeDecision
) -> None:
    async with open_log(url, on_full="drop", queue_records=4, commit_delay_seconds=30.0) as log:
        for number in range(7):
            await log.append_decision(decision(f"d{number}"), input_digest=None)
        assert log.statistics().dropped == 3
        await log.append_decision(decision("alert", Verdict.ALERT), input_digest=None)
        assert log.statistics().dropped == 4
    assert [record["decision_id"] for record in query(url)] == ["d1", "d2", "d3", "alert"]
    assert verify(url).records == 4


async def test_block_waits_for_room_and_loses_nothing(url: str, decision: MakeDecision) -> None:
    async with open_log(url, queue_records=3, commit_records=2) as log:
        for number in range(40):
            await log.append_decision(decision(f"d{number}"), input_digest=None)
            assert log.statistics().pending <= 3
    assert verify(url).records == 40
    assert log.statistics().dropped == 0


@pytest.mark.parametrize("on_full", ["block", "drop"])
async def test_an_alert_that_finds_no_room_in_time_is_told_and_counted(
    url: str, decision: MakeDecision, on_full: str
) -> None:
    async with open_log(url, on_full=on_full, queue_records=2, full_timeout_seconds=0.05) as log:
        with locked(url):
            appends = [
                asyncio.create_task(
                    log.append_decision(decision(f"d{number}", Verdict.ALERT), input_digest=None)
                )
                for number in range(2)
            ]
            await until(lambda: log.statistics().pending == 2)
            with pytest.raises(AuditError, match=r"holds 2 records and found no room .* 0.05 s"):
                await log.append_decision(decision("d2", Verdict.ALERT), input_digest=None)
            assert log.statistics().dropped == 1
            await asyncio.gather(*appends, return_exceptions=True)
    assert verify(url).records == 2


async def test_close_gives_up_on_a_store_that_stays_closed_and_counts_the_loss(
    url: str, decision: MakeDecision
) -> None:
    log = AuditLog.open(url)
    log.start()
    with locked(url):
        for number in range(3):
            await log.append_decision(decision(f"d{number}"), input_digest=None)
        await log.close(timeout_seconds=0.0)
    assert log.statistics().dropped == 3
    assert log.statistics().pending == 0
    assert verify(url).records == 0


async def test_a_decision_stored_before_is_refused_alone(url: str, decision: MakeDecision) -> None:
    async with open_log(url) as log:
        await log.append_decision(decision("d1", Verdict.ALERT), input_digest=None)
        outcomes = await asyncio.gather(
            *(
                log.append_decision(decision(name, Verdict.ALERT), input_digest=None)
                for name in ("d1", "d2", "d2", "d3")
            ),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes] == [AuditError, int, AuditError, int]
        assert log.statistics().dropped == 2
        assert log.healthy
    assert [record["decision_id"] for record in query(url)] == ["d1", "d2", "d3"]


async def test_a_decision_without_canonical_form_is_refused_alone(
    url: str, decision: MakeDecision
) -> None:
    broken = dataclasses.replace(decision("d2", Verdict.ALERT), session_id="\ud800")
    async with open_log(url) as log:
        outcomes = await asyncio.gather(
            log.append_decision(decision("d1", Verdict.ALERT), input_digest=None),
            log.append_decision(broken, input_digest=None),
            log.append_decision(decision("d3", Verdict.ALERT), input_digest=None),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes] == [int, AuditError, int]
        assert log.statistics().dropped == 1
    assert verify(url).records == 2


async def test_a_caller_that_goes_away_leaves_its_record(url: str, decision: MakeDecision) -> None:
    async with open_log(url) as log:
        with locked(url):
            append = asyncio.create_task(
                log.append_decision(decision("d1", Verdict.ALERT), input_digest=None)
            )
            await until(lambda: log.statistics().pending == 1)
            append.cancel()
            with pytest.raises(asyncio.CancelledError):
                await append
        assert await log.append_decision(decision("d2", Verdict.ALERT), input_digest=None) == 2
    assert verify(url).records == 2


async def test_appending_before_start_or_after_close_is_an_error(
    url: str, decision: MakeDecision
) -> None:
    log = AuditLog.open(url)
    with pytest.raises(AuditError, match="not been started"):
        await log.append_decision(decision("d1"), input_digest=None)
    log.start()
    await log.close()
    with pytest.raises(AuditError, match="closed"):
        await log.append_decision(decision("d1"), input_digest=None)


async def test_a_full_disk_fails_alerts_and_recovers_when_there_is_room(
    small_disk: Path, decision: MakeDecision
) -> None:
    url = f"sqlite:///{small_disk / 'audit.db'}"
    ballast = small_disk / "ballast"
    async with open_log(url) as log:
        await log.append_decision(decision("d0", Verdict.ALERT), input_digest=None)
        with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="space"):
            while True:
                file.write(b"x" * 4096)
        number = 0
        while log.healthy:  # room is left inside the database's own files at first
            number += 1
            alert = decision(f"d{number}", Verdict.ALERT)
            (outcome,) = await asyncio.gather(
                log.append_decision(alert, input_digest=None), return_exceptions=True
            )
        assert isinstance(outcome, AuditError)
        assert "disk" in str(outcome)
        ballast.unlink()
        await until(lambda: log.healthy)
    assert verify(url).records == number + 1


@pytest.mark.parametrize(
    "options",
    [
        {"on_full": "ask"},
        {"queue_records": 0},
        {"queue_bytes": 0},
        {"level": "everything"},
        {"hash_key": b"x"},
    ],
)
def test_impossible_options_are_refused(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="audit"):
        AuditLog.open(url, **options)
    assert not database_path(url).exists()
