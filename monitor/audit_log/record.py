"""What a decision leaves behind: levels, and the body of an audit record.

No level of this version stores text or token ids. A caller is stored only as an HMAC under the
operator's key, and not at all without one. JSON has no NaN and no infinity: a number that is not
finite is stored as null.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from monitor.audit_log.chain import Json
from monitor.errors import SettingsError
from monitor.records import (
    Alert,
    Attribution,
    ClusterResult,
    Decision,
    Mode,
    Provenance,
    StreamUpdate,
    Timings,
    Verdict,
)

BODY_VERSION = 1
MIN_CALLER_KEY_BYTES = 16
"""Below this a caller's name can be found by trying keys."""

ENVELOPE_KEYS = frozenset(
    {"chain", "decision_id", "kind", "sequence", "time", "time_us", "verdict", "version"}
)


class AuditLevel(StrEnum):
    """How much of a decision is stored."""

    NONE = "none"
    METADATA = "metadata"
    """Who, when, which versions, verdicts, counts and timings; no scores."""
    SCORES = "scores"
    """And every score, and the attribution of what alerted."""


class RecordKind(StrEnum):
    """What a record speaks of; server_* carry no decision_id and no verdict."""

    DECISION = "decision"
    """The one final answer to a request or a stream."""
    STREAM_ALERT = "stream_alert"
    """An alert that left inside a stream, ahead of the stream's decision of the same id."""
    SERVER_START = "server_start"
    SERVER_STOP = "server_stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """One thing to store; it gets its sequence number when it is committed."""

    kind: RecordKind
    time_us: int
    """Microseconds since 1970 UTC."""
    decision_id: str | None = None
    verdict: Verdict | None = None
    content: Mapping[str, Json]
    """The rest of the body, beside the envelope's own keys."""

    def __post_init__(self) -> None:
        taken = ENVELOPE_KEYS & self.content.keys()
        if taken:
            raise ValueError(f"content holds {sorted(taken)}, which belong to the envelope")

    def body(self, chain: str, sequence: int) -> dict[str, Json]:
        """The whole JSON object as it is hashed at this place in the chain."""
        return {
            **self.content,
            "chain": chain,
            "decision_id": self.decision_id,
            "kind": self.kind.value,
            "sequence": sequence,
            "time": iso_time(self.time_us),
            "time_us": self.time_us,
            "verdict": None if self.verdict is None else self.verdict.value,
            "version": BODY_VERSION,
        }


def parse_level(name: str) -> AuditLevel:
    """The level of this name; SettingsError for those that hold text and so need encryption."""
    if name in ("tokens", "content"):
        raise SettingsError(
            f"audit level: found {name!r}, which stores what people wrote and arrives together "
            "with encryption; expected none, metadata or scores"
        )
    try:
        return AuditLevel(name)
    except ValueError:
        raise SettingsError(
            f"audit level: found {name!r}, expected none, metadata or scores"
        ) from None


def check_caller_key(key: bytes | None) -> None:
    """SettingsError when the key is too short to hide anything."""
    if key is not None and len(key) < MIN_CALLER_KEY_BYTES:
        raise SettingsError(
            f"audit caller key: found {len(key)} bytes, expected at least {MIN_CALLER_KEY_BYTES}"
        )


