"""One thread that owns the scorer: tokens of many requests in, numbers out.

Each piece of work names its `ActivationSource`: our own forward pass, or activations that somebody
gave. From there on all work is alike.

The event loop hands work over and awaits a future; the thread takes ragged batches up to a token
budget, in the order of `monitor.work_queue`, and never awaits. Work whose caller went away or whose
deadline passed leaves the queue at once. Work that would not fit into the cache beside what has
begun waits until it does.

A step that fails is tried again in halves, so that one bad sequence takes nobody along, and one
that finds no memory fails nobody that would fit alone.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Hashable, Sequence

import structlog
import torch

from monitor.engine_steps import (
    EngineResult,
    EngineWork,
    Running,
    StepRecord,
    StepRunner,
    result_of,
)
from monitor.errors import NotReadyError, QueueFullError, SettingsError
from monitor.records import StepFailure
from monitor.work_queue import Priority, WorkQueue
from sae_core.language_model.products import bfloat16_is_faster
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


def placement(device: str, dtype: str, backend: str = "torch") -> tuple[str, tuple[str, ...]]:
    """Where the model runs, and in which data types it may: the first that fits is taken.

    `auto` is CUDA where there is one, and bfloat16 before float32 where the hardware has it.

    Under `onnx` auto is the CPU and float32, and CUDA is for its runtime to have.

    Raises:
        SettingsError: CUDA is asked for and not there.
    """
    if backend == "onnx":
        return "cpu" if device == "auto" else device, ("float32" if dtype == "auto" else dtype,)
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise SettingsError("device: found no usable CUDA device, expected one for cuda")
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
    if dtype != "auto":
        return device, (dtype,)
    fast = bfloat16_is_faster(torch.device(device))
    return device, ("bfloat16", "float32") if fast else ("float32",)


def devices(device: str, n: int, *, setting: str = "gpus") -> list[torch.device]:
    """Where `n` parts of a model go: the device alone, or the first `n` CUDA devices.

    Args:
        device: as `placement` decided it.
        setting: the one that asks for so many.

    Raises:
        SettingsError: there are fewer CUDA devices.
    """
    if n == 1:
        return [torch.device(device)]
    found = torch.cuda.device_count() if device == "cuda" else 0
    if found < n:
        raise SettingsError(f"{setting}: found {found} CUDA devices, expected at least {n}")
    return [torch.device(device, index) for index in range(n)]


class Engine:
    """Owns a `Scorer`, its thread and its queue.

    Args:
        max_step_tokens: token budget of one step.
        max_queue_tokens: tokens that may wait; beyond that `score` raises `QueueFullError`.
        max_cache_bytes: keys and values that may be held; beyond that those of the stream that
            was idle for longest go, and are recomputed on its next use.
        reuse_key: names all that scores depend on beside the tokens, so that tokens seen before
            take over what was computed then; None computes everything anew.
        fit_share: share of the work, replay left out, on whose tokens the whole SAEs are run too.
        on_step: called in the engine thread after each step; must not block.
        on_failure: the same for each step that failed, those tried again included.
        failure: why no step can succeed any more; empty while they can.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        max_step_tokens: int = 2048,
        max_queue_tokens: int = 65536,
        max_cache_bytes: int = MAX_CACHE_BYTES,
        reuse_key: str | None = None,
        fit_share: float = 0.0,
        on_step: Callable[[StepRecord], None] = lambda step: None,
        on_failure: Callable[[StepFailure], None] = lambda failure: None,
        failure: Callable[[], str] = lambda: "",
    ) -> None:
        self.scorer = scorer
        self._failure = failure
        self._fit_share = fit_share
        self._queue = WorkQueue[EngineWork](max_queue_tokens, self._begin)
        self._dropped: list[EngineWork] = []
        """Begun work whose caller has left; the thread lets go of its streams."""
        self._wake = threading.Condition()
        key = None if reuse_key is None else reuse_key.encode()
        self._cache = ScoreCache(scorer.open_stream, max_cache_bytes, key=key)
        self._steps = StepRunner(
            lambda: self.scorer,
            self._cache,
            max_step_tokens=max_step_tokens,
            end=self._end_step,
            fail=self._fail,
            on_step=on_step,
            on_failure=on_failure,
        )
        self._stopping = False
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def queue_tokens(self) -> int:
        """Tokens waiting or in the step that runs now."""
        return self._queue.n_tokens

    @property
    def max_queue_tokens(self) -> int:
        """Tokens that may wait."""
        return self._queue.max_tokens

    @property
    def alive(self) -> bool:
        """Whether the thread takes work, and can do it."""
        is_running = self._thread.is_alive() and not self._failed and not self._stopping
        return is_running and not self._failure()

    @property
    def failure(self) -> str:
        """Why no step can succeed any more, though the thread runs; empty while they can."""
        return self._failure()

    def check_alive(self) -> None:
        """Raises NotReadyError unless it is `alive`."""
        if self.failure:
            raise NotReadyError(
                f"engine: {self.failure}, expected every process of the model to run; "
                "the server has to be started again"
            )
        if not self.alive:
            raise NotReadyError("engine: not running, expected a live engine thread")

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

    def open_stream(self, *, reuses: bool = True) -> ScoredStream:
        """A new empty sequence; close it when it is not needed any more.

        Args:
            reuses: whether it takes over, and leaves behind, what others computed of its tokens.
        """
        return self._cache.open_stream(reuses=reuses)

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
        caller: Hashable = None,
        measure_fit: bool | None = None,
    ) -> EngineResult:
        """Scores the tokens of `source`.

        One call at a time for one stream. When this raises or is cancelled, the stream of an
        `OwnForward` may hold a part of the tokens (`stream.length` says how many), and a step
        that runs now may still add some: then only close it.

        Args:
            deadline: on the clock of time.monotonic; None waits for ever.
            caller: who shares the turns of this work; None shares them with nobody.
            measure_fit: whether to run the whole SAEs too; None leaves it to the engine's share.

        Raises:
            QueueFullError: the queue holds its limit; nothing was queued.
            DeadlineError: the deadline passed before the last token was scored.
            NotReadyError: the engine is stopping or has died.
            ActivationError: activations or logits hold NaN or infinity.
            ComputeMemoryError: there was no memory to score it, even alone.
        """
        n_tokens = source.n_tokens
        if measure_fit is None:
            measure_fit = priority is not Priority.REPLAY and random.random() < self._fit_share
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        work = EngineWork(
            n_tokens=n_tokens,
            priority=priority,
            caller=caller,
            deadline=deadline,
            source=source,
            measures_fit=measure_fit,
            future=loop.create_future(),
            loop=loop,
            queued_at=now,
        )
        with self._wake:
            self.check_alive()
            if not self._queue.has_room(n_tokens):
                waiting = self._queue.n_tokens
                raise QueueFullError(
                    f"queue: {waiting} tokens wait and {n_tokens} more were sent, "
                    f"expected at most {self.max_queue_tokens}",
                    retry_seconds=min(30.0, max(0.05, waiting / self._steps.tokens_per_second)),
                )
            self._queue.put(work)
            self._wake.notify()
        patience = asyncio.timeout(None if deadline is None else max(0.0, deadline - now))
        try:
            async with patience:
                return await work.future
        except TimeoutError:
            if not patience.expired():
                raise
            self._drop(work)
            raise work.late() from None
        except asyncio.CancelledError:
            self._drop(work)
            raise

    def _drop(self, work: EngineWork) -> None:
        with self._wake:
            if self._queue.drop(work):
                work.is_dropped = True
                if work.run is not None:
                    self._dropped.append(work)
                    self._wake.notify()

    def _run(self) -> None:
        try:
            while self._next_step():
                pass
        except BaseException:
            self._failed = True
            log.exception("engine_died")
            raise
        finally:
            with self._wake:
                self._stopping = True
                left = self._queue.drop_all()
            for work in left:
                self._fail(work, NotReadyError("engine: stopped before the tokens were scored"))

    def _next_step(self) -> bool:
        """Waits for work and runs a step of it; False when told to stop.

        A frame of its own: where one step's work lived on while the next is waited for, it would
        keep what its callers have closed.
        """
        with self._wake:
            while not (self._stopping or self._queue or self._dropped):
                self._wake.wait()
            self._let_go()
            if self._stopping:
                return False
            batch = self._queue.take(time.monotonic(), self._steps.step_tokens)
        for work in batch.expired:
            self._fail(work, work.late())
        if batch.parts:
            try:
                self._steps.run(batch.parts)
            except BaseException:
                for work, _ in batch.parts:
                    self._fail(work, NotReadyError("engine: died in the step of these tokens"))
                raise
        return True

    def _begin(self, work: EngineWork) -> int | None:
        """The queue's question whether work may begin; asked in the thread, with the lock held."""
        if isinstance(work.source, OwnForward):
            if not self._cache.admits(work.source):
                return None
            work.run = self._cache.begin(work.source)
        else:
            work.run = GivenRun(work.source)
        work.started_at = time.monotonic()
        return work.run.n_to_run

    def _end_step(self, running: Sequence[Running]) -> None:
        """Puts back what has tokens left, and answers for what has none."""
        finished: list[tuple[EngineWork, EngineResult]] = []
        with self._wake:
            for work, _, run in running:
                n_left = work.source.n_tokens - run.n_scored
                waits = self._queue.give_back(work, n_tokens=n_left, n_to_run=run.n_to_run)
                if not waits and not work.is_dropped:
                    finished.append((work, result_of(work, run)))
                    self._end(work)
            self._let_go()
        self._cache.settle(run.stream for _, _, run in running if isinstance(run, Continuation))
        for work, result in finished:
            self._resolve(work, result)

    def _fail(self, work: EngineWork, error: Exception) -> None:
        with self._wake:
            self._queue.drop(work)
            if not work.is_dropped:
                self._end(work)
        self._resolve(work, error)

    def _let_go(self) -> None:
        """Ends what callers have left behind; in the thread, with the lock held."""
        for work in self._dropped:
            self._end(work)
        self._dropped.clear()

    def _end(self, work: EngineWork) -> None:
        if isinstance(work.run, Continuation):
            self._cache.end(work.run)
        work.run = None

    @staticmethod
    def _resolve(work: EngineWork, outcome: EngineResult | Exception) -> None:
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
