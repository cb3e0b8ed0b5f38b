"""Tokens received, scored and not scored, told to the metrics as they become known.

Tokens that no score is meant for (BOS, template, system) are not counted here: a monitor that sees
everything it should has scored as many tokens as it received.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from monitor.records import Stage, UnscoredReason


@dataclass(slots=True)
class StageCount:
    """Counts of one stage in one request."""

    received: int = 0
    scored: int = 0
    unscored: dict[UnscoredReason, int] = field(default_factory=dict)


class CoverageCounters(Protocol):
    """The part of the metrics that counts tokens."""

    def tokens_received(self, stage: Stage, n: int) -> None:
        """Adds to the tokens received."""

    def tokens_scored(self, stage: Stage, n: int) -> None:
        """Adds to the tokens scored."""

    def tokens_unscored(self, stage: Stage, reason: UnscoredReason, n: int) -> None:
        """Adds to the tokens not scored."""


class CoverageMeter:
    """One request's counts, turned into increments; a count that goes back is not taken back."""

    def __init__(self, counters: CoverageCounters) -> None:
        self._counters = counters
        self._told: dict[Stage, StageCount] = {}
        self._expected: dict[Stage, int] = {}

    def expect(self, stages: Sequence[Stage | None]) -> None:
        """Tokens that have arrived and should be scored."""
        for stage in Stage:
            self._expected[stage] = self._expected.get(stage, 0) + stages.count(stage)

    def report(self, counts: Mapping[Stage, StageCount]) -> None:
        """The request's counts so far."""
        for stage, count in counts.items():
            told = self._told.setdefault(stage, StageCount())
            if count.received > told.received:
                self._counters.tokens_received(stage, count.received - told.received)
                told.received = count.received
            if count.scored > told.scored:
                self._counters.tokens_scored(stage, count.scored - told.scored)
                told.scored = count.scored
            for reason, n in count.unscored.items():
                before = told.unscored.get(reason, 0)
                if n > before:
                    self._counters.tokens_unscored(stage, reason, n - before)
                    told.unscored[reason] = n

    def lose(self, reason: UnscoredReason) -> None:
        """The request ends here: what was expected and not reported is unscored."""
        counts = {}
        for stage, expected in self._expected.items():
            told = self._told.get(stage, StageCount())
            left = expected - told.scored - sum(told.unscored.values())
            unscored = dict(told.unscored)
            unscored[reason] = unscored.get(reason, 0) + max(left, 0)
            counts[stage] = StageCount(expected, told.scored, unscored)
        self.report(counts)
