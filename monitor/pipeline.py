"""One request from start to finish: read this file first.

    request -> InputReader -> engine -> Evidence -> policy -> Decision -> audit log, metrics, reply

The engine runs our own forward pass, or takes activations that the caller gives. A whole request of
either kind and a stream all end in one `Decision` and one audit record. A decision that alerts is
on disk before anybody sees it. Knows no protobuf and no sockets.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

import structlog

from monitor.activations import ActivationsBuffer
from monitor.audit_log.writer import AuditLog
from monitor.coverage import CoverageMeter
from monitor.draft import DecisionDraft
from monitor.engine import Engine, EngineResult, Priority
from monitor.errors import (
    AuditError,
    DeadlineError,
    ForeignActivationsError,
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
    ActivationsChunk,
    ActivationsOpen,
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
from sae_core.score_cache import ActivationSource, OwnForward

log = structlog.get_logger(__name__)


MAX_CHUNK_WAIT_SECONDS = 30.0
"""How long given activations keep their place of the queue while nothing of them arrives."""

CANCELLATION_SECONDS = 0.05
"""How long a cancellation may take to follow the end of what was sent."""


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
        self._arriving_tokens = 0
        self._given: dict[str, Served] = {}
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
        with self._counted(_kind(request), meter) as end:
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
            source = OwnForward(self.engine.open_stream(), tokens.token_ids)
            callers = math.inf if deadline_seconds is None else started + deadline_seconds
            failure = await self._run(run, tokens, source, timings, started, callers)
            decision = await self._concluded(
                run, tokens, timings, started, request.caller, meter, failure
            )
            end.outcome = _outcome(decision)
            return decision

    async def score_activations(
        self,
        opened: ActivationsOpen,
        chunks: AsyncIterator[ActivationsChunk],
        *,
        deadline_seconds: float | None = None,
    ) -> Decision:
        """Scores one request whole, from activations that the caller gives; as `score`.

        The caller's deadline counts from now, the policy's own from the last chunk. Rows that are
        on their way count against the queue's limit.

        Raises:
            MonitorError: as `score`, and as `ActivationsBuffer`.
        """
        callers = math.inf if deadline_seconds is None else time.monotonic() + deadline_seconds
        meter = CoverageMeter(self.metrics)
        with self._counted(_kind(opened), meter) as end:
            self._admit(None)
            policy = self._policy(opened.policy)
            digest = self.served.provenance.model_digest
            if opened.model_digest != digest:
                raise ForeignActivationsError(
                    f"model_digest: found {opened.model_digest or 'none':.80}, expected {digest} "
                    "(GetServerInfo tells it)"
                )
            tokens = self._reader.activations(opened)
            meter.expect(tokens.stages)
            buffer = ActivationsBuffer(opened, self.served.scorer.language_model.widths)
            with self._room_for(opened.n_tokens):
                await _fill(buffer, chunks)
                source = buffer.finish()
            started = time.monotonic()
            run = self.draft(
                policy,
                want_attribution=opened.want_attribution,
                want_tokens=opened.want_tokens,
                served=self._as_given(buffer.dtype),
            )
            timings = TimingSums()
            failure = await self._run(run, tokens, source, timings, started, callers)
            decision = await self._concluded(
                run, tokens, timings, started, opened.caller, meter, failure
            )
            end.outcome = _outcome(decision)
            return decision

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

    def draft(
        self,
        policy: Policy,
        *,
        want_attribution: bool,
        want_tokens: bool,
        served: Served | None = None,
    ) -> DecisionDraft:
        """A decision to be made under the served bundle."""
        return DecisionDraft(
            served=served or self.served,
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

    def _as_given(self, dtype: str) -> Served:
        if dtype not in self._given:
            self._given[dtype] = self.served.as_given(dtype)
        return self._given[dtype]

    @contextmanager
    def _room_for(self, n_tokens: int) -> Iterator[None]:
        """While open, rows that are on their way take their place of the queue's limit."""
        waiting = self.engine.queue_tokens + self._arriving_tokens
        limit = self.limits.max_queue_tokens
        if waiting and waiting + n_tokens > limit:
            raise QueueFullError(
                f"queue: {waiting} tokens wait or arrive and {n_tokens} more were announced, "
                f"expected at most {limit}",
                retry_seconds=1.0,
            )
        self._arriving_tokens += n_tokens
        try:
            yield
        finally:
            self._arriving_tokens -= n_tokens

    @contextmanager
    def _counted(self, kind: RequestKind, meter: CoverageMeter) -> Iterator[_End]:
        """Counts one request at its end: how it ended, and what it left unscored."""
        self.n_requests += 1
        end = _End()
        try:
            yield end
        except asyncio.CancelledError:
            end.outcome = Outcome.CANCELLED
            meter.lose(UnscoredReason.CANCELLED)
            raise
        except DeadlineError:
            end.outcome = Outcome.DEADLINE
            meter.lose(UnscoredReason.DEADLINE)
            raise
        except (QueueFullError, NotReadyError) as error:
            end.outcome = Outcome.REJECTED
            full = isinstance(error, QueueFullError)
            meter.lose(UnscoredReason.OVERLOAD if full else UnscoredReason.NOT_READY)
            self.metrics.rejected(Rejection.QUEUE_FULL if full else self._why_not_ready())
            raise
        except RequestError as error:
            end.outcome = Outcome.REJECTED
            meter.lose(UnscoredReason.INVALID)
            too_large = isinstance(error, PayloadTooLargeError)
            self.metrics.rejected(Rejection.PAYLOAD if too_large else Rejection.INVALID)
            raise
        except BaseException:
            meter.lose(UnscoredReason.ERROR)
            raise
        finally:
            self.n_requests -= 1
            self.metrics.request_finished(kind, end.outcome)

    async def _run(
        self,
        run: DecisionDraft,
        tokens: TokenInput,
        source: ActivationSource,
        timings: TimingSums,
        started: float,
        callers: float,
    ) -> UnscoredReason | None:
        """Scores the source into `run`; the reason where the policy's deadline came first.

        Args:
            started: from when the policy's own deadline counts, on the clock of time.monotonic.
            callers: the caller's deadline, on the same clock.
        """
        own = math.inf if self.offline else started + run.policy.model.deadline_ms / 1000
        deadline = min(own, callers)
        completion = Stage.COMPLETION in tokens.stages and Stage.PROMPT not in tokens.stages
        priority = Priority.COMPLETION if completion else Priority.PROMPT
        ids: Sequence[int | None] = tokens.token_ids or [None] * len(tokens.stages)
        try:
            result: EngineResult = await self.engine.score(
                source,
                priority=Priority.REPLAY if self.offline else priority,
                deadline=None if math.isinf(deadline) else deadline,
            )
        except DeadlineError:
            if callers <= own:
                raise
            run.evidence.skip(ids, tokens.stages, UnscoredReason.DEADLINE)
            return UnscoredReason.DEADLINE
        finally:
            if isinstance(source, OwnForward):
                self.engine.close_stream(source.stream)
        timings.add(result)
        began = time.monotonic()
        run.take(run.evidence.add(ids, tokens.stages, result.logits, result.latent_acts))
        timings.score_seconds = time.monotonic() - began
        return None

    async def _concluded(
        self,
        run: DecisionDraft,
        tokens: TokenInput,
        timings: TimingSums,
        started: float,
        caller: str | None,
        meter: CoverageMeter,
        failure: UnscoredReason | None,
    ) -> Decision:
        meter.report(run.evidence.stage_coverage())
        return await run.decide(
            timings=timings,
            started=started,
            coverage=run.evidence.coverage(),
            token_ids=tokens.token_ids or None,
            caller=caller,
            failure=failure,
        )


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


