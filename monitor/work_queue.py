"""What waits for the engine, and what of it the next step takes. Knows no threads and no clock.

Priorities come first: completions before prompts before replay. A lower one that waits still gets
a small share of every step, so that it is slow and never stands still. Within one priority callers
take turns by tokens (deficit round robin, Shreedhar and Varghese 1995): the work of a step can be
cut anywhere, so a turn is `quantum` tokens, whatever the lengths of a caller's texts. One caller's
work goes in order of arrival; what a step leaves of it goes behind the rest.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Generic, TypeVar

MIN_QUANTUM_TOKENS = 64
"""Fewest tokens of a caller's turn, where callers are many: two prefix blocks, so that chunks stay
worth their step."""

LOWER_PRIORITY_SHARE = 16
"""A priority that waits behind others gets one part in so many of each step's tokens."""


class Priority(IntEnum):
    """Smaller goes first."""

    COMPLETION = 0
    PROMPT = 1
    REPLAY = 2


class _Place(Enum):
    WAITING = "waiting"
    IN_STEP = "in step"
    GONE = "gone"


@dataclass(slots=True, eq=False, kw_only=True)
class Work:
    """Tokens of one caller that want scores; subclasses add whose they are."""

    n_tokens: int
    """That have no scores yet; the queue's own from `put` on."""
    priority: Priority
    caller: Hashable
    """Who shares its turns; None shares them with nobody."""
    deadline: float | None = None
    """After which it is not worth a step."""
    n_to_run: int | None = field(default=None, init=False)
    """Tokens that steps still have to take, recomputed ones included; None until begun."""
    _place: _Place = field(default=_Place.WAITING, init=False)


W = TypeVar("W", bound=Work)


@dataclass(slots=True)
class _Flow(Generic[W]):
    """One caller's work of one priority."""

    waiting: deque[W] = field(default_factory=deque)
    left: int = 0
    """Tokens left of its turn; 0 between two turns."""


@dataclass(frozen=True, slots=True)
class Batch(Generic[W]):
    """What one step takes."""

    parts: list[tuple[W, int]]
    """Work, and how many of its `n_to_run` tokens; each work once."""
    expired: list[W]
    """Work whose deadline has passed; it has left the queue."""


