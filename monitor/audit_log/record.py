"""What a decision leaves behind: the body of an audit record, and the bytes that go beside it.

Beside the body lie, from level scores on, the scores of every token (`trace`), and from level
tokens on what was read (`sealing`); the body holds their SHA-256, so that the chain covers them. A
caller is stored only as an HMAC under the operator's key, and not at all without one. JSON has no
NaN and no infinity: a number that is not finite is stored as null.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from math import isfinite
from sys import getsizeof

from monitor.audit_log.chain import Json, plain_number
from monitor.audit_log.sealing import KeyRing, pack
from monitor.audit_log.token_latents import TokenLatents, encode_token_latents
from monitor.audit_log.trace import TokenTrace, encode_trace
from monitor.errors import SettingsError
from monitor.records import (
    Alert,
    Anomaly,
    Attribution,
    AuditLevel,
    ClusterResult,
    Decision,
    Mode,
    Provenance,
    Severity,
    StreamUpdate,
    Timings,
    Verdict,
)
from monitor.work_queue import Priority

BODY_VERSION = 2
MIN_HASH_KEY_BYTES = 16
"""Below this a caller's name can be found by trying keys."""

ENVELOPE_KEYS = frozenset(
    {"chain", "decision_id", "kind", "sequence", "time", "time_us", "verdict", "version"}
)


_SEALED_LEVELS = (AuditLevel.TOKENS, AuditLevel.CONTENT)
_SCORED_LEVELS = (AuditLevel.SCORES, *_SEALED_LEVELS)
_TIMINGS = tuple((field.name.removesuffix("_seconds"), field.name) for field in fields(Timings))
_SEVERITIES = tuple(Severity)

# What CPython takes for the parts of a decision with those of its record, rounded up.
_OUTCOME_BYTES = 4096
_CLUSTER_BYTES = 1024
_LATENT_BYTES = 512
_POSITION_BYTES = 40
_STAGE_BYTES = 8
_TOKEN_BYTES = 40


