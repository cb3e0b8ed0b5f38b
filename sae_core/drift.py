"""Is traffic still like the calibration's? Tests with a stated rate of false alarms.

Each test asks for two things: that the difference is no chance, and that it is large enough to
matter; else every long-running server would be told of differences that mean nothing. Windows are
of a fixed number of texts and looked at once, at their end; the rates of flags and alerts are
looked at after each text, by a test that allows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray
from scipy.special import chdtrc, gammainc, gammaincc, gammaincinv, ndtri

from sae_core.baseline import Baseline

FALSE_ALARMS = 0.001
"""Of each kind of test, for each window of traffic that is like the calibration's: the false
discovery rate over latents, which is then the rate of any; the error of the others together."""
RATE_FACTOR = 2.0
"""A latent may fire twice or half as often as it did."""
RATIO_SHARE = 0.25
"""L0 and FVU may move by so much."""
PSI_LIMIT = 0.25
"""Of the population stability index: the usual reading is below 0.1 no shift, above 0.25 a large
one (Yurdakul 2018)."""
N_BINS = 10
BASELINE_CONFIDENCE = 0.999
"""Of the bounds of a latent's rate in calibration, where it may have fired a few times only."""


def drifted_latents(
    baseline: Baseline,
    firings: Float64[ndarray, " n_latents"],
    n_tokens: int,
    *,
    false_discoveries: float = FALSE_ALARMS,
) -> Int64[ndarray, " n_latents"]:
    """-1 for each latent that fires less than half as often, 1 for more than twice, else 0.

    Counts are taken as Poisson after division by their dispersion (quasi-likelihood, McCullagh and
    Nelder 1989); p-values of both sides of all latents are held to a false discovery rate whatever
    their dependence (Benjamini and Yekutieli 2001).
    """
    phi = baseline.dispersion
    seen = baseline.firings / phi
    most = gammaincinv(seen + 1, BASELINE_CONFIDENCE) * phi / baseline.n_tokens
    least = np.where(seen > 0, gammaincinv(np.maximum(seen, 1e-9), 1 - BASELINE_CONFIDENCE), 0.0)
    least = least * phi / baseline.n_tokens
    counted = firings / phi
    # Of a Poisson number: P(N >= k) = gammainc(k, mean), P(N <= k) = gammaincc(k + 1, mean).
    expected = most * RATE_FACTOR * n_tokens / phi
    up = np.where(counted > 0, gammainc(np.ceil(counted), expected), 1.0)
    down = gammaincc(np.floor(counted) + 1, least / RATE_FACTOR * n_tokens / phi)
    is_off = _discoveries(np.concatenate([up, down]), false_discoveries)
    n = len(firings)
    found: ndarray = is_off[:n].astype(np.int64) - is_off[n:].astype(np.int64)
    return found


def _discoveries(p: Float64[ndarray, " n"], rate: float) -> ndarray:
    """Which hypotheses Benjamini and Yekutieli's procedure rejects."""
    n = len(p)
    order = np.argsort(p)
    limits = rate * np.arange(1, n + 1) / (n * (1 / np.arange(1, n + 1)).sum())
    below = np.flatnonzero(p[order] <= limits)
    rejected = np.zeros(n, dtype=bool)
    if len(below):
        rejected[order[: below[-1] + 1]] = True
    return rejected


class RatioShift(NamedTuple):
    """A ratio of sums over the texts of a window, beside what it was."""

    ratio: float
    relative: float
    """Over the baseline's."""
    is_off: bool


def ratio_shift(
    numerators: Sequence[float],
    denominators: Sequence[float],
    expected: float,
    *,
    alpha: float = FALSE_ALARMS,
) -> RatioShift | None:
    """Whether a ratio lies beyond `RATIO_SHARE` of what is expected; None where it is not known.

    One number of each a text; the error is that of a ratio of means over texts (delta method).
    """
    a, b = np.array(numerators), np.array(denominators)
    if len(a) < 2 or not b.sum() > 0 or not expected > 0:
        return None
    ratio = float(a.sum() / b.sum())
    residual = a - ratio * b
    error = float(np.sqrt((residual**2).sum() * len(a) / (len(a) - 1)) / b.sum())
    limit = float(ndtri(1 - alpha / 2)) * error
    above = ratio - limit > expected * (1 + RATIO_SHARE)
    below = ratio + limit < expected * (1 - RATIO_SHARE)
    return RatioShift(ratio, ratio / expected, bool(above or below))