class WorkQueue(Generic[W]):
    """Work that waits, in turns of its callers. Not safe for threads.

    Args:
        max_tokens: what may wait or be in a step, but for one work that finds nothing else there.
        begin: asked once for each work before its first step: the tokens to run, or None where it
            cannot begin yet. From then on nothing of its priority or a lower one begins before it.
    """

    def __init__(self, max_tokens: int, begin: Callable[[W], int | None]) -> None:
        self.max_tokens = max_tokens
        self.n_tokens = 0
        """Tokens without scores that wait or are in a step."""
        self._begin = begin
        self._flows: dict[Priority, OrderedDict[Hashable, _Flow[W]]] = {
            priority: OrderedDict() for priority in Priority
        }
        self._n_waiting = dict.fromkeys(Priority, 0)
        self._held_up: dict[Priority, W] = {}

    def __bool__(self) -> bool:
        """Whether any work waits."""
        return any(self._n_waiting.values())

    def has_room(self, n_tokens: int) -> bool:
        """Whether so many more tokens may wait."""
        return not self.n_tokens or self.n_tokens + n_tokens <= self.max_tokens

    def put(self, work: W) -> None:
        """Adds work; see `has_room`."""
        self.n_tokens += work.n_tokens
        self._append(work)

    def take(self, now: float, budget: int) -> Batch[W]:
        """The work of a step of at most `budget` tokens, which is in the step until `give_back`.

        Takes as many tokens as there are and may begin. Work of no tokens to run comes along.

        Args:
            now: on the clock of the deadlines.
        """
        step = _Step[W](now, budget)
        for work in sorted(self._held_up.values(), key=lambda work: work.priority):
            self._may_begin(work)
        waiting = [priority for priority in Priority if self._n_waiting[priority]]
        share = max(1, budget // LOWER_PRIORITY_SHARE)
        for n_before, priority in enumerate(waiting, 1):
            kept = max(0, min(share * (len(waiting) - n_before), step.left - 1))
            self._take_turns(priority, step, step.left - kept)
        for priority in waiting:  # what the lower ones had no use for
            self._take_turns(priority, step, step.left)
        for work in step.parts:
            if work._place is _Place.WAITING:
                self._remove(work)
            work._place = _Place.IN_STEP
        return Batch(list(step.parts.items()), step.expired)

    def give_back(self, work: W, *, n_tokens: int, n_to_run: int) -> bool:
        """Work after its step, with the tokens that have no scores yet and those still to run.

        Returns whether it waits again: False where none is left, or where it was dropped meanwhile.
        """
        if work._place is _Place.GONE:
            return False
        self.n_tokens += n_tokens - work.n_tokens
        work.n_tokens, work.n_to_run = n_tokens, n_to_run
        if not n_tokens:
            self._leave(work)
            return False
        work._place = _Place.WAITING
        self._append(work)
        return True

    def drop(self, work: W) -> bool:
        """Forgets work, whether it waits or is in a step; False where it had left before."""
        if work._place is _Place.GONE:
            return False
        if work._place is _Place.WAITING:
            self._remove(work)
        self._leave(work)
        return True

    def drop_all(self) -> list[W]:
        """Forgets everything that waits, and gives it."""
        dropped = [w for flows in self._flows.values() for f in flows.values() for w in f.waiting]
        for work in dropped:
            self.drop(work)
        return dropped

    def _append(self, work: W) -> None:
        flow = self._flows[work.priority].setdefault(_caller(work), _Flow())
        flow.waiting.append(work)
        self._n_waiting[work.priority] += 1

    def _remove(self, work: W) -> None:
        """Takes work out of its flow, which stays: what is left of a turn is for the next step."""
        self._flows[work.priority][_caller(work)].waiting.remove(work)
        self._n_waiting[work.priority] -= 1

    def _leave(self, work: W) -> None:
        self.n_tokens -= work.n_tokens
        work._place = _Place.GONE
        if self._held_up.get(work.priority) is work:
            del self._held_up[work.priority]
        flows = self._flows[work.priority]
        flow = flows.get(_caller(work))
        if flow is not None and not flow.waiting:
            del flows[_caller(work)]

    def _take_turns(self, priority: Priority, step: _Step[W], budget: int) -> None:
        """Gives the callers of one priority their turns, until the budget or their work ends."""
        flows = self._flows[priority]
        quantum = min(budget, max(MIN_QUANTUM_TOKENS, budget // max(1, len(flows))))
        stuck: set[Hashable] = set()
        while budget > 0 and len(stuck) < len(flows):
            caller, flow = next(iter(flows.items()))
            if caller in stuck:
                flows.move_to_end(caller)
                continue
            flow.left = flow.left or quantum
            taken = self._take_turn(flow, step, min(budget, flow.left))
            budget -= taken
            flow.left -= taken
            if not flow.waiting:
                flows.pop(caller, None)
            elif not flow.left:
                flows.move_to_end(caller)
            elif budget:  # what it has may not begin yet
                flow.left = 0
                stuck.add(caller)

    def _take_turn(self, flow: _Flow[W], step: _Step[W], budget: int) -> int:
        """Takes up to `budget` tokens of one caller's work; returns how many."""
        taken = 0
        while taken < budget and (work := self._next(flow, step)) is not None:
            n = min(step.left_of(work), budget - taken)
            step.add(work, n)
            taken += n
            if not step.left_of(work):
                self._remove(work)
                work._place = _Place.IN_STEP
        return taken

    def _next(self, flow: _Flow[W], step: _Step[W]) -> W | None:
        """The flow's first work that has begun or may begin; what has expired goes on the way."""
        while flow.waiting:
            work = flow.waiting[0]
            if work.deadline is None or step.now < work.deadline:
                if work.n_to_run is not None or self._may_begin(work):
                    return work
                return next((w for w in flow.waiting if w.n_to_run is not None), None)
            self.drop(work)
            step.expired.append(work)
        return None

    def _may_begin(self, work: W) -> bool:
        if any(w is not work for p, w in self._held_up.items() if p <= work.priority):
            return False
        work.n_to_run = self._begin(work)
        if work.n_to_run is None:
            self._held_up[work.priority] = work
            return False
        self._held_up.pop(work.priority, None)
        return True


@dataclass(slots=True)
class _Step(Generic[W]):
    """One step in the making."""

    now: float
    left: int
    parts: dict[W, int] = field(default_factory=dict)
    expired: list[W] = field(default_factory=list)

    def left_of(self, work: W) -> int:
        """Tokens of begun work that the step does not take yet."""
        assert work.n_to_run is not None
        return work.n_to_run - self.parts.get(work, 0)

    def add(self, work: W, n: int) -> None:
        """Takes `n` more tokens of it."""
        self.parts[work] = self.parts.get(work, 0) + n
        self.left -= n


def _caller(work: Work) -> Hashable:
    return work if work.caller is None else work.caller
