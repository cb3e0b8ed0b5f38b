"""A stream from its opening to its one decision, whichever calls feed it meanwhile.

`StreamScoring` makes the scores; here they become updates, alerts on record, and the decision.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from monitor.coverage import CoverageMeter
from monitor.draft import DecisionDraft
from monitor.engine import Engine
from monitor.inputs import InputReader
from monitor.metrics import Metrics
from monitor.metrics.labels import Outcome, RequestKind
from monitor.policy import Crossing
from monitor.records import Alert, Decision, Gap, StreamOpen, StreamUpdate, UnscoredReason
from monitor.stream_scoring import News, StreamScoring


class LiveStream:
    """One stream: its scoring, its updates and alerts, its decision.

    Args:
        peer: whose turns in the engine these are where the opening names no caller.
        interval_seconds: shortest time between two updates; alerts do not wait for it.
    """

    def __init__(
        self,
        opened: StreamOpen,
        run: DecisionDraft,
        *,
        reader: InputReader,
        engine: Engine,
        metrics: Metrics,
        peer: str,
        interval_seconds: float,
    ) -> None:
        self.opened = opened
        self.decision_id = run.decision_id
        self.session_id = opened.session_id or run.decision_id
        self._run = run
        self._metrics = metrics
        self._meter = CoverageMeter(metrics)
        self._interval_seconds = interval_seconds
        self._started = time.monotonic()
        self._concluding: asyncio.Task[Decision] | None = None
        self.scoring = StreamScoring(
            opened=opened,
            reader=reader,
            engine=engine,
            caller=opened.caller or peer,
            evidence=run.evidence,
            gap_seconds=run.policy.model.deadline_ms / 1000,
            on_progress=self._on_progress,
            on_crossings=self._on_crossings,
            on_fits=run.take_fits,
        )

    @property
    def is_finished(self) -> bool:
        """Whether its input has ended and its decision is made, or is being made."""
        return self._concluding is not None

    async def updates(self) -> AsyncIterator[StreamUpdate]:
        """See `StreamSession.updates`."""
        async for news in self.scoring.news(self._interval_seconds):
            for gap in news.gaps:
                yield self._update(News(), gap)
            if news.start_index is not None or news.alerts or news.flushed:
                yield self._update(news)

    async def finish(self) -> Decision:
        """See `StreamSession.finish`; called again, it gives the same decision."""
        await self.scoring.drain()
        if self._concluding is None:
            self._concluding = asyncio.create_task(self._conclude())
        # A caller that leaves now must not take the record along.
        return await asyncio.shield(self._concluding)

    async def break_off(self, reason: UnscoredReason, outcome: Outcome) -> None:
        """Stops at once; what was scored before stays on record."""
        await self.scoring.abort(reason)
        await asyncio.shield(self._decide())
        self._count(outcome)

    async def _conclude(self) -> Decision:
        decision = await self._decide()
        self._count(Outcome.of(decision))
        return decision

    async def _decide(self) -> Decision:
        return await self._run.decide(
            timings=self.scoring.timings,
            started=self._started,
            coverage=self.scoring.coverage(),
            token_ids=self.scoring.token_ids,
            caller=self.opened.caller,
            session_id=self.session_id,
        )

    def _update(self, news: News, gap: Gap | None = None) -> StreamUpdate:
        judgement, _ = self._run.evidence.judge()
        stop = self._run.evidence.n_tokens
        start = stop if news.start_index is None else news.start_index
        return StreamUpdate(
            decision_id=self.decision_id,
            session_id=self.session_id,
            start_index=start,
            processed_index=stop,
            verdict=judgement.verdict,
            action=judgement.action,
            overall=judgement.overall,
            clusters=self._run.evidence.results(attribution=[a.cluster for a in news.alerts]),
            new_alerts=tuple(news.alerts),
            tokens=self._run.tokens(start, stop),
            coverage=self.scoring.coverage(),
            gap=gap,
        )

    async def _on_crossings(self, crossings: Sequence[Crossing]) -> tuple[Alert, ...]:
        """Alerts, counted and on disk: whether or not the caller reads its updates."""
        alerts = self._run.take(crossings)
        await self._run.record_alerts(self._update(News(alerts=list(alerts))))
        return alerts

    def _count(self, outcome: Outcome) -> None:
        self._metrics.request_finished(RequestKind(self.opened.stage.value), outcome)

    def _on_progress(self, scoring: StreamScoring) -> None:
        self._meter.report(scoring.stage_coverage())
