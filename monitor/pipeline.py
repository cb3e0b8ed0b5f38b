"""One request from start to finish: read this file first.

    request -> InputReader -> engine -> Evidence -> policy -> Decision -> audit log, metrics, reply

Both a whole request and a stream end in one `Decision` and one audit record. A decision that
alerts is on disk before anybody sees it. Knows no protobuf and no sockets.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from types import TracebackType

import structlog

from monitor.audit_log.writer import AuditLog
from monitor.coverage import CoverageMeter
from monitor.draft import DecisionDraft
from monitor.engine import Engine, EngineResult, Priority
from monitor.errors import (
    AuditError,
    DeadlineError,
    MonitorError,
    NotFoundError,
    NotReadyError,
    PayloadTooLargeError,
    QueueFullError,
    RequestError,
)
from monitor.inputs import InputReader, TokenInput
from monitor.metrics import Metrics
from monitor.metrics.labels import FailOpen, Outcome, Rejection, RequestKind
from monitor.policy import Crossing, Policy
from monitor.records import (
    Action,
    Alert,
    ClusterInfo,
    Decision,
    Gap,
    ScoreRequest,
    ServerInfo,
    ServerLimits,
    Stage,
    StreamOpen,
    StreamUpdate,
    UnscoredReason,
    Verdict,
)
from monitor.served import Served
from monitor.stream_session import News, StreamScoring, TimingSums

log = structlog.get_logger(__name__)


class Pipeline:
    """Joins the parts; one for each server. Call everything from one event loop.

    Args:
        offline: work that nobody waits for: no policy deadline, and after everything else.
    """

    def __init__(
        self,
        *,
        served: Served,
        engine: Engine,
        audit_log: AuditLog,
        metrics: Metrics,
        limits: ServerLimits,
        stream_interval_seconds: float = 0.02,
        offline: bool = False,
    ) -> None:
        self.served = served
        self.engine = engine
        self.audit_log = audit_log
        self.metrics = metrics
        self.limits = limits
        self.stream_interval_seconds = stream_interval_seconds
        self.offline = offline
        self.n_streams = 0
        self.n_requests = 0
        self.draining = False
        self._reader = InputReader(
            served.tokenizer,
            vocab_size=served.vocab_size,
            max_request_tokens=limits.max_request_tokens,
        )

    def info(self) -> ServerInfo:
        """What the server is and what it takes."""
        return ServerInfo(
            provenance=self.served.provenance,
            limits=self.limits,
            policies=tuple(self.served.policies),
            clusters=tuple(c.id for c in self.served.bundle.spec.clusters),
            hook_points=self.served.hook_points,
            vocab_size=self.served.vocab_size,
            ready=self.ready,
        )

    @property
    def ready(self) -> bool:
        """Whether a request sent now would be scored and recorded."""
        return self.engine.alive and self.audit_log.healthy and not self.draining

    def clusters(self) -> tuple[ClusterInfo, ...]:
        """The registered clusters, in bundle order."""
        return self.served.cluster_infos()

    def cluster(self, cluster_id: str) -> ClusterInfo:
        """One registered cluster, or NotFoundError."""
        infos = {info.cluster: info for info in self.clusters()}
        if cluster_id not in infos:
            raise NotFoundError(
                f"cluster: found {cluster_id!r:.80}, expected one of {', '.join(infos)}"
            )
        return infos[cluster_id]

    async def score(
        self, request: ScoreRequest, *, deadline_seconds: float | None = None
    ) -> Decision:
        """Scores one request whole.

        Past the policy's own deadline the answer says what was left unscored, and the policy's
        `on_error` decides the action; past the caller's deadline it is a DeadlineError.

        Args:
            deadline_seconds: what the caller is willing to wait; None for no limit of its own.

        Raises:
            MonitorError: see `monitor.errors`; the tokens are then counted as unscored.
        """
        started = time.monotonic()
        meter = CoverageMeter(self.metrics)
        self.n_requests += 1
        outcome = Outcome.ERROR
        try:
            self._admit(request.model)
            policy = self._policy(request.policy)
            timings = TimingSums()
            tokens = await self._read(request, meter)
            timings.tokenize_seconds = time.monotonic() - started
            run = self.draft(
                policy,
                want_attribution=request.want_attribution,
                want_tokens=request.want_tokens,
            )
            failure = await self._run(run, tokens, timings, policy, started, deadline_seconds)
            meter.report(run.evidence.stage_coverage())
            decision = await run.decide(
                timings=timings,
                started=started,
                coverage=run.evidence.coverage(),
                token_ids=tokens.token_ids,
                caller=request.caller,
                failure=failure,
            )
            outcome = _outcome(decision)
            return decision
        except asyncio.CancelledError:
            outcome = Outcome.CANCELLED
            meter.lose(UnscoredReason.CANCELLED)
            raise
        except DeadlineError:
            outcome = Outcome.DEADLINE
            meter.lose(UnscoredReason.DEADLINE)
            raise
        except (QueueFullError, NotReadyError) as error:
            outcome = Outcome.REJECTED
            full = isinstance(error, QueueFullError)
            meter.lose(UnscoredReason.OVERLOAD if full else UnscoredReason.NOT_READY)
            self.metrics.rejected(Rejection.QUEUE_FULL if full else self._why_not_ready())
            raise
        except RequestError as error:
            outcome = Outcome.REJECTED
            meter.lose(UnscoredReason.INVALID)
            too_large = isinstance(error, PayloadTooLargeError)
            self.metrics.rejected(Rejection.PAYLOAD if too_large else Rejection.INVALID)
            raise
        except BaseException:
            meter.lose(UnscoredReason.ERROR)
            raise
        finally:
            self.n_requests -= 1
            self.metrics.request_finished(_kind(request), outcome)

    def open_stream(self, opened: StreamOpen) -> StreamSession:
        """A session for one stream; use it as an async context manager.

        Raises:
            MonitorError: unknown policy or model, not ready, too many streams, bad context.
        """
        try:
            self._admit(opened.model)
            policy = self._policy(opened.policy)
        except NotReadyError:
            self.metrics.rejected(self._why_not_ready())
            raise
        except RequestError:
            self.metrics.rejected(Rejection.INVALID)
            raise
        if self.n_streams >= self.limits.max_streams:
            self.metrics.rejected(Rejection.CONCURRENCY)
            raise QueueFullError(
                f"streams: {self.n_streams} are open, expected at most {self.limits.max_streams}",
                retry_seconds=1.0,
            )
        return StreamSession(self, opened, policy)

    def draft(self, policy: Policy, *, want_attribution: bool, want_tokens: bool) -> DecisionDraft:
        """A decision to be made under the served bundle."""
        return DecisionDraft(
            served=self.served,
            metrics=self.metrics,
            audit_log=self.audit_log,
            policy=policy,
            want_attribution=want_attribution,
            want_tokens=want_tokens,
        )

    def reader(self) -> InputReader:
        """How requests become tokens under the served bundle."""
        return self._reader

    def _admit(self, model: str | None) -> None:
        if model is not None and model != self.served.provenance.model:
            raise NotFoundError(
                f"model: found {model!r:.80}, expected {self.served.provenance.model}"
            )
        if self.draining:
            raise NotReadyError("server: draining, expected a server that takes new work")
        if not self.engine.alive:
            raise NotReadyError("engine: not running, expected a live engine thread")

    def _why_not_ready(self) -> Rejection:
        return Rejection.DRAINING if self.draining else Rejection.NOT_READY

    def _policy(self, name: str) -> Policy:
        policies = self.served.policies
        if name not in policies:
            raise NotFoundError(
                f"policy: found {name!r:.80}, expected one of {', '.join(sorted(policies))}"
            )
        return policies[name]

    async def _read(self, request: ScoreRequest, meter: CoverageMeter) -> TokenInput:
        if request.token_ids is not None:
            meter.expect([request.stage] * len(request.token_ids))
            return self._reader.read(request)
        tokens = await asyncio.to_thread(self._reader.read, request)
        meter.expect(tokens.stages)
        return tokens

    async def _run(
        self,
        run: DecisionDraft,
        tokens: TokenInput,
        timings: TimingSums,
        policy: Policy,
        started: float,
        deadline_seconds: float | None,
    ) -> UnscoredReason | None:
        """Scores the tokens into `run`; the reason where the policy's deadline came first."""
        own = math.inf if self.offline else started + policy.model.deadline_ms / 1000
        callers = math.inf if deadline_seconds is None else started + deadline_seconds
        deadline = min(own, callers)
        completion = Stage.COMPLETION in tokens.stages and Stage.PROMPT not in tokens.stages
        priority = Priority.COMPLETION if completion else Priority.PROMPT
        kv = self.engine.open_stream()
        try:
            result: EngineResult = await self.engine.score(
                kv,
                tokens.token_ids,
                priority=Priority.REPLAY if self.offline else priority,
                deadline=None if math.isinf(deadline) else deadline,
            )
        except DeadlineError:
            if callers <= own:
                raise
            run.evidence.skip(tokens.token_ids, tokens.stages, UnscoredReason.DEADLINE)
            return UnscoredReason.DEADLINE
        finally:
            self.engine.close_stream(kv)
        timings.add(result)
        began = time.monotonic()
        run.take(
            run.evidence.add(tokens.token_ids, tokens.stages, result.logits, result.latent_acts)
        )
        timings.score_seconds = time.monotonic() - began
        return None