def iso_time(time_us: int) -> str:
    """UTC with microseconds, as 2026-11-22T10:00:00.000000Z."""
    seconds, microseconds = divmod(time_us, 1_000_000)
    moment = datetime.fromtimestamp(seconds, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{microseconds:06d}Z"


def decision_record(
    decision: Decision,
    *,
    level: AuditLevel,
    time_us: int,
    input_digest: str | None,
    caller: str | None = None,
    caller_key: bytes | None = None,
) -> AuditRecord:
    """A decision as it is stored at METADATA or SCORES.

    `input_digest` is the SHA-256 of the token ids that were scored, in hexadecimal; None where
    activations were given without ids. That they were given is in the provenance's backend.
    """
    content = _outcome_body(decision, decision.alerts, level)
    content |= {
        "policy": decision.policy,
        "mode": decision.mode.value,
        "rules": [{"rule": rule.rule, "severity": rule.severity.value} for rule in decision.rules],
        "timings_us": {
            name.removesuffix("_seconds"): _microseconds(seconds)
            for name, seconds in _fields(decision.timings).items()
        },
        "provenance": _fields(decision.provenance),
        "input_digest": input_digest,
    }
    if caller is not None and caller_key is not None:
        content["caller_hmac"] = hmac.new(caller_key, caller.encode(), hashlib.sha256).hexdigest()
    return AuditRecord(
        kind=RecordKind.DECISION,
        time_us=time_us,
        decision_id=decision.decision_id,
        verdict=decision.verdict,
        content=content,
    )


def stream_alert_record(
    update: StreamUpdate,
    *,
    level: AuditLevel,
    time_us: int,
    policy: str,
    mode: Mode,
    provenance: Provenance,
) -> AuditRecord:
    """What a stream's caller was told when it alerted, as it is stored at METADATA or SCORES."""
    content = _outcome_body(update, update.new_alerts, level)
    content |= {
        "policy": policy,
        "mode": mode.value,
        "processed_index": update.processed_index,
        "provenance": _fields(provenance),
    }
    return AuditRecord(
        kind=RecordKind.STREAM_ALERT,
        time_us=time_us,
        decision_id=update.decision_id,
        verdict=update.verdict,
        content=content,
    )


def _outcome_body(
    outcome: Decision | StreamUpdate, alerts: Sequence[Alert], level: AuditLevel
) -> dict[str, Json]:
    with_scores = level is AuditLevel.SCORES
    body: dict[str, Json] = {
        "level": level.value,
        "action": outcome.action.value,
        "session_id": outcome.session_id,
        "clusters": {
            result.cluster: _cluster_body(result, with_scores) for result in outcome.clusters
        },
        "alerts": [
            {
                "cluster": alert.cluster,
                "severity": alert.severity.value,
                "stage": None if alert.stage is None else alert.stage.value,
                "position": alert.position,
                **({"score": _number(alert.score)} if with_scores else {}),
            }
            for alert in alerts
        ],
        "coverage": {
            "received": outcome.coverage.received,
            "scored": outcome.coverage.scored,
            "unscored": {
                reason.value: count for reason, count in outcome.coverage.unscored.items()
            },
        },
    }
    if with_scores:
        body["overall"] = {
            "fused": _number(outcome.overall.fused),
            "dense": _number(outcome.overall.dense),
            "sae": _number(outcome.overall.sae),
        }
    return body


def _cluster_body(result: ClusterResult, with_scores: bool) -> dict[str, Json]:
    body: dict[str, Json] = {
        "verdict": result.verdict.value,
        "severity": result.severity.value,
        "stage": None if result.stage is None else result.stage.value,
        "first_crossing": result.first_crossing,
        "calibrated": result.calibrated,
    }
    if with_scores:
        body["fused"] = _number(result.fused)
        body["dense"] = _number(result.dense)
        body["sae"] = _number(result.sae)
        body["benign_p"] = _number(result.benign_p)
        if result.verdict is Verdict.ALERT and result.attribution is not None:
            body["attribution"] = _attribution_body(result.attribution)
    return body


def _attribution_body(attribution: Attribution) -> dict[str, Json]:
    return {
        "latents": [
            {
                "sae": latent.sae,
                "latent_id": latent.latent_id,
                "label": latent.label,
                "contribution": _number(latent.contribution),
                "positions": latent.positions,
            }
            for latent in attribution.latents
        ],
        "dense": _number(attribution.dense),
        "bias": _number(attribution.bias),
        "gate": _number(attribution.gate),
        "window_start": attribution.window_start,
        "window_stop": attribution.window_stop,
    }


def _fields(record: Timings | Provenance) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _number(value: float | None) -> float | int | None:
    """A number as JSON has it: whole ones as integers, which RFC 8785 writes alike."""
    if value is None or not math.isfinite(value):
        return None
    number = float(value)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _microseconds(seconds: float) -> int | None:
    return round(seconds * 1e6) if math.isfinite(seconds) else None
