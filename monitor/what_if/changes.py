"""Two answers to the same decisions: what appears, what vanishes, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

from monitor.what_if.outcomes import Claim
from monitor.what_if.running import Bools, Floats

EXAMPLES = 5
"""Decisions named of each kind of change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One decision that changes, or may."""

    decision_id: str
    champion: float | None
    """The score as it was aggregated; None for a rule, and for all clusters together."""
    challenger: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What one cluster, one rule or everything together would have said otherwise."""

    champion: int
    """Decisions that reach the level under the bundle that scored them, by scores as stored."""
    challenger: int
    appeared: int
    """Surely only under the challenger."""
    vanished: int
    """Surely only under the champion."""
    uncertain: int
    """May have changed: within the stored scores' error of a threshold. In neither of the above."""
    rate_change: float
    """Of the share of decisions, from what is sure."""
    low: float
    """95 % interval of the change, as wide as it is if all that is uncertain went one way."""
    high: float
    p_value: float
    """McNemar's test of what is sure, exact: how likely so uneven a change is by chance."""
    appeared_examples: tuple[Example, ...]
    vanished_examples: tuple[Example, ...]
    uncertain_examples: tuple[Example, ...]


class Pair(NamedTuple):
    """What both bundles say of a batch."""

    is_same: Bools
    """Where both read the same scores the same way, so that whatever they are, both agree."""
    champion: Claim
    challenger: Claim


@dataclass(slots=True)
class Tally:
    """Counts of one thing over many batches."""

    champion: int = 0
    challenger: int = 0
    appeared: int = 0
    vanished: int = 0
    may_appear: int = 0
    may_vanish: int = 0
    examples: dict[str, list[Example]] = field(default_factory=dict)

    def add(
        self,
        ids: NDArray[np.object_],
        pairs: list[Pair],
        scores: tuple[Floats, Floats] | None = None,
    ) -> None:
        """Counts a batch; a decision says yes where any of `pairs` does."""
        appeared, may_appear = _turns(pairs, forwards=True)
        vanished, may_vanish = _turns(pairs, forwards=False)
        self.champion += int(np.logical_or.reduce([p.champion.said for p in pairs]).sum())
        self.challenger += int(np.logical_or.reduce([p.challenger.said for p in pairs]).sum())
        self.appeared += int(appeared.sum())
        self.vanished += int(vanished.sum())
        self.may_appear += int(may_appear.sum())
        self.may_vanish += int(may_vanish.sum())
        for name, rows in (
            ("appeared", appeared),
            ("vanished", vanished),
            ("uncertain", may_appear | may_vanish),
        ):
            kept = self.examples.setdefault(name, [])
            for row in np.flatnonzero(rows)[: EXAMPLES - len(kept)]:
                then, now = (None, None) if scores is None else (_number(s[row]) for s in scores)
                kept.append(Example(decision_id=ids[row], champion=then, challenger=now))

    def change(self, n: int) -> Change:
        """The result over `n` decisions."""
        low = paired_interval(n, self.appeared, self.vanished + self.may_vanish)[0]
        high = paired_interval(n, self.appeared + self.may_appear, self.vanished)[1]
        return Change(
            champion=self.champion,
            challenger=self.challenger,
            appeared=self.appeared,
            vanished=self.vanished,
            uncertain=self.may_appear + self.may_vanish,
            rate_change=(self.appeared - self.vanished) / n if n else 0.0,
            low=low,
            high=high,
            p_value=mcnemar(self.appeared, self.vanished),
            appeared_examples=tuple(self.examples.get("appeared", ())),
            vanished_examples=tuple(self.examples.get("vanished", ())),
            uncertain_examples=tuple(self.examples.get("uncertain", ())),
        )


def paired_interval(n: int, appeared: int, vanished: int) -> tuple[float, float]:
    """95 % interval of the difference of two paired shares.

    Wald's after one pair of each kind is added. Source: Bonett and Price 2012, Journal of
    Educational and Behavioral Statistics 37(4).
    """
    up, down = (appeared + 1) / (n + 2), (vanished + 1) / (n + 2)
    spread = float(norm.ppf(0.975)) * ((up + down - (up - down) ** 2) / (n + 2)) ** 0.5
    return max(-1.0, up - down - spread), min(1.0, up - down + spread)


def mcnemar(appeared: int, vanished: int) -> float:
    """Two-sided exact p-value of McNemar's test; 1 where nothing changed."""
    n = appeared + vanished
    return 1.0 if n == 0 else float(binomtest(appeared, n, 0.5).pvalue)


def _turns(pairs: list[Pair], *, forwards: bool) -> tuple[Bools, Bools]:
    """Where no turns to yes (or back) for sure, and where it may.

    Of a pair that is the same both answers are one unknown; it can hide a change, not make one.
    """
    n = len(pairs[0].is_same)
    kept_sure, kept_possible = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
    no_sure, no_possible = kept_sure.copy(), kept_sure.copy()
    yes_sure, yes_possible = kept_sure.copy(), kept_sure.copy()
    for pair in pairs:
        before, after = (pair.champion, pair.challenger)[:: 1 if forwards else -1]
        kept_sure |= pair.is_same & before.sure
        kept_possible |= pair.is_same & before.possible
        no_sure |= ~pair.is_same & before.sure
        no_possible |= ~pair.is_same & before.possible
        yes_sure |= ~pair.is_same & after.sure
        yes_possible |= ~pair.is_same & after.possible
    turned = yes_sure & ~no_possible & ~kept_possible
    return turned, yes_possible & ~no_sure & ~kept_sure & ~turned


def _number(score: float) -> float | None:
    return float(score) if np.isfinite(score) else None