class StreamSession:
    """One stream as its caller sees it. Leaving the context without `finish` cancels it."""

    def __init__(self, pipeline: Pipeline, opened: StreamOpen, policy: Policy) -> None:
        self._pipeline = pipeline
        self._opened = opened
        self._started = time.monotonic()
        self._run = pipeline.draft(
            policy, want_attribution=opened.want_attribution, want_tokens=opened.want_tokens
        )
        self._meter = CoverageMeter(pipeline.metrics)
        self._finished = False
        self.decision_id = self._run.decision_id
        self.session_id = opened.session_id or self.decision_id
        self._scoring = StreamScoring(
            opened=opened,
            reader=pipeline.reader(),
            engine=pipeline.engine,
            evidence=self._run.evidence,
            gap_seconds=policy.model.deadline_ms / 1000,
            on_progress=self._on_progress,
            on_crossings=self._on_crossings,
        )

    @property
    def first_position(self) -> int:
        """Position of the first token that the caller sends: the length of the context."""
        return self._scoring.first_position

    async def __aenter__(self) -> StreamSession:
        self._pipeline.n_streams += 1
        self._pipeline.metrics.stream_opened()
        try:
            self._scoring.start()
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()
        if self._finished:
            return
        rejected = isinstance(error, MonitorError)
        await self._scoring.abort(UnscoredReason.INVALID if rejected else UnscoredReason.CANCELLED)
        # What was scored before the stream broke off stays on record.
        await asyncio.shield(self._decide())
        self._count(Outcome.REJECTED if rejected else Outcome.CANCELLED)

    async def feed(
        self,
        start_index: int,
        *,
        token_ids: Sequence[int] | None = None,
        text: str | None = None,
    ) -> None:
        """Queues the next piece; see `StreamScoring.feed` for what it raises."""
        self._scoring.feed(start_index, token_ids=token_ids, text=text)

    async def flush(self) -> None:
        """Scores text that waits for more; an update follows when all is scored."""
        self._scoring.flush()

    async def updates(self) -> AsyncIterator[StreamUpdate]:
        """Running results, merged while nobody reads; an alert is on disk before it is yielded.

        Ends when `finish` or the end of the context has ended the stream.
        """
        async for news in self._scoring.news(self._pipeline.stream_interval_seconds):
            for gap in news.gaps:
                yield self._update(News(), gap)
            if news.start_index is not None or news.alerts or news.flushed:
                yield self._update(news)

    async def finish(self) -> Decision:
        """Ends the input, waits for the last score, records and returns the decision."""
        await self._scoring.drain()
        self._finished = True
        # A caller that leaves now must not take the record along.
        return await asyncio.shield(asyncio.create_task(self._conclude()))

    async def _conclude(self) -> Decision:
        decision = await self._decide()
        self._count(_outcome(decision))
        return decision

    async def _decide(self) -> Decision:
        return await self._run.decide(
            timings=self._scoring.timings,
            started=self._started,
            coverage=self._scoring.coverage(),
            token_ids=self._scoring.token_ids,
            caller=self._opened.caller,
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
            coverage=self._scoring.coverage(),
            gap=gap,
        )

    async def _on_crossings(self, crossings: Sequence[Crossing]) -> tuple[Alert, ...]:
        """Alerts, counted and on disk: whether or not the caller reads its updates."""
        alerts = self._run.take(crossings)
        try:
            await self._pipeline.audit_log.append_stream_alert(
                self._update(News(alerts=list(alerts))),
                policy=self._run.policy.name,
                mode=self._run.policy.mode,
                provenance=self._pipeline.served.provenance,
            )
        except AuditError as error:
            log.error("audit_failed", decision_id=self.decision_id, error=str(error))
            self._pipeline.metrics.failed_open(FailOpen.AUDIT)
        return alerts

    def _close(self) -> None:
        self._pipeline.n_streams -= 1
        self._pipeline.metrics.stream_closed()

    def _count(self, outcome: Outcome) -> None:
        self._pipeline.metrics.request_finished(RequestKind(self._opened.stage.value), outcome)

    def _on_progress(self, scoring: StreamScoring) -> None:
        self._meter.report(scoring.stage_coverage())


def _kind(request: ScoreRequest) -> RequestKind:
    return RequestKind.CHAT if request.messages is not None else RequestKind(request.stage.value)


def _outcome(decision: Decision) -> Outcome:
    if decision.action is Action.BLOCK:
        return Outcome.BLOCKED
    return Outcome.OK if decision.verdict is Verdict.PASS else Outcome.FLAGGED