@dataclass(slots=True)
class _End:
    """How a request ended; an error until something else is known."""

    outcome: Outcome = Outcome.ERROR


async def _fill(buffer: ActivationsBuffer, chunks: AsyncIterator[ActivationsChunk]) -> None:
    """Takes every chunk; DeadlineError where the next one does not come."""
    try:
        while True:
            async with asyncio.timeout(MAX_CHUNK_WAIT_SECONDS):
                chunk = await anext(chunks, None)
            if chunk is None:
                break
            buffer.take(chunk)
    except TimeoutError:
        raise DeadlineError(
            f"chunk: none came for {MAX_CHUNK_WAIT_SECONDS:g} seconds, expected the next one"
        ) from None
    if not buffer.is_full:
        # A caller that went away looks like one that stopped early, until its cancellation comes.
        await asyncio.sleep(CANCELLATION_SECONDS)


def _kind(request: ScoreRequest | ActivationsOpen) -> RequestKind:
    spans = request.messages is not None if isinstance(request, ScoreRequest) else request.stages
    return RequestKind.CHAT if spans else RequestKind(request.stage.value)


def _outcome(decision: Decision) -> Outcome:
    if decision.action is Action.BLOCK:
        return Outcome.BLOCKED
    return Outcome.OK if decision.verdict is Verdict.PASS else Outcome.FLAGGED
