"""One thread that owns the scorer: tokens of many requests in, numbers out.

Each piece of work names its `ActivationSource`: our own forward pass, or activations that somebody
gave. From there on all work is alike.

The event loop hands work over and awaits a future; the thread takes ragged batches up to a token
budget, completions before prompts before replay, and never awaits. Long work is taken in chunks
and goes back behind its peers, so that a long prompt delays others by one step at most. Work whose
caller went away or whose deadline passed is dropped before it costs a step. Work that would not fit
into the cache beside what has begun waits until it does.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from monitor.errors import (
    ActivationError,
    DeadlineError,
    NotReadyError,
    PayloadTooLargeError,
    QueueFullError,
    SettingsError,
)
from sae_core.errors import ScorerError, TokenError
from sae_core.language_model.model import Segment
from sae_core.score_cache import (
    ActivationSource,
    CacheCounts,
    Continuation,
    GivenRun,
    OwnForward,
    ScoreCache,
    ScoredStream,
)
from sae_core.scorer import Scorer

log = structlog.get_logger(__name__)

MAX_CACHE_BYTES = 2 * 1024**3
"""Default budget of keys and values: 116,000 tokens of Gemma 3 270M up to layer 9 in float32."""


def torch_dtype(name: str) -> torch.dtype:
    """float32 or bfloat16 by name; SettingsError for anything else."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in dtypes:
        raise SettingsError(f"dtype: found {name!r}, expected one of {', '.join(dtypes)}")
    return dtypes[name]


def placement(device: str, dtype: str) -> tuple[str, str]:
    """Device and dtype with `auto` decided: CUDA in bfloat16 where there is one, CPU in float32.

    Raises:
        SettingsError: CUDA is asked for and not there.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise SettingsError("device: found no usable CUDA device, expected one for cuda")
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    return device, dtype


class Priority(IntEnum):
    """Smaller goes first."""

    COMPLETION = 0
    PROMPT = 1
    REPLAY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineResult:
    """The numbers of one piece of work."""

    logits: NDArray[np.float32]
    """[n_tokens, n_clusters, 3]: fused, dense, sae."""
    latent_acts: NDArray[np.float32]
    """[n_tokens, n_registered_latents]."""
    queue_seconds: float
    forward_seconds: float
    """This work's share, by tokens, of its steps' forward time."""
    encode_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one step of the engine did, for metrics."""

    n_segments: int
    n_tokens: int
    """Recomputed ones included."""
    forward_seconds: float
    encode_seconds: float


@dataclass(slots=True, eq=False)
class _Work:
    source: ActivationSource
    priority: Priority
    deadline: float | None
    future: asyncio.Future[EngineResult]
    loop: asyncio.AbstractEventLoop
    queued_at: float
    n_queued: int
    """Its tokens that `queue_tokens` still counts."""
    started_at: float | None = None
    run: Continuation | GivenRun | None = None
    """From the first step on."""
    forward_seconds: float = 0.0
    encode_seconds: float = 0.0
    abandoned: bool = False
    """Set by the event loop when its caller stopped waiting; read by the thread."""

    @property
    def n_left(self) -> int:
        return self.source.n_tokens - (0 if self.run is None else self.run.n_scored)


