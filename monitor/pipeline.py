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
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from monitor.activation_uploads import ActivationUploads
from monitor.audit_log.record import Asked
from monitor.audit_log.trace import TokenTrace
from monitor.audit_log.writer import AuditLog
from monitor.coverage import CoverageMeter
from monitor.draft import DecisionDraft
from monitor.engine import Engine
from monitor.engine_steps import EngineResult
from monitor.errors import (
    DeadlineError,
    ForeignActivationsError,
    NotFoundError,
    NotReadyError,
    PayloadTooLargeError,
    QueueFullError,
    RequestError,
)
from monitor.inputs import InputReader, TokenInput
from monitor.live_stream import LiveStream
from monitor.metrics import Metrics
from monitor.metrics.labels import Outcome, Rejection, RequestKind
from monitor.policy import Policy
from monitor.records import (
    ActivationsChunk,
    ActivationsOpen,
    ClusterInfo,
    Decision,
    ScoreRequest,
    ServerInfo,
    ServerLimits,
    Stage,
    StreamOpen,
    UnscoredReason,
)
from monitor.served import LatentDrift, Served, no_drift
from monitor.stream_session import OpenStreams, StreamSession
from monitor.timing_sums import TimingSums
from monitor.work_queue import Priority
from sae_core.score_cache import ActivationSource, OwnForward
from sae_core.vitals import TextVitals


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
        max_detached_streams: int = 256,
        offline: bool = False,
    ) -> None:
        self.served = served
        self.engine = engine
        self.audit_log = audit_log
        self.metrics = metrics
        self.limits = limits
        self.stream_interval_seconds = stream_interval_seconds
        self.offline = offline
        self.n_requests = 0
        self.draining = False
        self._streams = OpenStreams(
            metrics,
            max_streams=limits.max_streams,
            resume_seconds=limits.resume_seconds,
            max_detached=max_detached_streams,
        )
        self._uploads = ActivationUploads(engine, max_queue_tokens=limits.max_queue_tokens)
        self._given: dict[str, Served] = {}
        self.observe: Callable[[Decision, TextVitals], None] | None = None
        """Told of every decision that our own forward pass made, once a baseline is there."""
        self.latent_drift: LatentDrift = no_drift
        """Says how a registered latent fires now, once a baseline is there."""
        self.reader = InputReader(
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
            stale_clusters=tuple(
                c.id for c in self.served.bundle.spec.clusters if c.id in self.served.plan.staleness
            ),
        )

    @property
    def n_streams(self) -> int:
        """Streams that a call holds now."""
        return self._streams.n_open

    @property
    def ready(self) -> bool:
        """Whether a request sent now would be scored and recorded."""
        return self.engine.alive and self.audit_log.healthy and not self.draining

    def clusters(self) -> tuple[ClusterInfo, ...]:
        """The registered clusters, in bundle order."""
        return self.served.cluster_infos(self.latent_drift)

    def cluster(self, cluster_id: str) -> ClusterInfo:
        """One registered cluster, or NotFoundError."""
        infos = {info.cluster: info for info in self.clusters()}
        if cluster_id not in infos:
            raise NotFoundError(
                f"cluster: found {cluster_id!r:.80}, expected one of {', '.join(infos)}"
            )
        return infos[cluster_id]

    async def score(
        self, request: ScoreRequest, *, deadline_seconds: float | None = None, peer: str = ""
    ) -> Decision:
        """Scores one request whole.

        Past the policy's own deadline the answer says what was left unscored, and the policy's
        `on_error` decides the action; past the caller's deadline it is a DeadlineError.

        Args:
            deadline_seconds: what the caller is willing to wait; None for no limit of its own.
            peer: whose turns in the engine these are where the request names no caller.

        Raises:
            MonitorError: see `monitor.errors`; the tokens are then counted as unscored.
        """
        scored = await self._score(request, (), deadline_seconds, peer)
        return scored[0]

    async def score_traced(
        self, request: ScoreRequest, *, stages: Sequence[Stage | None] = (), as_stream: bool = False
    ) -> Traced:
        """As `score`, with every token's scores as the audit log stores them.

        Args:
            stages: where each of the request's `token_ids` counts, in place of its one stage; None
                is read and not scored.
            as_stream: decide as of a stream of these tokens, however they came in pieces.
        """
        decision, run = await self._score(request, stages, None, "", as_stream=as_stream)
        return Traced(decision=decision, trace=run.evidence.trace())

    async def _score(
        self,
        request: ScoreRequest,
        stages: Sequence[Stage | None],
        deadline_seconds: float | None,
        peer: str,
        *,
        as_stream: bool = False,
    ) -> tuple[Decision, DecisionDraft]:
        started = time.monotonic()
        meter = CoverageMeter(self.metrics)
        with self._counted(_kind(request), meter) as end:
            self._admit(request.model)
            policy = self._policy(request.policy)
            timings = TimingSums()
            tokens = await self._read(request, stages, meter)
            timings.tokenize_seconds = time.monotonic() - started
            run = self._draft(
                policy,
                want_attribution=request.want_attribution,
                want_tokens=request.want_tokens,
                asked=Asked(stage=_kind(request).value, priority=self._priority(tokens.stages)),
                is_stream=as_stream,
            )
            source = OwnForward(self.engine.open_stream(), tokens.token_ids)
            callers = math.inf if deadline_seconds is None else started + deadline_seconds
            failure = await self._run(
                *(run, tokens, source, timings, started, callers), caller=request.caller or peer
            )
            decision = await self._concluded(
                run, tokens, timings, started, request.caller, meter, failure
            )
            end.outcome = Outcome.of(decision)
            return decision, run

    async def score_activations(
        self,
        opened: ActivationsOpen,
        chunks: AsyncIterator[ActivationsChunk],
        *,
        deadline_seconds: float | None = None,
        peer: str = "",
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
            tokens = self.reader.activations(opened)
            meter.expect(tokens.stages)
            widths = self.served.scorer.language_model.widths
            buffer = await self._uploads.receive(opened, chunks, widths)
            source = buffer.finish()
            started = time.monotonic()
            run = self._draft(
                policy,
                want_attribution=opened.want_attribution,
                want_tokens=opened.want_tokens,
                asked=Asked(stage=_kind(opened).value, priority=self._priority(tokens.stages)),
                served=self._as_given(buffer.dtype),
            )
            timings = TimingSums()
            failure = await self._run(
                *(run, tokens, source, timings, started, callers), caller=opened.caller or peer
            )
            decision = await self._concluded(
                run, tokens, timings, started, opened.caller, meter, failure
            )
            end.outcome = Outcome.of(decision)
            return decision

    def open_stream(self, opened: StreamOpen, *, peer: str = "") -> StreamSession:
        """A session for one stream; use it as an async context manager.

        Args:
            peer: as in `score`.

        Raises:
            MonitorError: unknown policy or model, not ready, too many streams, bad context, no
                such stream to reopen.
        """
        try:
            self._admit(opened.model)
            if opened.resume is not None:
                return self._streams.reopened(opened)
            policy = self._policy(opened.policy)
        except NotReadyError:
            self.metrics.rejected(self._why_not_ready())
            raise
        except RequestError:
            self.metrics.rejected(Rejection.INVALID)
            raise
        self._streams.check_room()
        run = self._draft(
            policy,
            want_attribution=opened.want_attribution,
            want_tokens=opened.want_tokens,
            asked=Asked(stage=opened.stage.value, priority=self._priority([opened.stage])),
            is_stream=True,
        )
        stream = LiveStream(
            opened,
            run,
            reader=self.reader,
            engine=self.engine,
            metrics=self.metrics,
            peer=peer,
            interval_seconds=self.stream_interval_seconds,
        )
        return StreamSession(stream, self._streams, opened)

    async def end_detached(self) -> None:
        """Ends the streams that wait to be reopened, and returns when all are on record."""
        await self._streams.end_detached()

    def _draft(
        self,
        policy: Policy,
        *,
        want_attribution: bool,
        want_tokens: bool,
        asked: Asked,
        is_stream: bool = False,
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
            asked=asked,
            is_stream=is_stream,
            observe=None if served is not None else self.observe,
        )

    def _priority(self, stages: Sequence[Stage | None]) -> Priority:
        if self.offline:
            return Priority.REPLAY
        completion = Stage.COMPLETION in stages and Stage.PROMPT not in stages
        return Priority.COMPLETION if completion else Priority.PROMPT

    def _admit(self, model: str | None) -> None:
        if model is not None and model != self.served.provenance.model:
            raise NotFoundError(
                f"model: found {model!r:.80}, expected {self.served.provenance.model}"
            )
        if self.draining:
            raise NotReadyError("server: draining, expected a server that takes new work")
        self.engine.check_alive()

    def _why_not_ready(self) -> Rejection:
        return Rejection.DRAINING if self.draining else Rejection.NOT_READY

    def _policy(self, name: str) -> Policy:
        policies = self.served.policies
        if name not in policies:
            raise NotFoundError(
                f"policy: found {name!r:.80}, expected one of {', '.join(sorted(policies))}"
            )
        return policies[name]

    async def _read(
        self, request: ScoreRequest, stages: Sequence[Stage | None], meter: CoverageMeter
    ) -> TokenInput:
        if request.token_ids is not None:
            meter.expect(stages or [request.stage] * len(request.token_ids))
            return self.reader.read(request, stages)
        tokens = await asyncio.to_thread(self.reader.read, request)
        meter.expect(tokens.stages)
        return tokens

    def _as_given(self, dtype: str) -> Served:
        if dtype not in self._given:
            self._given[dtype] = self.served.as_given(dtype)
        return self._given[dtype]

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
        *,
        caller: str,
    ) -> UnscoredReason | None:
        """Scores the source into `run`; the reason where the policy's deadline came first.

        Args:
            started: from when the policy's own deadline counts, on the clock of time.monotonic.
            callers: the caller's deadline, on the same clock.
            caller: whose turns in the engine these are; empty for nobody else's.
        """
        own = math.inf if self.offline else started + run.policy.model.deadline_ms / 1000
        deadline = min(own, callers)
        ids: Sequence[int | None] = tokens.token_ids or [None] * len(tokens.stages)
        try:
            result: EngineResult = await self.engine.score(
                source,
                priority=run.asked.priority,
                deadline=None if math.isinf(deadline) else deadline,
                caller=caller or None,
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
        run.take_fits(result.fits)
        began = time.monotonic()
        run.take(
            await run.evidence.add_in_slices(ids, tokens.stages, result.logits, result.latent_acts)
        )
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Traced:
    """A decision, and every token's scores."""

    decision: Decision
    trace: TokenTrace


@dataclass(slots=True)
class _End:
    """How a request ended; an error until something else is known."""

    outcome: Outcome = Outcome.ERROR


def _kind(request: ScoreRequest | ActivationsOpen) -> RequestKind:
    spans = request.messages is not None if isinstance(request, ScoreRequest) else request.stages
    return RequestKind.CHAT if spans else RequestKind(request.stage.value)
