"""What each level leaves in the database, and what it does not."""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from monitor.audit_log.query import query, sealed_of, trace_of
from monitor.audit_log.record import Observed
from monitor.audit_log.schema import database_path
from monitor.audit_log.sealing import KeyRing, new_key
from monitor.audit_log.trace import TokenTrace
from monitor.audit_log.verify import verify
from monitor.audit_log.writer import AuditLog
from monitor.errors import AuditError
from monitor.records import AuditLevel, Decision, Stage, Verdict

MakeDecision = Callable[..., Decision]

OBSERVED = Observed(
    trace=TokenTrace(
        clusters=("weapons", "fraud"),
        stages=(None, Stage.PROMPT),
        logits=np.array([[[np.nan] * 3] * 2, [[1.5, 0.5, 1.0], [-2.0, -1.0, -1.0]]], np.float32),
    ),
    token_ids=[2, 987654],
    texts=["<bos>", "SECRETWORD"],
)


async def write(
    url: str, decision: Decision, *, policy_level: AuditLevel | None = None, **options: Any
) -> int | None:
    log = AuditLog.open(url, **options)
    log.start()
    try:
        return await log.append_decision(
            decision,
            input_digest="e" * 64,
            caller="alice",
            observed=OBSERVED,
            level=policy_level,
        )
    finally:
        await log.close()


@pytest.mark.parametrize(
    ("server", "policy", "stored"),
    [
        ("scores", None, "scores"),
        ("scores", "content", "scores"),
        ("content", "metadata", "metadata"),
        ("content", "tokens", "tokens"),
        ("metadata", "scores", "metadata"),
    ],
)
async def test_a_policy_s_level_holds_up_to_the_server_s(
    url: str, decision: MakeDecision, server: str, policy: str | None, stored: str
) -> None:
    level = None if policy is None else AuditLevel(policy)
    await write(url, decision("d1"), level=server, policy_level=level)
    (record,) = query(url)
    assert record["level"] == stored
    assert ("trace" in record) is (stored != "metadata")
    assert ("sealed" in record) is (stored in ("tokens", "content"))
    assert verify(url).records == 1


async def test_a_policy_of_level_none_leaves_nothing_not_even_an_alert(
    url: str, decision: MakeDecision
) -> None:
    found = await write(url, decision("d1", Verdict.ALERT), policy_level=AuditLevel.NONE)
    assert found is None
    assert verify(url).records == 0


async def test_the_trace_comes_back(url: str, decision: MakeDecision) -> None:
    await write(url, decision("d1"))
    decoded = trace_of(url, "d1")
    assert decoded is not None
    assert decoded.trace.clusters == ("weapons", "fraud")
    assert decoded.trace.stages == (None, Stage.PROMPT)
    assert decoded.trace.logits[1].tolist() == [[1.5, 0.5, 1.0], [-2.0, -1.0, -1.0]]
    assert np.isnan(decoded.trace.logits[0]).all()


@pytest.mark.parametrize("level", ["tokens", "content"])
async def test_sealed_levels_leave_no_readable_word_and_open_with_the_key(
    url: str, decision: MakeDecision, level: str
) -> None:
    ring = KeyRing.parse(new_key("2026"), "test")
    await write(url, decision("d1", Verdict.ALERT), level=level, keys=ring)
    assert b"SECRETWORD" not in database_path(url).read_bytes()
    (record,) = query(url)
    assert (record["sealed"]["key"], record["sealed"]["holds"]) == ("2026", level)
    opened = sealed_of(url, "d1", ring)
    assert opened["token_ids"] == [2, 987654]
    assert opened.get("texts") == (["<bos>", "SECRETWORD"] if level == "content" else None)


async def test_without_the_key_the_record_is_unreadable_and_the_chain_verifies(
    url: str, decision: MakeDecision
) -> None:
    await write(url, decision("d1"), level="tokens", keys=KeyRing.parse(new_key("old"), "test"))
    rest = KeyRing.parse(new_key("new"), "test")
    with pytest.raises(AuditError, match="sealed under key 'old'"):
        sealed_of(url, "d1", rest)
    with pytest.raises(AuditError, match="sealed under key 'old', expected a key ring"):
        sealed_of(url, "d1", None)
    assert verify(url).records == 1


async def test_in_the_clear_the_record_says_so(url: str, decision: MakeDecision) -> None:
    await write(url, decision("d1"), level="tokens")
    (record,) = query(url)
    assert record["sealed"]["key"] is None
    assert sealed_of(url, "d1", None) == {"token_ids": [2, 987654]}


async def test_a_hash_key_hides_caller_and_input(url: str, decision: MakeDecision) -> None:
    key = b"k" * 16
    await write(url, decision("d1"), hash_key=key)
    (record,) = query(url)
    assert record["caller_hmac"] == hmac.new(key, b"alice", hashlib.sha256).hexdigest()
    digest = bytes.fromhex("e" * 64)
    assert record["input_hmac"] == hmac.new(key, digest, hashlib.sha256).hexdigest()
    assert "input_digest" not in record
    assert b"alice" not in database_path(url).read_bytes()


@pytest.mark.parametrize("column", ["trace", "sealed", "severity", "caller_hmac"])
async def test_a_change_beside_the_body_is_found(
    url: str, decision: MakeDecision, column: str
) -> None:
    await write(url, decision("d1", Verdict.ALERT), level="tokens", hash_key=b"k" * 16)
    for value in ("NULL", "CAST('x' AS BLOB)" if column in ("trace", "sealed") else "'x'"):
        connection = sqlite3.connect(database_path(url))
        before = connection.execute(f"SELECT {column} FROM audit_records").fetchone()
        connection.execute(f"UPDATE audit_records SET {column} = {value}")
        connection.commit()
        with pytest.raises(AuditError, match=f"record 1 .*column {column}"):
            verify(url)
        connection.execute(f"UPDATE audit_records SET {column} = ?", before)
        connection.commit()
        connection.close()
    assert verify(url).records == 1


async def test_the_gravest_severity_of_what_was_raised_is_stored(
    url: str, decision: MakeDecision
) -> None:
    await write(url, decision("d1", Verdict.FLAG))
    await write(url, decision("d2"))
    assert [record["severity"] for record in query(url)] == ["critical", None]
