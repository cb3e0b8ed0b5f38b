"""From evidence to a recorded decision: what a whole request and a stream share.

A decision that alerts is on disk before `decide` returns it; where the log cannot be written the
policy's `on_error` decides, and it is counted.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence

import structlog

from monitor.audit_log.record import Asked, Observed, explained_at
from monitor.audit_log.writer import AuditLog
from monitor.errors import AuditError
from monitor.evidence import Evidence
from monitor.inputs import input_digest
from monitor.metrics import FailOpen, Metrics
from monitor.policy import Crossing, Policy
from monitor.records import (
    Action,
    Alert,
    Anomaly,
    AuditLevel,
    ClusterResult,
    Coverage,
    Decision,
    Mode,
    StreamUpdate,
    TokenScores,
    UnscoredReason,
)
from monitor.served import Served
from monitor.timing_sums import TimingSums
from sae_core.anomaly import AnomalyScores, anomaly_scores
from sae_core.vitals import FitSums, TextVitals, summed

log = structlog.get_logger(__name__)


class DecisionDraft:
    """A decision in the making: collects evidence and alerts, ends in `decide`.

    Args:
        is_stream: whether joint rules are asked after every token, not once at the end.
    """

    def __init__(
        self,
        *,
        served: Served,
        metrics: Metrics,
        audit_log: AuditLog,
        policy: Policy,
        want_attribution: bool,
        want_tokens: bool,
        asked: Asked,
        is_stream: bool = False,
        observe: Callable[[Decision, TextVitals], None] | None = None,
    ) -> None:
        self.policy = policy
        self._served = served
        self._metrics = metrics
        self._audit_log = audit_log
        self.decision_id = str(uuid.uuid4())
        self.evidence = Evidence(served.plan, policy, rules_each_token=is_stream)
        self.alerts: list[Alert] = []
        self._want_attribution = want_attribution
        self._want_tokens = want_tokens
        self.asked = asked
        self._observe = observe
        self._fits: list[Mapping[str, FitSums]] = []

    def take(self, crossings: Sequence[Crossing]) -> tuple[Alert, ...]:
        """Crossings as this decision's alerts."""
        alerts = tuple(
            Alert(
                decision_id=self.decision_id,
                cluster=c.cluster,
                severity=c.severity,
                stage=c.stage,
                score=c.score,
                position=c.position,
            )
            for c in crossings
        )
        self.alerts += alerts
        self._metrics.observe_alerts(alerts)
        return alerts

    def take_fits(self, fits: Mapping[str, FitSums]) -> None:
        """How well the SAEs fit some of the tokens, where the engine measured it."""
        if fits:
            self._fits.append(fits)

    async def record_alerts(self, update: StreamUpdate) -> None:
        """Puts the alerts of a stream's update on disk, or counts that it cannot be done."""
        try:
            await self._audit_log.append_stream_alert(
                update,
                policy=self.policy.name,
                mode=self.policy.mode,
                provenance=self._served.provenance,
                level=self.policy.model.audit_level,
            )
        except AuditError as error:
            log.error("audit_failed", decision_id=self.decision_id, error=str(error))
            self._metrics.failed_open(FailOpen.AUDIT)

    def attribution(self) -> bool | list[str]:
        """Which clusters to explain: all on request, otherwise those that alerted."""
        return True if self._want_attribution else [alert.cluster for alert in self.alerts]

    def tokens(self, start: int, stop: int) -> tuple[TokenScores, ...]:
        """Per-token scores where they were asked for."""
        if not self._want_tokens:
            return ()
        ids = [i for i in self.evidence.token_ids(start, stop) if i is not None]
        # One request knows all of its ids, or none.
        texts = self._served.tokenizer.token_texts(ids) or [""] * (stop - start)
        return self.evidence.tokens(start, stop, texts)

    async def decide(
        self,
        *,
        timings: TimingSums,
        started: float,
        coverage: Coverage,
        token_ids: Sequence[int] | None,
        caller: str | None,
        failure: UnscoredReason | None = None,
        session_id: str = "",
    ) -> Decision:
        """Judges, records, counts. Durable when it returns with an alert.

        Args:
            token_ids: None where they are not known; nothing then stands for the input.
        """
        began = time.monotonic()
        self.take(self.evidence.close())
        judgement, crossings = self.evidence.judge()
        self.take(crossings)
        blocks = self.policy.mode is Mode.ENFORCE and self.policy.model.on_error == "block"
        action = judgement.action
        if failure is not None:
            action = Action.BLOCK if blocks else action
            if not blocks:
                self._metrics.failed_open(FailOpen(failure.value))
        clusters = self.evidence.results(attribution=self.attribution())
        tokens: tuple[TokenScores, ...] = ()
        if self._want_tokens:  # a long text's take too long for the event loop
            tokens = await asyncio.to_thread(self.tokens, 0, self.evidence.n_tokens)
        expected = self._served.expected
        vitals = None if expected is None else self.evidence.vitals(summed(self._fits))
        anomaly = None
        if expected is not None and vitals is not None:
            anomaly = _anomaly(anomaly_scores(expected.baseline, vitals))
        timings.score_seconds += time.monotonic() - began

        def decision(action: Action, audit_seconds: float, sequence: int | None) -> Decision:
            return Decision(
                decision_id=self.decision_id,
                verdict=judgement.verdict,
                action=action,
                mode=self.policy.mode,
                policy=self.policy.name,
                overall=judgement.overall,
                clusters=clusters,
                rules=judgement.rules,
                alerts=tuple(self.alerts),
                coverage=coverage,
                timings=timings.record(
                    audit_seconds=audit_seconds, total_seconds=time.monotonic() - started
                ),
                provenance=self._served.provenance,
                tokens=tokens,
                anomaly=anomaly,
                session_id=session_id,
                sequence=sequence,
            )

        before_audit = time.monotonic()
        sequence: int | None = None
        try:
            sequence = await self._audit_log.append_decision(
                decision(action, 0.0, None),
                input_digest=None if token_ids is None else input_digest(token_ids),
                caller=caller,
                observed=self._observed(token_ids, clusters),
                asked=self.asked,
                level=self.policy.model.audit_level,
            )
        except AuditError as error:
            log.error("audit_failed", decision_id=self.decision_id, error=str(error))
            if blocks:
                action = Action.BLOCK
            else:
                self._metrics.failed_open(FailOpen.AUDIT)
        final = decision(action, time.monotonic() - before_audit, sequence)
        self._metrics.observe_decision(final)
        if self._observe is not None and vitals is not None:
            self._observe(final, vitals)
        return final

    def _observed(
        self, token_ids: Sequence[int] | None, clusters: Sequence[ClusterResult]
    ) -> Observed | None:
        """What the audit log may keep of the tokens, as far as its level needs it."""
        level = self._audit_log.level_for(self.policy.model.audit_level)
        if level.rank < AuditLevel.SCORES.rank:
            return None
        texts: Sequence[str] = ()
        if level is AuditLevel.CONTENT and token_ids is not None:
            texts = self._served.tokenizer.token_texts(token_ids)
        return Observed(
            trace=self.evidence.trace(),
            token_ids=token_ids,
            texts=texts,
            latents=self.evidence.token_latents(explained_at(level, clusters)),
        )


def _anomaly(scores: AnomalyScores) -> Anomaly:
    known = {name: None if math.isnan(value) else value for name, value in scores._asdict().items()}
    return Anomaly(**known)