@dataclass(frozen=True, slots=True)
class ScoreBins:
    """Bins of a cluster's benign scores, about equally full; fewer where many are the same."""

    edges: Float64[ndarray, " n_edges"]
    """A score at an edge lies above it."""
    shares: Float64[ndarray, " n_bins"]
    n: int

    @classmethod
    def of(cls, scores: Sequence[float]) -> ScoreBins:
        """From benign calibration scores."""
        values = np.array(scores, dtype=np.float64)
        edges = np.unique(np.quantile(values, np.linspace(0, 1, N_BINS + 1)[1:-1]))
        edges = edges[edges > values.min()] if len(values) else edges
        counts = np.bincount(np.searchsorted(edges, values, "right"), minlength=len(edges) + 1)
        return cls(edges, counts / max(len(values), 1), len(values))

    def counts(self, scores: Sequence[float]) -> Int64[ndarray, " n_bins"]:
        """How many of these lie in each bin."""
        places = np.searchsorted(self.edges, np.array(scores, dtype=np.float64), "right")
        return np.bincount(places, minlength=len(self.shares)).astype(np.int64)


class ScoreShift(NamedTuple):
    """How far a window's scores are distributed otherwise."""

    psi: float
    """Population stability index."""
    is_off: bool


def score_shift(
    bins: ScoreBins, counts: Int64[ndarray, " n_bins"], *, alpha: float
) -> ScoreShift | None:
    """Compares scores with benign ones; None where there is nothing to compare.

    Off where the index is above `PSI_LIMIT` and a chi-square test of two samples rejects.
    """
    n = int(counts.sum())
    if len(bins.shares) < 2 or not n or not bins.n:
        return None
    found = np.maximum(counts / n, 0.5 / n)
    expected = np.maximum(bins.shares, 0.5 / bins.n)
    psi = float(((found - expected) * np.log(found / expected)).sum())
    pooled = (counts + bins.shares * bins.n) / (n + bins.n)
    known = pooled > 0
    difference = (counts / n - bins.shares)[known] ** 2 / pooled[known]
    statistic = float(difference.sum()) * n * bins.n / (n + bins.n)
    p = float(chdtrc(int(known.sum()) - 1, statistic))
    return ScoreShift(psi, psi > PSI_LIMIT and p < alpha)


class RateWatch:
    """Is a rate above its bound? Looked at after each text, and yet wrong at most `alpha` times.

    The mean of likelihood ratios of higher rates over the bound is an e-process: where the rate is
    at most the bound it ever reaches 1 / alpha with probability at most alpha (Ville 1939; Ramdas
    et al. 2023, arXiv:2210.01948).
    """

    FACTORS = np.array([1.5, 2.0, 3.0, 5.0, 10.0])

    def __init__(self, bound: float, *, alpha: float) -> None:
        self.bound = bound
        self.n = self.n_hits = 0
        rates = np.minimum(bound * self.FACTORS, (1 + bound) / 2)
        self._hit = np.log(rates / bound)
        self._miss = np.log1p(-rates) - np.log1p(-bound)
        self._limit = -np.log(alpha) + np.log(len(rates))
        self._evidence = np.zeros(len(rates))

    @property
    def rate(self) -> float:
        """Of the texts so far; NaN before the first."""
        return self.n_hits / self.n if self.n else float("nan")

    @property
    def is_off(self) -> bool:
        """Whether the rate is shown to be above the bound."""
        return bool(np.logaddexp.reduce(self._evidence) >= self._limit)

    def add(self, is_hit: bool) -> bool:
        """Takes one text; whether the rate is shown to be above the bound."""
        self.n += 1
        self.n_hits += is_hit
        self._evidence += self._hit if is_hit else self._miss
        return self.is_off
