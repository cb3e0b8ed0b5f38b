from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from monitor.work_queue import MIN_QUANTUM_TOKENS, Batch, Priority, Work, WorkQueue

BUDGET = 256


def queue(begin: Callable[[Work], int | None] | None = None) -> WorkQueue[Work]:
    return WorkQueue(10**6, begin or (lambda work: work.n_tokens))


def put(
    waiting: WorkQueue[Work],
    n_tokens: int,
    caller: str | None = None,
    priority: Priority = Priority.PROMPT,
    deadline: float | None = None,
) -> Work:
    work = Work(n_tokens=n_tokens, priority=priority, caller=caller, deadline=deadline)
    waiting.put(work)
    return work


def run(waiting: WorkQueue[Work], budget: int = BUDGET, now: float = 0.0) -> Batch[Work]:
    """One step that scores all that it takes."""
    batch = waiting.take(now, budget)
    for work, n in batch.parts:
        assert work.n_to_run is not None
        waiting.give_back(work, n_tokens=work.n_tokens - n, n_to_run=work.n_to_run - n)
    return batch


def steps(waiting: WorkQueue[Work], budget: int = BUDGET) -> Iterator[dict[Work, int]]:
    while waiting:
        yield dict(run(waiting, budget).parts)


def test_a_thousand_prompts_of_one_caller_delay_another_by_one_step() -> None:
    waiting = queue()
    for _ in range(1000):
        put(waiting, 100, "busy")
    run(waiting)
    single = put(waiting, 100, "other")
    assert dict(run(waiting).parts)[single] == 100


