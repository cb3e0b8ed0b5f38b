"""One step of the engine: a batch run and its scores handed on, or smaller batches where it fails.

Runs in the engine's thread; knows no queue.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from monitor.errors import (
    ActivationError,
    ComputeMemoryError,
    DeadlineError,
    NotReadyError,
    PayloadTooLargeError,
)
from monitor.records import StepFailure
from monitor.work_queue import Work
from sae_core.errors import RankError, ScorerError, TokenError
from sae_core.language_model.model import Segment
from sae_core.score_cache import ActivationSource, Continuation, GivenRun, ScoreCache
from sae_core.scorer import Scorer
from sae_core.vitals import FitSums, summed

log = structlog.get_logger(__name__)

GROWTH_TOKENS = 16
"""What a step's budget regains with each step, after it was cut for want of memory."""


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
    fits: Mapping[str, FitSums] = field(default_factory=dict)
    """By SAE, how well the whole of it fits; none where that was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one step of the engine did, for metrics."""

    n_segments: int
    n_tokens: int
    """Recomputed ones included."""
    forward_seconds: float
    encode_seconds: float


@dataclass(slots=True, eq=False, kw_only=True)
class EngineWork(Work):
    """One call of `Engine.score`."""

    source: ActivationSource
    future: asyncio.Future[EngineResult]
    loop: asyncio.AbstractEventLoop
    queued_at: float
    started_at: float | None = None
    run: Continuation | GivenRun | None = None
    """From the first step on."""
    forward_seconds: float = 0.0
    encode_seconds: float = 0.0
    measures_fit: bool = False
    """Whether the whole SAEs are run on its tokens too."""
    fits: list[Mapping[str, FitSums]] = field(default_factory=list)
    """One for each of its steps."""
    is_dropped: bool = False
    """Whether its caller stopped waiting; set under the lock."""

    def late(self) -> DeadlineError:
        """What its caller is told past the deadline."""
        return DeadlineError(
            f"deadline: passed with {self.n_tokens} of {self.source.n_tokens} tokens not scored"
        )


Parts = Sequence[tuple[EngineWork, int]]
"""Work, and how many of its tokens a step runs."""

Running = tuple[EngineWork, int, Continuation | GivenRun]
"""Work in a step, its tokens there, and where it stands."""


class StepRunner:
    """Runs batches over one scorer and cache.

    Args:
        scorer: asked at every step, so that it can be replaced.
        end: takes what a step has run, once the cache has its scores.
        fail: tells a work's caller why it failed.
    """

    def __init__(
        self,
        scorer: Callable[[], Scorer],
        cache: ScoreCache,
        *,
        max_step_tokens: int,
        end: Callable[[Sequence[Running]], None],
        fail: Callable[[EngineWork, Exception], None],
        on_step: Callable[[StepRecord], None],
        on_failure: Callable[[StepFailure], None],
    ) -> None:
        self.step_tokens = max_step_tokens
        """The most tokens that the next step should have."""
        self.tokens_per_second = 1000.0
        """Of the last steps."""
        self._scorer = scorer
        self._cache = cache
        self._max_step_tokens = max_step_tokens
        self._end = end
        self._fail = fail
        self._on_step = on_step
        self._on_failure = on_failure

    def run(self, batch: Parts) -> None:
        """Runs a batch, in smaller ones where it fails; what fails alone fails for its caller."""
        todo: list[Parts] = [batch]
        while todo:
            parts = todo.pop()
            error = self._try(parts)
            if error is None:
                continue
            kind = _kind(error)
            self._on_failure(kind)
            work, n_tokens = parts[0]
            if kind is StepFailure.MEMORY:
                error = self._make_room(error, sum(n for _, n in parts))
            if len(parts) > 1:
                half = len(parts) // 2
                todo += [parts[half:], parts[:half]]
            elif kind is StepFailure.MEMORY and n_tokens > 1:
                todo.append([(work, n_tokens // 2)])
            else:
                self._fail(work, _explained(error, kind))

    def _try(self, parts: Parts) -> Exception | None:
        """One step; gives back what it raised, and then no stream has grown."""
        # Work that was dropped after an earlier part of a batch has none.
        running = [(work, n, work.run) for work, n in parts if work.run is not None]
        if not running:
            return None
        started = time.monotonic()
        try:
            for _, _, run in running:
                run.restore()
            pieces = [run.part(n) for _, n, run in running]
            measured = [i for i, (work, _, _) in enumerate(running) if work.measures_fit]
            # What stands in for a scorer need not know of it.
            scores = self._scorer().step(pieces, *([measured] if measured else []))
        except Exception as error:
            return error
        n_tokens = sum(n for _, n, _ in running)
        elapsed = time.monotonic() - started
        if n_tokens:
            speed = n_tokens / max(elapsed, 1e-6)
            self.tokens_per_second += 0.2 * (speed - self.tokens_per_second)
        for index, fits in scores.fits.items():
            running[index][0].fits.append(fits)
        for (work, n, run), piece, scored in zip(running, pieces, scores.segments, strict=True):
            if isinstance(run, GivenRun):
                run.take(scored)
            else:
                assert isinstance(piece, Segment)
                self._cache.take(run, piece, scored)
            work.forward_seconds += scores.forward_seconds * n / max(n_tokens, 1)
            work.encode_seconds += scores.encode_seconds * n / max(n_tokens, 1)
        self.step_tokens = min(self._max_step_tokens, self.step_tokens + GROWTH_TOKENS)
        if n_tokens:
            self._on_step(
                StepRecord(
                    n_segments=len(running),
                    n_tokens=n_tokens,
                    forward_seconds=scores.forward_seconds,
                    encode_seconds=scores.encode_seconds,
                )
            )
        self._end(running)
        return None

    def _make_room(self, error: Exception, n_tokens: int) -> Exception:
        """After a step found no memory: less of it is asked for, and what can be had is freed."""
        error = error.with_traceback(None)  # its frames hold the step's tensors
        self.step_tokens = max(1, min(self.step_tokens, n_tokens) // 2)
        self._cache.drop_idle()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning("step_out_of_memory", tokens=n_tokens, next_step_tokens=self.step_tokens)
        return error


def result_of(work: EngineWork, run: Continuation | GivenRun) -> EngineResult:
    scores = run.scores()
    return EngineResult(
        logits=scores.logits,
        latent_acts=scores.latent_acts,
        queue_seconds=(work.started_at or work.queued_at) - work.queued_at,
        forward_seconds=work.forward_seconds,
        encode_seconds=work.encode_seconds,
        fits=summed(work.fits),
    )


def _kind(error: Exception) -> StepFailure:
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch on CPU
    ):
        return StepFailure.MEMORY
    if isinstance(error, ScorerError):
        return StepFailure.NOT_FINITE
    return StepFailure.INPUT if isinstance(error, TokenError) else StepFailure.ERROR


def _explained(error: Exception, kind: StepFailure) -> Exception:
    """What the caller is told; the rest goes into the log."""
    if kind is StepFailure.NOT_FINITE:
        return ActivationError(str(error))
    if kind is StepFailure.INPUT:
        return PayloadTooLargeError(str(error))
    if isinstance(error, RankError):
        return NotReadyError(f"engine: {error}")
    log.error("engine_step_failed", exc_info=error)
    if kind is StepFailure.MEMORY:
        return ComputeMemoryError(
            "engine: found no memory to score one token of this request, expected some"
        )
    return error
