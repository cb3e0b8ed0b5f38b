"""The queue is bounded in records and bytes, and the log says how far its checkpoints reach."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from monitor.audit_log.checkpoint import load_signer, new_signing_key
from monitor.audit_log.query import query
from monitor.audit_log.record import Observed, held_bytes
from monitor.audit_log.schema import database_path
from monitor.audit_log.trace import TokenTrace
from monitor.audit_log.verify import verify
from monitor.audit_log.writer import AuditLog
from monitor.records import Decision, Stage, Verdict

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


def trace_of(n_tokens: int) -> TokenTrace:
    logits = np.zeros((n_tokens, 1, 3), np.float32)
    return TokenTrace(clusters=("weapons",), stages=(Stage.PROMPT,) * n_tokens, logits=logits)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def test_drop_counts_what_found_no_room_in_bytes_and_never_drops_an_alert(
    url: str, decision: MakeDecision
) -> None:
    size = held_bytes(decision("d0"))
    options: dict[str, Any] = {"on_full": "drop", "commit_delay_seconds": 30.0}
    async with open_log(url, queue_bytes=4 * size, **options) as log:
        for number in range(7):
            await log.append_decision(decision(f"d{number}"), input_digest=None)
        assert (log.statistics().pending_bytes, log.statistics().dropped) == (4 * size, 3)
        large = Observed(trace=trace_of(n_tokens=size // 20))  # as large as another one
        alert = decision("alert", Verdict.ALERT)
        await log.append_decision(alert, input_digest=None, observed=large)
        assert log.statistics().dropped == 5
        assert log.statistics().pending_bytes == 0
    assert [record["decision_id"] for record in query(url)] == ["d2", "d3", "alert"]


async def test_block_keeps_to_its_bytes_and_loses_nothing(url: str, decision: MakeDecision) -> None:
    most = 3 * held_bytes(decision("d0"))
    async with open_log(url, queue_bytes=most) as log:
        for number in range(40):
            await log.append_decision(decision(f"d{number}"), input_digest=None)
            assert 0 < log.statistics().pending_bytes <= most
    assert verify(url).records == 40
    assert log.statistics().pending_bytes == 0


async def test_a_record_larger_than_the_queue_is_taken_alone(
    url: str, decision: MakeDecision
) -> None:
    async with open_log(url, queue_bytes=1) as log:
        for number in range(3):
            await log.append_decision(decision(f"d{number}"), input_digest=None)
            assert log.statistics().pending == 1
    assert verify(url).records == 3


def test_what_is_held_grows_with_all_that_a_record_is_made_of(decision: MakeDecision) -> None:
    trace = trace_of(n_tokens=100)
    bare = held_bytes(decision("d"))
    traced = held_bytes(decision("d"), Observed(trace=trace))
    with_ids = held_bytes(decision("d"), Observed(trace=trace, token_ids=range(100)))
    texts = ["token" * 100] * 100
    with_texts = held_bytes(decision("d"), Observed(trace=trace, token_ids=range(100), texts=texts))
    assert traced - bare >= trace.logits.nbytes
    assert with_ids - traced >= 100 * 28
    assert with_texts - with_ids >= 100 * 500


async def test_a_failed_checkpoint_is_counted_and_made_again(
    url: str, decision: MakeDecision
) -> None:
    async with open_log(url, checkpoint_seconds=0.2) as log:
        await log.append_decision(decision("d1", Verdict.ALERT), input_digest=None)
        assert log.statistics().uncovered == 1
        with locked(url):
            await until(lambda: log.statistics().checkpoint_failures > 0)
            assert log.statistics().uncovered == 1
        await until(lambda: log.statistics().uncovered == 0)
    (report,) = verify(url).chains
    assert report.checkpoints == 1


async def test_statistics_tell_the_last_checkpoint_also_after_reopening(
    url: str, decision: MakeDecision, tmp_path: Path
) -> None:
    pem, _ = new_signing_key()
    (tmp_path / "signing.pem").write_bytes(pem)
    options: dict[str, Any] = {"checkpoint_records": 2, "clock": lambda: 1_700_000_000.5}
    async with open_log(url, **options) as log:
        assert log.statistics().last_checkpoint_timestamp == 0.0
        for number in range(2):
            await log.append_decision(decision(f"d{number}", Verdict.ALERT), input_digest=None)
        assert log.statistics().uncovered == 0
        assert log.statistics().last_checkpoint_timestamp == 1_700_000_000.5
        assert not log.statistics().last_checkpoint_signed
    signer = load_signer(tmp_path / "signing.pem")
    async with open_log(url, signer=signer, **options) as log:
        await log.append_decision(decision("d2", Verdict.ALERT), input_digest=None)
        assert log.statistics().uncovered == 1
    log = AuditLog.open(url)
    assert log.statistics().last_checkpoint_signed
    assert log.statistics().last_checkpoint_timestamp == 1_700_000_000.5
    await log.close()
