"""From evidence to a recorded decision: what a whole request and a stream share.

A decision that alerts is on disk before `decide` returns it; where the log cannot be written the
policy's `on_error` decides, and it is counted.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

import structlog

from monitor.audit_log.writer import AuditLog
from monitor.errors import AuditError
from monitor.evidence import Evidence
from monitor.inputs import input_digest
from monitor.metrics import FailOpen, Metrics
from monitor.policy import Crossing, Policy
from monitor.records import (
    Action,
    Alert,
    Coverage,
    Decision,
    Mode,
    TokenScores,
    UnscoredReason,
)
from monitor.served import Served
from monitor.stream_session import TimingSums

log = structlog.get_logger(__name__)


class DecisionDraft:
    """A decision in the making: collects evidence and alerts, ends in `decide`."""

    def __init__(
        self,
        *,
        served: Served,
        metrics: Metrics,
        audit_log: AuditLog,
        policy: Policy,
        want_attribution: bool,
        want_tokens: bool,
    ) -> None:
        self.policy = policy
        self._served = served
        self._metrics = metrics
        self._audit_log = audit_log
        self.decision_id = str(uuid.uuid4())
        self.evidence = Evidence(served.plan, policy)
        self.alerts: list[Alert] = []
        self._want_attribution = want_attribution
        self._want_tokens = want_tokens

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

    def attribution(self) -> bool | list[str]:
        """Which clusters to explain: all on request, otherwise those that alerted."""
        return True if self._want_attribution else [alert.cluster for alert in self.alerts]

    def tokens(self, start: int, stop: int) -> tuple[TokenScores, ...]:
        """Per-token scores where they were asked for."""
        if not self._want_tokens:
            return ()
        ids = [i for i in self.evidence.token_ids()[start:stop] if i is not None]
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
        judgement, crossings = self.evidence.judge()
        self.take(crossings)
        blocks = self.policy.mode is Mode.ENFORCE and self.policy.model.on_error == "block"
        action = judgement.action
        if failure is not None:
            action = Action.BLOCK if blocks else action
            if not blocks:
                self._metrics.failed_open(FailOpen(failure.value))
        clusters = self.evidence.results(attribution=self.attribution())
        tokens = self.tokens(0, self.evidence.n_tokens)
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
            )
        except AuditError as error:
            log.error("audit_failed", decision_id=self.decision_id, error=str(error))
            if blocks:
                action = Action.BLOCK
            else:
                self._metrics.failed_open(FailOpen.AUDIT)
        final = decision(action, time.monotonic() - before_audit, sequence)
        self._metrics.observe_decision(final)
        return final