def test_callers_without_a_name_share_with_nobody() -> None:
    waiting = queue()
    works = [put(waiting, 1000) for _ in range(4)]
    assert dict(run(waiting).parts) == dict.fromkeys(works, BUDGET // 4)


def test_many_callers_get_turns_worth_their_step_and_all_get_one() -> None:
    waiting = queue()
    works = [put(waiting, MIN_QUANTUM_TOKENS, f"caller {i}") for i in range(20)]
    taken = list(steps(waiting))
    assert [list(step) for step in taken] == [works[i : i + 4] for i in range(0, 20, 4)]


@pytest.mark.parametrize("budget", [100, 150, 200, 333, 2000])
@pytest.mark.parametrize("n_callers", [2, 3, 7, 32])
def test_callers_get_the_same_in_the_long_run(budget: int, n_callers: int) -> None:
    waiting = queue()
    works = [put(waiting, 10**6, f"caller {i}") for i in range(n_callers)]
    for _ in range(200):
        run(waiting, budget)
    got = [10**6 - work.n_tokens for work in works]
    assert sum(got) == 200 * budget
    assert max(got) - min(got) <= 2 * max(MIN_QUANTUM_TOKENS, budget // n_callers)


def test_pieces_of_256_streams_fit_into_one_step() -> None:
    waiting = queue()
    works = [put(waiting, 4, f"{i}", Priority.COMPLETION) for i in range(256)]
    prompt = put(waiting, 32_000)
    batch = dict(run(waiting, 2048).parts)
    assert all(batch[work] == 4 for work in works)
    assert batch[prompt] == 1024


def test_one_callers_work_goes_in_order_and_long_work_behind_after_a_chunk() -> None:
    waiting = queue()
    long, *short = [put(waiting, n, "one") for n in (600, 100, 100)]
    taken = list(steps(waiting))
    assert taken == [{long: 256}, {short[0]: 100, short[1]: 100, long: 56}, {long: 256}, {long: 32}]


def test_completions_go_before_prompts_before_replay_which_get_a_small_share() -> None:
    waiting = queue()
    replay, prompt, completion = (put(waiting, 10_000, priority=p) for p in reversed(Priority))
    assert dict(run(waiting).parts) == {completion: 224, prompt: 16, replay: 16}
    waiting.drop(completion)
    assert dict(run(waiting).parts) == {prompt: 240, replay: 16}


def test_a_share_that_nobody_needs_goes_to_those_who_do() -> None:
    waiting = queue()
    completion = put(waiting, 10_000, priority=Priority.COMPLETION)
    replay = put(waiting, 3, priority=Priority.REPLAY)
    assert dict(run(waiting).parts) == {completion: 253, replay: 3}


def test_steps_of_one_token_go_to_the_first_priority() -> None:
    waiting = queue()
    put(waiting, 5, priority=Priority.REPLAY)
    first = put(waiting, 5, priority=Priority.COMPLETION)
    assert dict(run(waiting, 1).parts) == {first: 1}


def test_work_past_its_deadline_is_not_worth_a_step() -> None:
    waiting = queue()
    late = put(waiting, 10, "one", deadline=1.0)
    kept = put(waiting, 10, "one", deadline=1.5)
    batch = run(waiting, now=1.0)
    assert (batch.expired, dict(batch.parts)) == ([late], {kept: 10})
    assert waiting.n_tokens == 0


def test_work_dropped_while_in_a_step_does_not_come_back() -> None:
    waiting = queue()
    work = put(waiting, 1000)
    ((taken, n),) = waiting.take(0.0, BUDGET).parts
    assert waiting.drop(taken)
    assert waiting.n_tokens == 0
    assert not waiting.give_back(work, n_tokens=1000 - n, n_to_run=1000 - n)
    assert not waiting.drop(work)
    assert not waiting
    assert waiting.n_tokens == 0


def test_recomputed_tokens_count_for_steps_and_not_for_the_limit() -> None:
    waiting = queue(lambda work: work.n_tokens + 500)
    put(waiting, 100)
    assert waiting.n_tokens == 100
    assert [sum(step.values()) for step in steps_recomputing(waiting)] == [256, 256, 88]


def steps_recomputing(waiting: WorkQueue[Work]) -> Iterator[dict[Work, int]]:
    while waiting:
        batch = waiting.take(0.0, BUDGET)
        for work, n in batch.parts:
            assert work.n_to_run is not None
            left = work.n_to_run - n
            waiting.give_back(work, n_tokens=min(work.n_tokens, left), n_to_run=left)
        yield dict(batch.parts)


def test_work_with_nothing_to_run_still_comes_along() -> None:
    waiting = queue(lambda work: 0)
    work = put(waiting, 64)
    assert waiting.take(0.0, BUDGET).parts == [(work, 0)]


def test_nothing_begins_before_work_that_has_to_wait_for_memory() -> None:
    rooms = {"large": False}
    waiting = queue(lambda work: work.n_tokens if rooms.get(str(work.caller), True) else None)
    begun = put(waiting, 400, "begun")
    run(waiting)
    large = put(waiting, 10, "large")
    put(waiting, 10, "small")
    put(waiting, 10, "replay", Priority.REPLAY)
    urgent = put(waiting, 10, "urgent", Priority.COMPLETION)
    assert set(dict(run(waiting).parts)) == {urgent, begun}
    assert not run(waiting).parts
    rooms["large"] = True
    assert large in dict(run(waiting).parts)
    assert not waiting


def test_dropping_what_waits_for_memory_lets_the_next_begin() -> None:
    waiting = queue(lambda work: None if work.caller == "large" else work.n_tokens)
    large, small = put(waiting, 10, "large"), put(waiting, 10, "small")
    assert not run(waiting).parts
    waiting.drop(large)
    assert dict(run(waiting).parts) == {small: 10}


def test_room_is_counted_in_tokens_and_a_lone_work_always_has_some() -> None:
    waiting = WorkQueue[Work](100, lambda work: work.n_tokens)
    assert waiting.has_room(10**9)
    put(waiting, 99)
    assert waiting.has_room(1)
    assert not waiting.has_room(2)


def test_names_of_callers_that_are_done_are_forgotten() -> None:
    waiting = queue()
    for i in range(1000):
        put(waiting, 1 + i % 100, f"caller {i}", Priority(i % 3))
        if i % 7 == 0:
            waiting.drop(put(waiting, 5, f"gone {i}"))
        if i % 5 == 0:
            run(waiting)
    for _ in steps(waiting):
        pass
    assert not any(waiting._flows.values())


class QueueMachine(RuleBasedStateMachine):
    """Random work, steps and drops; every token is scored once, or counted where it was dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.room = True
        self.queue = WorkQueue[Work](10**6, lambda work: work.n_tokens if self.room else None)
        self.owed: dict[Work, int] = {}
        self.in_step: list[tuple[Work, int]] = []

    @rule(
        n_tokens=st.integers(1, 500),
        priority=st.sampled_from(Priority),
        caller=st.sampled_from([None, "a", "b", "c"]),
        ends_in=st.sampled_from([math.inf, 1.0, 3.0]),
    )
    def put(self, n_tokens: int, priority: Priority, caller: str | None, ends_in: float) -> None:
        work = Work(
            n_tokens=n_tokens, priority=priority, caller=caller, deadline=self.now + ends_in
        )
        self.queue.put(work)
        self.owed[work] = n_tokens

    @precondition(lambda self: not self.in_step)
    @rule(budget=st.integers(1, 300))
    def take(self, budget: int) -> None:
        batch = self.queue.take(self.now, budget)
        self.in_step = batch.parts
        works = [work for work, _ in batch.parts]
        assert len(set(works)) == len(works)
        taken = sum(n for _, n in batch.parts)
        assert taken <= budget
        for work in batch.expired:
            assert work.deadline is not None and work.deadline <= self.now
            del self.owed[work]
        if self.room:  # a step is full, or takes all that waits
            assert taken == min(budget, sum(self.owed.values()))
        for work, n in batch.parts:
            assert 1 <= n <= self.owed[work]

    @rule()
    def end_step(self) -> None:
        for work, n in self.in_step:
            if work not in self.owed:
                assert not self.queue.give_back(work, n_tokens=7, n_to_run=7)
                continue
            self.owed[work] -= n
            left = self.owed[work]
            assert self.queue.give_back(work, n_tokens=left, n_to_run=left) == (left > 0)
            if not left:
                del self.owed[work]
        self.in_step = []

    @precondition(lambda self: self.owed)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        work = data.draw(st.sampled_from(list(self.owed)))
        assert self.queue.drop(work)
        del self.owed[work]

    @rule(seconds=st.floats(0.1, 2.0), room=st.booleans())
    def time_passes(self, seconds: float, room: bool) -> None:
        self.now += seconds
        self.room = room

    @invariant()
    def counters_are_exact(self) -> None:
        assert self.queue.n_tokens == sum(self.owed.values())
        waiting = set(self.owed) - {work for work, _ in self.in_step}
        assert bool(self.queue) == bool(waiting)

    def teardown(self) -> None:
        self.end_step()
        self.room = True
        while self.owed:
            self.take(300)
            self.end_step()
        assert self.queue.n_tokens == 0
        assert not any(self.queue._flows.values())


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=30), st.integers(1, 2048))
@settings(max_examples=100, deadline=None)
def test_every_token_of_any_mix_is_taken_once(lengths: list[int], budget: int) -> None:
    waiting = queue()
    for i, n_tokens in enumerate(lengths):
        put(waiting, n_tokens, f"caller {i % 4}", Priority(i % 3))
    taken = [sum(step.values()) for step in steps(waiting, budget)]
    assert sum(taken) == sum(lengths)
    assert all(n == budget for n in taken[:-1])
