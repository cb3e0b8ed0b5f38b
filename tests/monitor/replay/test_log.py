from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import create_engine, text

from monitor.audit_log.query import Filter
from monitor.audit_log.record import Observed, RecordKind
from monitor.audit_log.sealing import KeyRing, new_key
from monitor.audit_log.trace import TokenTrace
from monitor.audit_log.writer import AuditLog
from monitor.errors import SettingsError
from monitor.records import Alert, AuditLevel, Decision, Mode, ScoreRequest, Stage, StreamUpdate
from monitor.replay.log import LogInput
from monitor.replay.rows import ReplayRow, Unreadable

Make = Callable[..., Any]

TRACE = TokenTrace(
    clusters=("a",),
    stages=(None, Stage.PROMPT, Stage.COMPLETION),
    logits=np.zeros((3, 1, 3), np.float32),
)


class Log:
    """A log with one server start, and decisions as a test wants them."""

    def __init__(self, folder: Path, make_record: Make) -> None:
        self.url = f"sqlite:///{folder / 'audit.db'}"
        self.keys = folder / "keys"
        self.keys.write_text(new_key("k") + "\n")
        self._make = make_record
        self._n = 0

    async def open(self, level: str = "tokens", *, sealed: bool = True) -> AuditLog:
        ring = KeyRing.parse(self.keys.read_text(), "test") if sealed else None
        log = AuditLog.open(self.url, level=level, keys=ring, clock=lambda: 1e9 + self._n)
        log.start()
        return log

    async def decide(self, log: AuditLog, ids: list[int] | None, **changes: Any) -> str:
        self._n += 1
        decision = replace(
            self._make(Decision, 3), decision_id=f"d{self._n}", alerts=(), tokens=(), **changes
        )
        observed = Observed(trace=TRACE, token_ids=ids)
        await log.append_decision(decision, input_digest=None, observed=observed)
        return decision.decision_id

    def rows(self, part_rows: int = 2, **fields: Any) -> list[ReplayRow]:
        source = LogInput(self.url, **{"keys_file": self.keys, **fields})
        survey = source.survey(part_rows, lambda what, share: None)
        found = [
            row for start, n in survey.starts for row in source.rows(start, n, policy="unused")
        ]
        assert len(found) == survey.identity["rows"]
        return found


@pytest.fixture
def log(tmp_path: Path, make_record: Make) -> Log:
    return Log(tmp_path, make_record)


def reasons(rows: list[ReplayRow]) -> list[str]:
    return [r.request.reason if isinstance(r.request, Unreadable) else "" for r in rows]


async def test_a_row_is_the_tokens_as_they_were_scored(log: Log) -> None:
    writer = await log.open()
    await writer.append_event(RecordKind.SERVER_START, {"bundle_digest": "other", "torch": "1"})
    first = await log.decide(writer, [2, 3, 4])
    digest = log._make(Decision, 3).provenance.bundle_digest
    await writer.append_event(RecordKind.SERVER_START, {"bundle_digest": digest, "torch": "2"})
    await log.decide(writer, [2, 3, 5])
    await writer.close()
    rows = log.rows(part_rows=1)
    provenance = log._make(Decision, 3).provenance
    assert rows[0].request == ScoreRequest(
        token_ids=(2, 3, 4),
        tokenizer_fingerprint=provenance.tokenizer_fingerprint,
        policy=log._make(Decision, 3).policy,
    )
    assert rows[0].stages == TRACE.stages
    assert (rows[0].source, rows[0].place, rows[0].id) == ("main", 2, first)
    # Only the start of a server of the same bundle says what the record does not.
    found = [row.original.facts.get("torch") for row in rows if row.original is not None]
    assert found == [None, "2"]


async def test_what_cannot_be_had_says_why(log: Log, tmp_path: Path) -> None:
    for level in ("metadata", "scores", "tokens"):
        writer = await log.open(level)
        await log.decide(writer, [2, 3, 4])
        await writer.close()
    writer = await log.open("content", sealed=False)
    await log.decide(writer, [2, 3, 4])
    await log.decide(writer, None)
    await log.decide(writer, [])
    await writer.close()
    assert reasons(log.rows()) == [
        *("level metadata", "level scores", "", "", "no token ids", "no tokens")
    ]
    assert reasons(log.rows(keys_file=None))[2:4] == ["key k", ""]
    log.keys.write_text(new_key("k") + "\n")
    assert reasons(log.rows())[2] == "damaged sealed"
    with pytest.raises(SettingsError, match=r"absent: cannot be read"):
        log.rows(keys_file=tmp_path / "absent")


@pytest.mark.parametrize("column", ["trace", "sealed"])
async def test_bytes_that_are_not_the_records_are_named(log: Log, column: str) -> None:
    writer = await log.open()
    await log.decide(writer, [2, 3, 4])
    await writer.close()
    engine = create_engine(log.url)
    with engine.begin() as connection:
        connection.execute(
            text(f"UPDATE audit_records SET {column} = x'00' WHERE {column} IS NOT NULL")
        )
    engine.dispose()
    assert reasons(log.rows()) == [f"damaged {column}"]


async def test_a_stream_that_alerted_and_never_ended_is_told(log: Log, make_record: Make) -> None:
    writer = await log.open()
    for stream in ("ended", "lost"):
        update = replace(
            make_record(StreamUpdate, 4),
            decision_id=stream,
            new_alerts=(make_record(Alert, 5),),
        )
        await writer.append_stream_alert(
            update,
            policy="default",
            mode=Mode.MONITOR,
            provenance=make_record(Decision, 3).provenance,
            level=AuditLevel.TOKENS,
        )
    log._n += 1
    ended = replace(make_record(Decision, 3), decision_id="ended", tokens=(), alerts=())
    await writer.append_decision(
        ended, input_digest=None, observed=Observed(trace=TRACE, token_ids=[2, 3, 4])
    )
    await writer.close()
    source = LogInput(log.url, keys_file=log.keys)
    assert source.survey(5, lambda what, share: None).identity["undecided"] == ["lost"]
    early = replace(source, wanted=Filter(until=1e9 + 0.5))  # before the decision of `ended`
    assert early.survey(5, lambda what, share: None).identity["undecided"] == ["lost"]


async def test_an_earlier_survey_pins_what_counts(log: Log) -> None:
    writer = await log.open()
    await log.decide(writer, [2, 3, 4])
    source = LogInput(log.url, keys_file=log.keys)
    await writer.close()
    first = source.survey(5, lambda what, share: None).identity
    writer = await log.open()
    await log.decide(writer, [2, 3, 4])
    await writer.close()
    assert source.survey(5, lambda what, share: None).identity["rows"] == 2
    again = source.pinned(first).survey(5, lambda what, share: None).identity
    assert again == first
