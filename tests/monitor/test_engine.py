from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch

from monitor.engine import Engine, devices
from monitor.engine_steps import StepRecord
from monitor.errors import (
    ActivationError,
    ComputeMemoryError,
    DeadlineError,
    NotReadyError,
    QueueFullError,
    SettingsError,
)
from monitor.records import StepFailure
from monitor.work_queue import Priority
from sae_core.errors import RankError, ScorerError
from sae_core.language_model.model import Segment
from sae_core.language_model.token_streams import KVStream
from sae_core.score_cache import OwnForward
from sae_core.scorer import Scorer, SegmentScores, StepScores

POISON = 666
TORCH_CPU_SAYS = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


class FakeScorer:
    """Logits that spell out the token and its place; waits at a gate so that a test can queue."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.in_step = threading.Event()
        self.steps: list[list[list[int]]] = []
        self.most_tokens = 10**9
        """Beyond which there is no memory."""
        self.no_memory: Exception = torch.OutOfMemoryError("CUDA out of memory")

    def open_stream(self) -> KVStream:
        return KVStream(1)

    def step(self, segments: Sequence[Segment]) -> StepScores:
        self.in_step.set()
        assert self.gate.wait(10)
        self.steps.append([list(s.token_ids) for s in segments])
        if sum(len(s.token_ids) for s in segments) > self.most_tokens:
            raise self.no_memory
        if any(POISON in s.token_ids for s in segments):
            raise ScorerError("segment 0, position 0: not finite")
        scored = []
        for segment in segments:
            start = segment.stream.length
            segment.stream.advance(len(segment.token_ids))
            rows = [[[float(t), float(start + i), 0.0]] for i, t in enumerate(segment.token_ids)]
            logits = np.array(rows, np.float32)
            scored.append(SegmentScores(logits, np.zeros((len(rows), 2), np.float32)))
        return StepScores(tuple(scored), 0.25, 0.125)


@pytest.fixture
def scorer() -> FakeScorer:
    return FakeScorer()


@pytest.fixture
def steps() -> list[StepRecord]:
    return []


@pytest.fixture
def failures() -> list[StepFailure]:
    return []


@pytest.fixture
async def engine(
    scorer: FakeScorer, steps: list[StepRecord], failures: list[StepFailure]
) -> AsyncIterator[Engine]:
    engine = Engine(
        cast(Scorer, scorer),
        max_step_tokens=8,
        max_queue_tokens=40,
        on_step=steps.append,
        on_failure=failures.append,
    )
    engine.start()
    yield engine
    scorer.gate.set()
    await asyncio.to_thread(engine.stop)


def score(engine: Engine, ids: Sequence[int], **changes: Any) -> asyncio.Task[Any]:
    options: dict[str, Any] = {"priority": Priority.PROMPT, **changes}
    return asyncio.create_task(engine.score(OwnForward(engine.open_stream(), ids), **options))


async def hold(engine: Engine, scorer: FakeScorer) -> asyncio.Task[Any]:
    """Work that keeps the engine busy until the gate opens."""
    scorer.gate.clear()
    scorer.in_step.clear()
    busy = score(engine, [1])
    await asyncio.to_thread(scorer.in_step.wait, 10)
    return busy


async def test_long_work_is_chunked_and_comes_back_whole(engine: Engine) -> None:
    result = await score(engine, list(range(100, 120)))
    assert result.logits[:, 0, 0].tolist() == list(range(100, 120))
    assert result.logits[:, 0, 1].tolist() == list(range(20))
    assert result.latent_acts.shape == (20, 2)
    assert result.forward_seconds == pytest.approx(0.75)


async def test_waiting_work_shares_a_step(
    engine: Engine, scorer: FakeScorer, steps: list[StepRecord]
) -> None:
    busy = await hold(engine, scorer)
    tasks = [score(engine, [i, i]) for i in range(10, 14)]
    await asyncio.sleep(0.05)
    scorer.gate.set()
    results = await asyncio.gather(busy, *tasks)
    assert scorer.steps[1] == [[10, 10], [11, 11], [12, 12], [13, 13]]
    assert [r.logits[0, 0, 0] for r in results[1:]] == [10, 11, 12, 13]
    assert results[1].forward_seconds == pytest.approx(0.25 / 4)
    assert (steps[1].n_segments, steps[1].n_tokens) == (4, 8)


async def test_completions_are_done_before_prompts_before_replay(
    engine: Engine, scorer: FakeScorer
) -> None:
    busy = await hold(engine, scorer)
    done: list[Priority] = []
    for priority in reversed(Priority):
        task = score(engine, [priority] * 8, priority=priority)
        task.add_done_callback(lambda _, p=priority: done.append(p))
    await asyncio.sleep(0.05)
    scorer.gate.set()
    await busy
    while len(done) < 3:
        await asyncio.sleep(0.01)
    assert done == list(Priority)


async def test_a_callers_backlog_does_not_keep_another_waiting(
    engine: Engine, scorer: FakeScorer
) -> None:
    busy = await hold(engine, scorer)
    tasks = [score(engine, [7] * 3, caller="busy") for _ in range(10)]
    tasks.append(score(engine, [8] * 4, caller="other"))
    await asyncio.sleep(0.05)
    scorer.gate.set()
    await asyncio.gather(busy, *tasks)
    assert next(i for i, step in enumerate(scorer.steps) if [8] * 4 in step) == 2


async def test_a_long_prompt_does_not_keep_short_ones_waiting(
    engine: Engine, scorer: FakeScorer
) -> None:
    busy = await hold(engine, scorer)
    tasks = [score(engine, [7] * 30), score(engine, [8] * 4)]
    await asyncio.sleep(0.05)
    scorer.gate.set()
    await asyncio.gather(busy, *tasks)
    steps_until_short = next(i for i, step in enumerate(scorer.steps) if [8] * 4 in step)
    assert steps_until_short == 2


async def test_full_queue_refuses_with_a_hint_and_recovers(
    engine: Engine, scorer: FakeScorer
) -> None:
    busy = await hold(engine, scorer)
    waiting = score(engine, [2] * 39)
    await asyncio.sleep(0.05)
    assert engine.queue_tokens == 40
    with pytest.raises(QueueFullError, match="40 tokens wait and 2 more") as caught:
        await score(engine, [3, 3])
    assert caught.value.retry_seconds > 0
    scorer.gate.set()
    await asyncio.gather(busy, waiting)
    assert engine.queue_tokens == 0
    await score(engine, [3, 3])


async def test_cancelled_work_is_dropped_before_it_costs_a_step(
    engine: Engine, scorer: FakeScorer
) -> None:
    busy = await hold(engine, scorer)
    doomed, kept = score(engine, [50]), score(engine, [51])
    await asyncio.sleep(0.05)
    assert engine.queue_tokens == 3
    doomed.cancel()
    await asyncio.sleep(0.05)
    assert engine.queue_tokens == 2
    scorer.gate.set()
    await asyncio.gather(busy, kept)
    assert not any([50] in step for step in scorer.steps)
    assert engine.queue_tokens == 0


async def test_passed_deadline_drops_work_and_says_how_much(
    engine: Engine, scorer: FakeScorer
) -> None:
    busy = await hold(engine, scorer)
    late = score(engine, [50, 50], deadline=time.monotonic() + 0.02)
    await asyncio.sleep(0.1)
    scorer.gate.set()
    await busy
    with pytest.raises(DeadlineError, match="2 of 2 tokens"):
        await late
    assert not any([50, 50] in step for step in scorer.steps)
    assert engine.queue_tokens == 0


async def test_one_bad_sequence_does_not_take_its_neighbours_along(
    engine: Engine, scorer: FakeScorer
) -> None:
    busy = await hold(engine, scorer)
    good, bad, other = score(engine, [4]), score(engine, [POISON]), score(engine, [5])
    await asyncio.sleep(0.05)
    scorer.gate.set()
    await busy
    with pytest.raises(ActivationError, match="position 0"):
        await bad
    assert (await good).logits[0, 0, 0] == 4
    assert (await other).logits[0, 0, 0] == 5
    assert engine.queue_tokens == 0
    assert engine.alive


async def test_a_step_without_memory_is_tried_in_halves_and_nobody_fails(
    engine: Engine, scorer: FakeScorer, steps: list[StepRecord], failures: list[StepFailure]
) -> None:
    busy = await hold(engine, scorer)
    scorer.most_tokens = 2
    tasks = [score(engine, [10 * i + n for n in range(3)]) for i in range(1, 4)]
    await asyncio.sleep(0.05)
    scorer.gate.set()
    results = await asyncio.gather(busy, *tasks)
    for i, result in enumerate(results[1:], 1):
        assert result.logits[:, 0, 0].tolist() == [10 * i, 10 * i + 1, 10 * i + 2]
        assert result.logits[:, 0, 1].tolist() == [0, 1, 2]
    assert max(step.n_tokens for step in steps) == 2
    assert set(failures) == {StepFailure.MEMORY}
    assert (engine.queue_tokens, engine.cache().session_bytes) == (0, 0)


@pytest.mark.parametrize(
    "no_memory",
    [torch.OutOfMemoryError("CUDA"), MemoryError(), RuntimeError(TORCH_CPU_SAYS)],
    ids=["cuda", "python", "torch"],
)
async def test_a_request_without_memory_fails_alone_and_the_engine_goes_on(
    engine: Engine, scorer: FakeScorer, no_memory: Exception
) -> None:
    scorer.most_tokens, scorer.no_memory = 0, no_memory
    with pytest.raises(ComputeMemoryError, match="one token"):
        await score(engine, [1, 2, 3])
    assert engine.queue_tokens == 0
    scorer.most_tokens = 10**9
    assert (await score(engine, [4])).logits[0, 0, 0] == 4


async def test_a_bug_in_a_step_fails_its_request_and_the_engine_goes_on(
    engine: Engine, scorer: FakeScorer, failures: list[StepFailure]
) -> None:
    scorer.most_tokens, scorer.no_memory = 0, ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        await score(engine, [1])
    scorer.most_tokens = 10**9
    await score(engine, [4])
    assert failures == [StepFailure.ERROR]


async def test_a_deadline_does_not_wait_for_the_step_that_runs(
    engine: Engine, scorer: FakeScorer
) -> None:
    scorer.gate.clear()
    late = score(engine, [1] * 20, deadline=time.monotonic() + 0.05)
    with pytest.raises(DeadlineError, match="20 of 20 tokens"):
        await late
    assert engine.queue_tokens == 0
    scorer.gate.set()
    await score(engine, [2])
    assert len(scorer.steps) == 2


async def test_stopping_tells_those_who_wait(engine: Engine, scorer: FakeScorer) -> None:
    busy = await hold(engine, scorer)
    waiting = score(engine, [9])
    await asyncio.sleep(0.05)
    stopping = asyncio.create_task(asyncio.to_thread(engine.stop))
    await asyncio.sleep(0.05)
    scorer.gate.set()
    await stopping
    await busy
    with pytest.raises(NotReadyError):
        await waiting
    with pytest.raises(NotReadyError):
        await score(engine, [9])


async def test_open_sequences_are_counted_until_they_are_let_go(engine: Engine) -> None:
    streams = [engine.open_stream(), engine.open_stream()]
    assert (engine.cache().sessions, engine.cache().session_bytes) == (2, 0)
    streams.pop()
    assert engine.cache().sessions == 1
    engine.close_stream(streams[0])
    assert engine.cache().sessions == 0


async def test_a_lost_rank_fails_the_step_and_every_call_after_it(scorer: FakeScorer) -> None:
    failure = ""

    def lost(_: Sequence[Segment]) -> StepScores:
        nonlocal failure
        failure = "rank 1 of 2 ended with exit code -9"
        raise RankError(failure)

    engine = Engine(cast(Scorer, scorer), failure=lambda: failure)
    engine.start()
    try:
        assert engine.alive
        scorer.step = lost  # type: ignore[method-assign]
        stream = engine.open_stream()
        for _ in range(2):
            with pytest.raises(NotReadyError, match="engine: rank 1 of 2 ended with exit code -9"):
                await engine.score(OwnForward(stream, [1]), priority=Priority.PROMPT)
        assert not engine.alive
        assert engine.failure == failure
    finally:
        engine.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_thread_that_dies_in_a_step_tells_those_in_it(scorer: FakeScorer) -> None:
    def broken(step: StepRecord) -> None:
        raise RuntimeError("a bug outside the step itself")

    engine = Engine(cast(Scorer, scorer), on_step=broken)
    engine.start()
    with pytest.raises(NotReadyError, match="engine: died in the step of these tokens"):
        await asyncio.wait_for(score(engine, [1]), 5)
    engine.stop()
    assert not engine.alive


def test_more_devices_than_there_are_is_refused() -> None:
    with pytest.raises(SettingsError, match="gpus: found 0 CUDA devices, expected at least 2"):
        devices("cpu", 2)
    assert [str(device) for device in devices("cpu", 1)] == ["cpu"]
