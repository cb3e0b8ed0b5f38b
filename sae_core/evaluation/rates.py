"""Shares of rows with exact binomial intervals, and how they stand to a claimed rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scipy.stats import beta

from sae_core.evaluation.data import EvaluationError

Standing = Literal["within", "above", "open"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """How many of some rows, with the two-sided 95 % Clopper-Pearson interval of the share."""

    n_raised: int
    n: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share itself."""
        return self.n_raised / self.n

    def standing(self, claimed: float) -> Standing:
        """`within` where the whole interval is at most `claimed`, `above` where all of it is more.

        `open` where the rows are too few to say.
        """
        if self.high <= claimed:
            return "within"
        return "above" if self.low > claimed else "open"


def rate_of(n_raised: int, n: int, confidence: float = 0.95) -> Rate:
    """The share `n_raised / n` with its interval; EvaluationError for counts that cannot be."""
    if not 0 <= n_raised <= n or n < 1:
        raise EvaluationError(f"found {n_raised} of {n}, expected 0 <= raised <= n, n >= 1")
    tail = (1 - confidence) / 2
    low = 0.0 if n_raised == 0 else float(beta.ppf(tail, n_raised, n - n_raised + 1))
    high = 1.0 if n_raised == n else float(beta.ppf(1 - tail, n_raised + 1, n - n_raised))
    return Rate(n_raised=n_raised, n=n, low=low, high=high)