class Engine:
    """Owns a `Scorer`, its thread and its queue.

    Args:
        max_step_tokens: token budget of one step.
        max_queue_tokens: tokens that may wait; beyond that `score` raises `QueueFullError`.
        max_cache_bytes: keys and values that may be held; beyond that those of the stream that
            was idle for longest go, and are recomputed on its next use.
        reuse_key: names all that scores depend on beside the tokens, so that tokens seen before
            take over what was computed then; None computes everything anew.
        on_step: called in the engine thread after each step; must not block.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        max_step_tokens: int = 2048,
        max_queue_tokens: int = 65536,
        max_cache_bytes: int = MAX_CACHE_BYTES,
        reuse_key: str | None = None,
        on_step: Callable[[StepRecord], None] = lambda step: None,
    ) -> None:
        self.scorer = scorer
        self.max_queue_tokens = max_queue_tokens
        self._max_step_tokens = max_step_tokens
        self._on_step = on_step
        self._queues: dict[Priority, deque[_Work]] = {p: deque() for p in Priority}
        self._wake = threading.Condition()
        key = None if reuse_key is None else reuse_key.encode()
        self._cache = ScoreCache(scorer.open_stream, max_cache_bytes, key=key)
        self._queue_tokens = 0
        self._tokens_per_second = 1000.0
        self._stopping = False
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def queue_tokens(self) -> int:
        """Tokens waiting or in the step that runs now."""
        return self._queue_tokens

    @property
    def alive(self) -> bool:
        """Whether the thread takes work."""
        return self._thread.is_alive() and not self._failed and not self._stopping

    def start(self) -> None:
        """Starts the thread; call once."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the step that runs now; waiting work gets NotReadyError."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def open_stream(self) -> ScoredStream:
        """A new empty sequence; close it when it is not needed any more."""
        return self._cache.open_stream()

    def close_stream(self, stream: ScoredStream) -> None:
        """Frees the sequence's keys and values, at once or after the step that runs now."""
        self._cache.close(stream)

    def cache(self) -> CacheCounts:
        """Where the keys and values stand."""
        return self._cache.counts()

    async def score(
        self,
        source: ActivationSource,
        *,
        priority: Priority,
        deadline: float | None = None,
    ) -> EngineResult:
        """Scores the tokens of `source`.

        One call at a time for one stream. When this raises or is cancelled, the stream of an
        `OwnForward` may hold a part of the tokens (`stream.length` says how many).

        Args:
            deadline: on the clock of time.monotonic; None waits for ever.

        Raises:
            QueueFullError: the queue holds its limit; nothing was queued.
            DeadlineError: the deadline passed before the last token was scored.
            NotReadyError: the engine is stopping or has died.
            ActivationError: activations or logits hold NaN or infinity.
        """
        n_tokens = source.n_tokens
        loop = asyncio.get_running_loop()
        work = _Work(
            source=source,
            priority=priority,
            deadline=deadline,
            future=loop.create_future(),
            loop=loop,
            queued_at=time.monotonic(),
            n_queued=n_tokens,
        )
        with self._wake:
            if not self.alive:
                raise NotReadyError("engine: not running, expected a live engine thread")
            waiting = self._queue_tokens
            if waiting and waiting + n_tokens > self.max_queue_tokens:
                raise QueueFullError(
                    f"queue: {waiting} tokens wait and {n_tokens} more were sent, "
                    f"expected at most {self.max_queue_tokens}",
                    retry_seconds=min(30.0, max(0.05, waiting / self._tokens_per_second)),
                )
            self._queue_tokens += n_tokens
            self._queues[priority].append(work)
            self._wake.notify()
        try:
            return await work.future
        except asyncio.CancelledError:
            work.abandoned = True
            raise

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not self._stopping and not any(self._queues.values()):
                        self._wake.wait()
                    if self._stopping:
                        break
                    batch = self._take()
                if batch:
                    self._step(batch)
        except BaseException:
            self._failed = True
            log.exception("engine_died")
            raise
        finally:
            with self._wake:
                self._stopping = True
                left = [work for queue in self._queues.values() for work in queue]
                for queue in self._queues.values():
                    queue.clear()
            for work in left:
                self._finish(work, NotReadyError("engine: stopped before the tokens were scored"))

    def _take(self) -> list[tuple[_Work, int]]:
        """The next batch: work and how many of its tokens; called with the lock held."""
        now = time.monotonic()
        batch: list[tuple[_Work, int]] = []
        budget = self._max_step_tokens
        crowded = False
        for queue in self._queues.values():
            waiting: list[_Work] = []
            for _ in range(len(queue)):
                if not budget:
                    break
                work = queue.popleft()
                if work.abandoned:
                    self._let_go(work)
                    continue
                if work.deadline is not None and now >= work.deadline:
                    error = DeadlineError(
                        f"deadline: passed with {work.n_left} of {work.source.n_tokens} "
                        "tokens not scored"
                    )
                    self._let_go(work)
                    self._resolve(work, error)
                    continue
                if work.run is None:
                    if isinstance(work.source, OwnForward):
                        # Once one has to wait none goes before it, or it might wait for ever.
                        crowded = crowded or not self._cache.admits(work.source)
                        if crowded:
                            waiting.append(work)
                            continue
                        work.run = self._cache.begin(work.source)
                    else:
                        work.run = GivenRun(work.source)
                    work.started_at = now
                n_tokens = min(work.run.n_to_run, budget)
                budget -= n_tokens
                batch.append((work, n_tokens))
            queue.extendleft(reversed(waiting))
        return batch

    def _step(self, batch: list[tuple[_Work, int]]) -> None:
        running = [(work, n, work.run) for work, n in batch if work.run is not None]
        started = time.monotonic()
        try:
            for _, _, run in running:
                run.restore()
            parts = [run.part(n) for _, n, run in running]
            scores = self.scorer.step(parts)
        except Exception as error:
            if len(batch) > 1:
                # One bad sequence must not take its neighbours along.
                for single in batch:
                    self._step([single])
                return
            work, _ = batch[0]
            self._finish(work, self._explain(error))
            return
        n_tokens = sum(n for _, n in batch)
        elapsed = time.monotonic() - started
        if n_tokens:
            speed = n_tokens / max(elapsed, 1e-6)
            self._tokens_per_second += 0.2 * (speed - self._tokens_per_second)
        for (work, n, run), part, scored in zip(running, parts, scores.segments, strict=True):
            if isinstance(run, GivenRun):
                run.take(scored)
            else:
                assert isinstance(part, Segment)
                self._cache.take(run, part, scored)
            work.forward_seconds += scores.forward_seconds * n / max(n_tokens, 1)
            work.encode_seconds += scores.encode_seconds * n / max(n_tokens, 1)
        finished: list[tuple[_Work, EngineResult]] = []
        with self._wake:
            for work, _, run in running:
                self._queue_tokens -= work.n_queued - work.n_left
                work.n_queued = work.n_left
                if work.n_left:
                    self._queues[work.priority].append(work)
                else:
                    finished.append((work, _result(work, run)))
                    self._end(work)
        self._cache.settle(run.stream for _, _, run in running if isinstance(run, Continuation))
        if n_tokens:
            self._on_step(
                StepRecord(
                    n_segments=len(batch),
                    n_tokens=n_tokens,
                    forward_seconds=scores.forward_seconds,
                    encode_seconds=scores.encode_seconds,
                )
            )
        for work, result in finished:
            self._resolve(work, result)

    def _explain(self, error: Exception) -> Exception:
        if isinstance(error, ScorerError):
            return ActivationError(str(error))
        if isinstance(error, TokenError):
            return PayloadTooLargeError(str(error))
        log.error("engine_step_failed", exc_info=error)
        return error

    def _finish(self, work: _Work, error: Exception) -> None:
        with self._wake:
            self._let_go(work)
        self._resolve(work, error)

    def _let_go(self, work: _Work) -> None:
        """Counts out work that ends before its last score; called with the lock held."""
        self._queue_tokens -= work.n_queued
        self._end(work)

    def _end(self, work: _Work) -> None:
        if isinstance(work.run, Continuation):
            self._cache.end(work.run)

    @staticmethod
    def _resolve(work: _Work, outcome: EngineResult | Exception) -> None:
        def deliver() -> None:
            if work.future.done():
                return
            if isinstance(outcome, Exception):
                work.future.set_exception(outcome)
            else:
                work.future.set_result(outcome)

        # A loop that has closed has nobody left to tell.
        if not work.loop.is_closed():
            work.loop.call_soon_threadsafe(deliver)


def _result(work: _Work, run: Continuation | GivenRun) -> EngineResult:
    scores = run.scores()
    return EngineResult(
        logits=scores.logits,
        latent_acts=scores.latent_acts,
        queue_seconds=(work.started_at or work.queued_at) - work.queued_at,
        forward_seconds=work.forward_seconds,
        encode_seconds=work.encode_seconds,
    )
