from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from monitor.audit_log.chain import canonical_bytes
from monitor.audit_log.record import (
    AuditRecord,
    RecordKind,
    check_hash_key,
    decision_record,
    iso_time,
    parse_level,
    stream_alert_record,
)
from monitor.errors import SettingsError
from monitor.records import AuditLevel, Decision, Mode, StreamUpdate, Verdict

MakeDecision = Callable[..., Decision]


def body_of(decision: Decision, level: AuditLevel, **options: Any) -> dict[str, Any]:
    options = {"input_digest": "e" * 64, **options}
    record = decision_record(decision, level=level, time_us=1_795_341_600_000_001, **options)
    return dict(json.loads(canonical_bytes(record.body("main", 3))))


def test_scores_level_holds_what_a_decision_says(decision: MakeDecision) -> None:
    body = body_of(decision("d1", Verdict.ALERT, 3.5), AuditLevel.SCORES)
    assert body["decision_id"] == "d1"
    assert (body["chain"], body["sequence"], body["kind"]) == ("main", 3, "decision")
    assert (body["verdict"], body["action"], body["mode"]) == ("alert", "flag", "monitor")
    assert body["time"] == "2026-11-22T10:00:00.000001Z"
    assert body["overall"] == {"fused": 3.5, "dense": 0.5, "sae": -0.125}
    weapons = body["clusters"]["weapons"]
    assert (weapons["fused"], weapons["first_crossing"], weapons["benign_p"]) == (3.5, 4, 0.01)
    assert body["alerts"][0]["score"] == 3.5
    assert body["coverage"] == {"received": 9, "scored": 8, "unscored": {"excluded": 1}}
    assert body["timings_us"]["forward"] == 12_500
    assert body["provenance"]["bundle_digest"] == "c" * 64
    assert body["input_digest"] == "e" * 64
    assert body["session_id"] == "session-1"


def test_attribution_is_stored_for_what_alerted_and_nothing_else(decision: MakeDecision) -> None:
    body = body_of(decision("d1", Verdict.ALERT), AuditLevel.SCORES)
    latent = body["clusters"]["weapons"]["attribution"]["latents"][0]
    assert (latent["latent_id"], latent["contribution"]) == (7, 2.5)
    assert "attribution" not in body["clusters"]["fraud"]
    flagged = body_of(decision("d1", Verdict.FLAG), AuditLevel.SCORES)
    assert "attribution" not in flagged["clusters"]["weapons"]


def test_metadata_level_holds_no_score(decision: MakeDecision) -> None:
    body = body_of(decision("d1", Verdict.ALERT, 3.4375), AuditLevel.METADATA)
    assert "overall" not in body
    assert set(body["clusters"]["weapons"]) == {
        *("verdict", "severity", "stage", "first_crossing", "calibrated")
    }
    assert "3.4375" not in json.dumps(body)


@pytest.mark.parametrize("level", [AuditLevel.METADATA, AuditLevel.SCORES])
def test_no_level_holds_text_or_token_ids(decision: MakeDecision, level: AuditLevel) -> None:
    body = json.dumps(body_of(decision("d1", Verdict.ALERT), level))
    assert "SECRETWORD" not in body
    assert "987654" not in body


def test_the_caller_is_stored_only_as_a_keyed_hash(decision: MakeDecision) -> None:
    key = b"k" * 16
    body = body_of(decision("d1"), AuditLevel.SCORES, caller="alice@example.org", hash_key=key)
    expected = hmac.new(key, b"alice@example.org", hashlib.sha256).hexdigest()
    assert body["caller_hmac"] == expected
    assert "alice" not in json.dumps(body)
    without = body_of(decision("d1"), AuditLevel.SCORES, caller="alice@example.org")
    assert "caller_hmac" not in without
    assert "alice" not in json.dumps(without)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_are_stored_as_null(decision: MakeDecision, value: float) -> None:
    body = body_of(decision("d1", Verdict.ALERT, value), AuditLevel.SCORES)
    assert body["clusters"]["weapons"]["fused"] is None
    assert body["overall"]["fused"] is None
    assert body["alerts"][0]["score"] is None


@pytest.mark.parametrize("value", [0.1, 3.4000000953674316, 1e-9, -7.0, 2.0**60, 5e-324])
def test_scores_come_back_as_the_same_double(decision: MakeDecision, value: float) -> None:
    body = body_of(decision("d1", Verdict.ALERT, value), AuditLevel.SCORES)
    assert float(body["clusters"]["weapons"]["fused"]) == value


def test_a_stream_alert_says_what_its_caller_was_told(decision: MakeDecision) -> None:
    done = decision("d1", Verdict.ALERT, 3.5)
    update = StreamUpdate(
        decision_id="d1",
        session_id="session-1",
        start_index=4,
        processed_index=9,
        verdict=done.verdict,
        action=done.action,
        overall=done.overall,
        clusters=done.clusters,
        new_alerts=done.alerts,
        tokens=done.tokens,
        coverage=done.coverage,
    )
    record = stream_alert_record(
        update,
        level=AuditLevel.SCORES,
        time_us=1,
        policy="default",
        mode=Mode.MONITOR,
        provenance=done.provenance,
    )
    body = json.loads(canonical_bytes(record.body("main", 1)))
    assert (body["kind"], body["decision_id"], body["verdict"]) == ("stream_alert", "d1", "alert")
    assert body["processed_index"] == 9
    assert body["alerts"][0]["cluster"] == "weapons"
    assert "SECRETWORD" not in json.dumps(body)


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(
        SettingsError, match="'everything', expected one of none, metadata, scores, tokens, content"
    ):
        parse_level("everything")


def test_a_short_hash_key_is_refused() -> None:
    with pytest.raises(SettingsError, match="found 4 bytes, expected at least 16"):
        check_hash_key(b"1234")


def test_content_may_not_take_the_envelope_s_keys() -> None:
    with pytest.raises(ValueError, match="sequence"):
        AuditRecord(kind=RecordKind.SERVER_START, time_us=0, content={"sequence": 1})


def test_every_field_of_a_decision_is_stored_or_left_out_on_purpose(
    decision: MakeDecision,
) -> None:
    body = body_of(decision("d1", Verdict.ALERT), AuditLevel.SCORES)
    left_out = {"tokens", "sequence", "timings"}
    fields = {field.name for field in dataclasses.fields(Decision)}
    assert fields - body.keys() - left_out == set()


def test_iso_time_before_1970_and_at_a_whole_second() -> None:
    assert iso_time(0) == "1970-01-01T00:00:00.000000Z"
    assert iso_time(-1) == "1969-12-31T23:59:59.999999Z"