class RecordKind(StrEnum):
    """What a record speaks of; server_* and cluster_* carry no decision_id and no verdict."""

    DECISION = "decision"
    """The one final answer to a request or a stream."""
    STREAM_ALERT = "stream_alert"
    """An alert that left inside a stream, ahead of the stream's decision of the same id."""
    SERVER_START = "server_start"
    SERVER_STOP = "server_stop"
    CLUSTER_STALE = "cluster_stale"
    """A cluster left its bounds, or is back within them."""


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
    trace: bytes | None = None
    """Stored beside the body, which has its SHA-256; see `trace`."""
    sealed: bytes | None = None
    """The same; see `sealing`."""
    plain: bool = False
    """Whether the content is known to be what `chain.canonical_bytes` calls plain."""

    def __post_init__(self) -> None:
        if not ENVELOPE_KEYS.isdisjoint(self.content):
            taken = sorted(ENVELOPE_KEYS & self.content.keys())
            raise ValueError(f"content holds {taken}, which belong to the envelope")

    def body(self, chain: str, sequence: int) -> dict[str, Json]:
        """The whole JSON object as it is hashed at this place in the chain."""
        return {
            **self.content,
            "chain": chain,
            "decision_id": self.decision_id,
            "kind": self.kind._value_,
            "sequence": sequence,
            "time": iso_time(self.time_us),
            "time_us": self.time_us,
            "verdict": None if self.verdict is None else self.verdict._value_,
            "version": BODY_VERSION,
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observed:
    """What a decision was made from; how much of it is stored is the level's to say."""

    trace: TokenTrace
    token_ids: Sequence[int] | None = None
    """None where they are not known."""
    texts: Sequence[str] = ()
    """Each token's own text; needed at level content only."""
    latents: Mapping[str, TokenLatents] = field(default_factory=dict)
    """By cluster, of those in `explained_at`: the latents of the tokens that made its score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How a request or stream came."""

    stage: str
    """prompt or completion, or chat for a request of both."""
    priority: Priority
    """In the engine's queue; of a stream, that of its own tokens."""


def explained_at(level: AuditLevel, clusters: Sequence[ClusterResult]) -> list[str]:
    """The clusters whose tokens' latents are stored at a level."""
    if level.rank < AuditLevel.SCORES.rank:
        return []
    least = Verdict.FLAG if level in _SEALED_LEVELS else Verdict.ALERT
    return [result.cluster for result in clusters if result.verdict.rank >= least.rank]


def parse_level(name: str) -> AuditLevel:
    """The level of this name, or SettingsError."""
    try:
        return AuditLevel(name)
    except ValueError:
        raise SettingsError(
            f"audit level: found {name!r}, expected one of {', '.join(AuditLevel)}"
        ) from None


def check_hash_key(key: bytes | None) -> None:
    """SettingsError when the key is too short to hide anything."""
    if key is not None and len(key) < MIN_HASH_KEY_BYTES:
        raise SettingsError(
            f"audit hash key: found {len(key)} bytes, expected at least {MIN_HASH_KEY_BYTES}"
        )


def caller_hash(key: bytes, caller: str) -> str:
    """How a caller is stored: HMAC-SHA256 of the name's UTF-8, in hexadecimal."""
    return hmac.new(key, caller.encode(), hashlib.sha256).hexdigest()


def iso_time(time_us: int) -> str:
    """UTC with microseconds, as 2026-11-22T10:00:00.000000Z."""
    seconds, microseconds = divmod(time_us, 1_000_000)
    return f"{_iso_second(seconds)}.{microseconds:06d}Z"


@lru_cache(maxsize=64)
def _iso_second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()[:19]


def held_bytes(outcome: Decision | StreamUpdate, observed: Observed | None = None) -> int:
    """About what an outcome keeps in memory until its record is made and stored, bytes."""
    n_bytes = _OUTCOME_BYTES + _CLUSTER_BYTES * len(outcome.clusters)
    for result in outcome.clusters:
        if result.attribution is not None:
            for latent in result.attribution.latents:
                n_bytes += _LATENT_BYTES + _POSITION_BYTES * len(latent.positions)
    if observed is not None:
        n_bytes += observed.trace.logits.nbytes + _STAGE_BYTES * len(observed.trace.stages)
        n_bytes += _TOKEN_BYTES * len(observed.token_ids or ())
        n_bytes += sum(map(getsizeof, observed.texts))
    return n_bytes


def decision_record(
    decision: Decision,
    *,
    level: AuditLevel,
    time_us: int,
    input_digest: str | None,
    caller: str | None = None,
    hash_key: bytes | None = None,
    observed: Observed | None = None,
    asked: Asked | None = None,
    keys: KeyRing | None = None,
) -> AuditRecord:
    """A decision as it is stored at a level above none.

    Args:
        input_digest: the SHA-256 of the token ids that were scored, in hexadecimal; None where
            activations were given without ids. That they were given is in the provenance's backend.
        hash_key: hashes the caller; and the input's digest, which could otherwise be found by
            trying likely texts.
        keys: what seals; without them the levels above scores are stored in the clear.
    """
    content = _outcome_body(decision, decision.alerts, level)
    content |= {
        "policy": decision.policy,
        "mode": decision.mode._value_,
        "rules": [
            {"rule": rule.rule, "severity": rule.severity._value_} for rule in decision.rules
        ],
        "timings_us": {
            name: _microseconds(getattr(decision.timings, field)) for name, field in _TIMINGS
        },
        "provenance": _provenance_body(decision.provenance),
    }
    if asked is not None:
        content["asked"] = {"stage": asked.stage, "priority": asked.priority.name.lower()}
    if level in _SCORED_LEVELS:
        content["anomaly"] = _anomaly_body(decision.anomaly)
    if hash_key is None:
        content["input_digest"] = input_digest
    else:
        content["input_hmac"] = (
            None
            if input_digest is None
            else hmac.new(hash_key, bytes.fromhex(input_digest), hashlib.sha256).hexdigest()
        )
        if caller is not None:
            content["caller_hmac"] = caller_hash(hash_key, caller)
    trace = sealed = None
    if observed is not None and level in _SCORED_LEVELS:
        trace = encode_trace(observed.trace)
        content["trace"] = _beside(trace)
        explained = explained_at(level, decision.clusters)
        content["token_latents"] = {
            cluster: encode_token_latents(found)
            for cluster, found in observed.latents.items()
            if cluster in explained
        }
    if observed is not None and observed.token_ids is not None and level in _SEALED_LEVELS:
        value: dict[str, Json] = {"token_ids": list(observed.token_ids)}
        if level is AuditLevel.CONTENT:
            value["texts"] = list(observed.texts)
        sealed = pack(value) if keys is None else keys.seal(value, decision.decision_id)
        key = None if keys is None else keys.active
        content["sealed"] = {**_beside(sealed), "holds": level.value, "key": key}
    return AuditRecord(
        kind=RecordKind.DECISION,
        time_us=time_us,
        decision_id=decision.decision_id,
        verdict=decision.verdict,
        content=content,
        trace=trace,
        sealed=sealed,
        plain=True,
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
    """What a stream's caller was told when it alerted; the tokens are in the stream's decision."""
    content = _outcome_body(update, update.new_alerts, level)
    content |= {
        "policy": policy,
        "mode": mode.value,
        "processed_index": update.processed_index,
        "provenance": _provenance_body(provenance),
    }
    return AuditRecord(
        kind=RecordKind.STREAM_ALERT,
        time_us=time_us,
        decision_id=update.decision_id,
        verdict=update.verdict,
        content=content,
        plain=True,
    )


def _outcome_body(
    outcome: Decision | StreamUpdate, alerts: Sequence[Alert], level: AuditLevel
) -> dict[str, Json]:
    # `_value_` is the plain string of a member; `.value` runs a property's code for each.
    with_scores = level in _SCORED_LEVELS
    severity = _gravest(outcome, alerts)
    cluster_body = _scored_cluster if with_scores else _cluster
    body: dict[str, Json] = {
        "level": level._value_,
        "severity": None if severity is None else severity._value_,
        "action": outcome.action._value_,
        "session_id": outcome.session_id,
        "clusters": {result.cluster: cluster_body(result) for result in outcome.clusters},
        "alerts": [_alert_body(alert, with_scores) for alert in alerts],
        "coverage": {
            "received": outcome.coverage.received,
            "scored": outcome.coverage.scored,
            "unscored": {
                reason._value_: count for reason, count in outcome.coverage.unscored.items()
            },
        },
    }
    if with_scores:
        body["overall"] = {
            "fused": plain_number(outcome.overall.fused),
            "dense": plain_number(outcome.overall.dense),
            "sae": plain_number(outcome.overall.sae),
        }
    return body


def _gravest(outcome: Decision | StreamUpdate, alerts: Sequence[Alert]) -> Severity | None:
    """The gravest severity of what flagged or alerted; None where nothing did."""
    raised = [alert.severity for alert in alerts]
    raised += [c.severity for c in outcome.clusters if c.verdict is not Verdict.PASS]
    if isinstance(outcome, Decision):
        raised += [rule.severity for rule in outcome.rules]
    return max(raised, key=_SEVERITIES.index, default=None)


def _beside(stored: bytes) -> dict[str, Json]:
    return {"bytes": len(stored), "sha256": hashlib.sha256(stored).hexdigest()}


def _alert_body(alert: Alert, with_scores: bool) -> dict[str, Json]:
    body: dict[str, Json] = {
        "cluster": alert.cluster,
        "severity": alert.severity._value_,
        "stage": alert.stage,
        "position": alert.position,
    }
    if with_scores:
        body["score"] = plain_number(alert.score)
    return body


def _cluster(result: ClusterResult) -> dict[str, Json]:
    body: dict[str, Json] = {
        "verdict": result.verdict._value_,
        "severity": result.severity._value_,
        "stage": result.stage,
        "first_crossing": result.first_crossing,
        "calibrated": result.calibrated,
    }
    if result.stale:
        body["stale"] = True
    return body


def _scored_cluster(result: ClusterResult) -> dict[str, Json]:
    body = _cluster(result)
    body["fused"] = plain_number(result.fused)
    body["dense"] = plain_number(result.dense)
    body["sae"] = plain_number(result.sae)
    body["benign_p"] = plain_number(result.benign_p)
    if result.attribution is not None and result.verdict is Verdict.ALERT:
        body["attribution"] = _attribution_body(result.attribution)
    return body


def _anomaly_body(anomaly: Anomaly | None) -> dict[str, Json] | None:
    if anomaly is None:
        return None
    return {field.name: plain_number(getattr(anomaly, field.name)) for field in fields(anomaly)}


def _attribution_body(attribution: Attribution) -> dict[str, Json]:
    return {
        "latents": [
            {
                "sae": latent.sae,
                "latent_id": latent.latent_id,
                "label": latent.label,
                "contribution": plain_number(latent.contribution),
                "positions": latent.positions,
            }
            for latent in attribution.latents
        ],
        "dense": plain_number(attribution.dense),
        "bias": plain_number(attribution.bias),
        "gate": plain_number(attribution.gate),
        "window_start": attribution.window_start,
        "window_stop": attribution.window_stop,
    }


@lru_cache(maxsize=64)
def _provenance_body(provenance: Provenance) -> Mapping[str, Json]:
    """Shared by the records of one server, so nobody may change it."""
    return {field.name: getattr(provenance, field.name) for field in fields(provenance)}


def _microseconds(seconds: float) -> int | None:
    return round(seconds * 1e6) if isfinite(seconds) else None
