"""What callers get back: decisions, and the replies of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict

from monitor.errors import MonitorError
from monitor.records import (
    Alert,
    Anomaly,
    Attribution,
    ClusterResult,
    Coverage,
    Decision,
    Gap,
    LatentContribution,
    Overall,
    RuleResult,
    StreamUpdate,
    Timings,
    TokenScores,
)
from monitor.rpc.convert import enums
from monitor.rpc.convert.registry import provenance_from_wire, provenance_to_wire
from protos.saemonitor.v1 import monitor_pb2 as pb


def decision_to_wire(decision: Decision) -> pb.Decision:
    """Per-token logits travel as float32, everything else as it is."""
    return pb.Decision(
        decision_id=decision.decision_id,
        verdict=enums.VERDICTS[decision.verdict],
        action=enums.ACTIONS[decision.action],
        mode=enums.MODES[decision.mode],
        policy=decision.policy,
        overall=_overall_to_wire(decision.overall),
        clusters=[_cluster_to_wire(cluster) for cluster in decision.clusters],
        rules=[
            pb.RuleResult(rule=rule.rule, severity=enums.SEVERITIES[rule.severity])
            for rule in decision.rules
        ],
        alerts=[_alert_to_wire(alert) for alert in decision.alerts],
        coverage=_coverage_to_wire(decision.coverage),
        timings=_timings_to_wire(decision.timings),
        provenance=provenance_to_wire(decision.provenance),
        tokens=_tokens_to_wire(decision.tokens),
        anomaly=None if decision.anomaly is None else pb.Anomaly(**asdict(decision.anomaly)),
        session_id=decision.session_id,
        sequence=decision.sequence,
    )


async def decision_to_wire_aside(decision: Decision) -> pb.Decision:
    """As `decision_to_wire`, off the event loop where there are per-token logits."""
    if decision.tokens:
        return await asyncio.to_thread(decision_to_wire, decision)
    return decision_to_wire(decision)


def decision_from_wire(wire: pb.Decision) -> Decision:
    """Raises MonitorError where the server is newer than this client and says what it lacks."""
    return Decision(
        decision_id=wire.decision_id,
        verdict=enums.from_wire(enums.VERDICTS, wire.verdict),
        action=enums.from_wire(enums.ACTIONS, wire.action),
        mode=enums.from_wire(enums.MODES, wire.mode),
        policy=wire.policy,
        overall=_overall_from_wire(wire.overall),
        clusters=tuple(_cluster_from_wire(cluster) for cluster in wire.clusters),
        rules=tuple(
            RuleResult(rule=rule.rule, severity=enums.from_wire(enums.SEVERITIES, rule.severity))
            for rule in wire.rules
        ),
        alerts=tuple(_alert_from_wire(alert) for alert in wire.alerts),
        coverage=_coverage_from_wire(wire.coverage),
        timings=_timings_from_wire(wire.timings),
        provenance=provenance_from_wire(wire.provenance),
        tokens=_tokens_from_wire(wire.tokens, len(wire.clusters)),
        anomaly=_anomaly_from_wire(wire.anomaly) if wire.HasField("anomaly") else None,
        session_id=wire.session_id,
        sequence=wire.sequence if wire.HasField("sequence") else None,
    )


def update_to_wire(update: StreamUpdate) -> pb.ScoreStreamResponse:
    """A `gap` reply where the update has a gap, else a `scores` reply."""
    scores = pb.StreamUpdate(
        decision_id=update.decision_id,
        session_id=update.session_id,
        start_index=update.start_index,
        processed_index=update.processed_index,
        verdict=enums.VERDICTS[update.verdict],
        action=enums.ACTIONS[update.action],
        overall=_overall_to_wire(update.overall),
        clusters=[_cluster_to_wire(cluster) for cluster in update.clusters],
        new_alerts=[_alert_to_wire(alert) for alert in update.new_alerts],
        tokens=_tokens_to_wire(update.tokens),
        coverage=_coverage_to_wire(update.coverage),
    )
    if update.gap is None:
        return pb.ScoreStreamResponse(scores=scores)
    gap = pb.StreamGap(
        start_index=update.gap.start_index,
        stop_index=update.gap.stop_index,
        reason=enums.UNSCORED_REASONS[update.gap.reason],
        message=update.gap.message,
        update=scores,
    )
    return pb.ScoreStreamResponse(gap=gap)


def update_from_wire(wire: pb.ScoreStreamResponse) -> StreamUpdate:
    """The update in a `scores` or `gap` reply; others are MonitorError."""
    kind = wire.WhichOneof("reply")
    if kind == "scores":
        return _scores_from_wire(wire.scores, None)
    if kind == "gap":
        gap = Gap(
            start_index=wire.gap.start_index,
            stop_index=wire.gap.stop_index,
            reason=enums.from_wire(enums.UNSCORED_REASONS, wire.gap.reason),
            message=wire.gap.message,
        )
        return _scores_from_wire(wire.gap.update, gap)
    raise MonitorError(f"stream reply: found {kind or 'none'}, expected scores or gap")


def _scores_from_wire(wire: pb.StreamUpdate, gap: Gap | None) -> StreamUpdate:
    return StreamUpdate(
        decision_id=wire.decision_id,
        session_id=wire.session_id,
        start_index=wire.start_index,
        processed_index=wire.processed_index,
        verdict=enums.from_wire(enums.VERDICTS, wire.verdict),
        action=enums.from_wire(enums.ACTIONS, wire.action),
        overall=_overall_from_wire(wire.overall),
        clusters=tuple(_cluster_from_wire(cluster) for cluster in wire.clusters),
        new_alerts=tuple(_alert_from_wire(alert) for alert in wire.new_alerts),
        tokens=_tokens_from_wire(wire.tokens, len(wire.clusters)),
        coverage=_coverage_from_wire(wire.coverage),
        gap=gap,
    )


def _overall_to_wire(overall: Overall) -> pb.Overall:
    return pb.Overall(fused=overall.fused, dense=overall.dense, sae=overall.sae)


def _overall_from_wire(wire: pb.Overall) -> Overall:
    return Overall(fused=wire.fused, dense=wire.dense, sae=wire.sae)


def _anomaly_from_wire(wire: pb.Anomaly) -> Anomaly:
    return Anomaly(
        registered_l0=wire.registered_l0 if wire.HasField("registered_l0") else None,
        distance=wire.distance if wire.HasField("distance") else None,
        l0=wire.l0 if wire.HasField("l0") else None,
        fvu=wire.fvu if wire.HasField("fvu") else None,
    )


def _cluster_to_wire(cluster: ClusterResult) -> pb.ClusterResult:
    return pb.ClusterResult(
        cluster=cluster.cluster,
        fused=cluster.fused,
        dense=cluster.dense,
        sae=cluster.sae,
        verdict=enums.VERDICTS[cluster.verdict],
        severity=enums.SEVERITIES[cluster.severity],
        stage=enums.stage_to_wire(cluster.stage),
        first_crossing=cluster.first_crossing,
        calibrated=cluster.calibrated,
        benign_p=cluster.benign_p,
        stale=cluster.stale,
        attribution=(
            None if cluster.attribution is None else _attribution_to_wire(cluster.attribution)
        ),
    )


def _cluster_from_wire(wire: pb.ClusterResult) -> ClusterResult:
    return ClusterResult(
        cluster=wire.cluster,
        fused=wire.fused,
        dense=wire.dense,
        sae=wire.sae,
        verdict=enums.from_wire(enums.VERDICTS, wire.verdict),
        severity=enums.from_wire(enums.SEVERITIES, wire.severity),
        stage=enums.stage_from_wire(wire.stage),
        first_crossing=wire.first_crossing if wire.HasField("first_crossing") else None,
        calibrated=wire.calibrated,
        benign_p=wire.benign_p if wire.HasField("benign_p") else None,
        stale=wire.stale,
        attribution=(
            _attribution_from_wire(wire.attribution) if wire.HasField("attribution") else None
        ),
    )


def _attribution_to_wire(attribution: Attribution) -> pb.Attribution:
    return pb.Attribution(
        latents=[
            pb.LatentContribution(
                sae=latent.sae,
                latent_id=latent.latent_id,
                label=latent.label,
                contribution=latent.contribution,
                positions=latent.positions,
            )
            for latent in attribution.latents
        ],
        dense=attribution.dense,
        bias=attribution.bias,
        gate=attribution.gate,
        window_start=attribution.window_start,
        window_stop=attribution.window_stop,
    )


def _attribution_from_wire(wire: pb.Attribution) -> Attribution:
    return Attribution(
        latents=tuple(
            LatentContribution(
                sae=latent.sae,
                latent_id=latent.latent_id,
                label=latent.label,
                contribution=latent.contribution,
                positions=tuple(latent.positions),
            )
            for latent in wire.latents
        ),
        dense=wire.dense,
        bias=wire.bias,
        gate=wire.gate,
        window_start=wire.window_start,
        window_stop=wire.window_stop,
    )


def _alert_to_wire(alert: Alert) -> pb.Alert:
    return pb.Alert(
        decision_id=alert.decision_id,
        cluster=alert.cluster,
        severity=enums.SEVERITIES[alert.severity],
        stage=enums.stage_to_wire(alert.stage),
        score=alert.score,
        position=alert.position,
    )


def _alert_from_wire(wire: pb.Alert) -> Alert:
    return Alert(
        decision_id=wire.decision_id,
        cluster=wire.cluster,
        severity=enums.from_wire(enums.SEVERITIES, wire.severity),
        stage=enums.stage_from_wire(wire.stage),
        score=wire.score,
        position=wire.position if wire.HasField("position") else None,
    )


def _coverage_to_wire(coverage: Coverage) -> pb.Coverage:
    return pb.Coverage(
        received=coverage.received,
        scored=coverage.scored,
        unscored=[
            pb.UnscoredCount(reason=enums.UNSCORED_REASONS[reason], tokens=tokens)
            for reason, tokens in coverage.unscored.items()
        ],
    )


def _coverage_from_wire(wire: pb.Coverage) -> Coverage:
    return Coverage(
        received=wire.received,
        scored=wire.scored,
        unscored={
            enums.from_wire(enums.UNSCORED_REASONS, count.reason): count.tokens
            for count in wire.unscored
        },
    )


def _timings_to_wire(timings: Timings) -> pb.Timings:
    return pb.Timings(
        tokenize_seconds=timings.tokenize_seconds,
        queue_seconds=timings.queue_seconds,
        forward_seconds=timings.forward_seconds,
        encode_seconds=timings.encode_seconds,
        score_seconds=timings.score_seconds,
        audit_seconds=timings.audit_seconds,
        total_seconds=timings.total_seconds,
    )


def _timings_from_wire(wire: pb.Timings) -> Timings:
    return Timings(
        tokenize_seconds=wire.tokenize_seconds,
        queue_seconds=wire.queue_seconds,
        forward_seconds=wire.forward_seconds,
        encode_seconds=wire.encode_seconds,
        score_seconds=wire.score_seconds,
        audit_seconds=wire.audit_seconds,
        total_seconds=wire.total_seconds,
    )


def _tokens_to_wire(tokens: Sequence[TokenScores]) -> pb.TokenScores | None:
    if not tokens:
        return None
    return pb.TokenScores(
        positions=[token.position for token in tokens],
        token_ids=[token.token_id for token in tokens if token.token_id is not None],
        texts=[token.text for token in tokens],
        stages=[enums.stage_to_wire(token.stage) for token in tokens],
        fused=[logit for token in tokens for logit in token.fused],
        dense=[logit for token in tokens for logit in token.dense],
        sae=[logit for token in tokens for logit in token.sae],
    )


def _tokens_from_wire(wire: pb.TokenScores, n_clusters: int) -> tuple[TokenScores, ...]:
    n_tokens = len(wire.positions)
    columns = {
        "token_ids": (len(wire.token_ids), n_tokens if wire.token_ids else 0),
        "texts": (len(wire.texts), n_tokens),
        "stages": (len(wire.stages), n_tokens),
        "fused": (len(wire.fused), n_tokens * n_clusters),
        "dense": (len(wire.dense), n_tokens * n_clusters),
        "sae": (len(wire.sae), n_tokens * n_clusters),
    }
    for name, (found, expected) in columns.items():
        if found != expected:
            raise MonitorError(f"reply tokens.{name}: found {found} entries, expected {expected}")
    fused, dense, sae = tuple(wire.fused), tuple(wire.dense), tuple(wire.sae)
    rows = [slice(i * n_clusters, (i + 1) * n_clusters) for i in range(n_tokens)]
    return tuple(
        TokenScores(
            position=wire.positions[i],
            token_id=wire.token_ids[i] if wire.token_ids else None,
            text=wire.texts[i],
            stage=enums.stage_from_wire(wire.stages[i]),
            fused=fused[row],
            dense=dense[row],
            sae=sae[row],
        )
        for i, row in enumerate(rows)
    )
