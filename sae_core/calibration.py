"""Thresholds from benign texts, with a bound on the false-positive rate of all clusters together.

A third of the texts says how each cluster's benign scores fall off (`Tail`). That leaves one number
open, the level, on which all thresholds rise together; the other texts set it: as low as keeps the
one-sided Clopper-Pearson bound of what any cluster raises below the target, over all of them and
within each length bucket that has texts enough to show it. As one number is chosen on texts that
the family of thresholds has not seen, and what is raised only shrinks with it, the bound holds as
stated (Bates et al. 2021, arXiv:2101.02703), however many clusters there are. Choosing each
threshold on its own does not: with ten clusters and 647 texts it raised 4.3 % of texts left out
where it had claimed less than 2.8 % (benchmarks/LOG.md, 2026-11-24). Where the texts are too few
even with none raised, the word "calibrated" is withheld. Knows scores, not models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray
from scipy.special import betaincinv

from sae_core.errors import SAECoreError

CONFIDENCE = 0.95
STEP = 1e-5
"""Thresholds are multiples of this, at least one step above the benign score they rest on."""
LENGTH_BUCKETS = ("1-32", "33-128", "129-512", "513-")
"""Scored tokens of a text: two windows of the default aggregate, a question, a page, more; longer
texts give a maximum more chances."""
_BUCKET_ENDS = (32, 128, 512)
TAIL_QUANTILE = 0.9
"""Where a cluster's benign tail begins."""
LEAST_SCALE = 0.1
"""Of the median cluster's scale: a cluster whose benign scores hardly vary would otherwise make one
odd text an endlessly high level, and lift all others with it."""
LEAST_TEXTS = 12
"""Fewer give no tail."""


Source = Literal["fused", "dense", "sae"]


class CalibrationError(SAECoreError):
    """Scores that cannot be calibrated: too few, not finite, or targets that contradict."""


def upper_bound(n_positive: int, n: int, confidence: float = CONFIDENCE) -> float:
    """One-sided Clopper-Pearson bound: the rate is below it with this confidence."""
    if not 0 <= n_positive <= n or n < 1:
        raise CalibrationError(f"found {n_positive} of {n}, expected 0 <= positives <= n, n >= 1")
    if n_positive == n:
        return 1.0
    return float(betaincinv(n_positive + 1, n - n_positive, confidence))


def most_allowed(n: int, target: float, confidence: float = CONFIDENCE) -> int:
    """Most false positives among `n` texts that still prove a rate below `target`; -1 if none."""
    allowed = -1
    while allowed + 1 < n and upper_bound(allowed + 1, n, confidence) < target:
        allowed += 1
    return allowed


def texts_needed(target: float, confidence: float = CONFIDENCE) -> int:
    """Fewest benign texts that can prove `target`, if none that sets the level is raised."""
    setting = int(np.ceil(np.log(1 - confidence) / np.log(1 - target)))
    n = setting
    while len(split_texts(n)[1]) < setting:
        n += 1
    return n


def split_texts(n: int) -> tuple[Int64[ndarray, " n_shape"], Int64[ndarray, " n_level"]]:
    """Which texts give the tails (a third, drawn once for all), and which set the level."""
    order = np.random.default_rng(n).permutation(n)
    return np.sort(order[: n // 3]), np.sort(order[n // 3 :])


class Tail(NamedTuple):
    """How benign scores fall off: about exponentially, by `scale`, from `start` on."""

    start: Float64[ndarray, " n_clusters"]
    scale: Float64[ndarray, " n_clusters"]

    @classmethod
    def of(cls, scores: Float64[ndarray, "n_texts n_clusters"]) -> Tail:
        """From the 90 % quantile, and the mean of how far the scores beyond it lie from it."""
        start = np.quantile(scores, TAIL_QUANTILE, axis=0)
        beyond = scores > start
        excess = np.where(beyond, scores - start, 0.0).sum(axis=0)
        scale = excess / np.maximum(beyond.sum(axis=0), 1)
        return cls(start, np.maximum(scale, max(LEAST_SCALE * float(np.median(scale)), STEP)))

    def levels(
        self, scores: Float64[ndarray, "n_texts n_clusters"]
    ) -> Float64[ndarray, " n_texts"]:
        """For each text the level up to which some cluster raises it."""
        levels: ndarray = ((scores - self.start) / self.scale).max(axis=1)
        return levels

    def thresholds(self, level: float) -> Float64[ndarray, " n_clusters"]:
        """Thresholds that do not raise a text of this level."""
        return _just_above(self.start + level * self.scale)


class ZoneThresholds(NamedTuple):
    """One zone's thresholds (flag or alert) and what they were shown to keep."""

    thresholds: Float64[ndarray, " n_clusters"]
    """A score at or above its cluster's threshold is in the zone."""
    target: float
    n: int
    n_false_positive: int
    """Benign texts that at least one cluster would raise."""
    achieved: float
    bound: float
    """Upper bound of the policy's false-positive rate."""
    spend: Float64[ndarray, " n_clusters"]
    """Each cluster's own false-positive rate."""
    is_calibrated: bool
    """Whether `bound` is below `target`."""


def length_buckets(n_tokens: Int64[ndarray, " n_texts"]) -> Int64[ndarray, " n_texts"]:
    """For each text the index of its bucket in `LENGTH_BUCKETS`."""
    return np.searchsorted(np.array(_BUCKET_ENDS), n_tokens, side="left").astype(np.int64)


def zone_thresholds(
    scores: Float64[ndarray, "n_texts n_clusters"],
    tail: Tail,
    target: float,
    *,
    confidence: float = CONFIDENCE,
    buckets: Int64[ndarray, " n_texts"] | None = None,
    most: int | None = None,
) -> ZoneThresholds:
    """The lowest level at which the texts that any cluster raises prove `target`.

    Args:
        scores: Of texts that `tail` was not made from.
        buckets: Groups of texts, each of which has to prove the target too; those that are too
            small to are left to the whole.
        most: Raises at most so many texts, whatever the target allows.
    """
    _check(scores)
    if not 0 < target < 1 or not 0 < confidence < 1:
        raise CalibrationError(
            f"target is {target}, confidence {confidence}, expected rates between 0 and 1"
        )
    levels = tail.levels(scores)
    allowed = max(most_allowed(len(scores), target, confidence), 0)
    level = _highest_kept(levels, allowed if most is None else min(allowed, most))
    for bucket in [] if buckets is None else np.unique(buckets):
        own = levels[buckets == bucket]
        allowed = most_allowed(len(own), target, confidence)
        if allowed >= 0:
            level = max(level, _highest_kept(own, allowed))
    return zone_of(scores, tail.thresholds(level), target, confidence)


def _highest_kept(levels: Float64[ndarray, " n"], n_raised: int) -> float:
    """The highest level that is not raised where the `n_raised` highest are."""
    return float(np.sort(levels)[len(levels) - 1 - n_raised])


def zone_of(
    scores: Float64[ndarray, "n_texts n_clusters"],
    thresholds: Float64[ndarray, " n_clusters"],
    target: float,
    confidence: float,
) -> ZoneThresholds:
    """What thresholds keep on these texts."""
    n = len(scores)
    n_false = int((scores >= thresholds).any(axis=1).sum())
    bound = upper_bound(n_false, n, confidence)
    return ZoneThresholds(
        thresholds=thresholds,
        target=target,
        n=n,
        n_false_positive=n_false,
        achieved=n_false / n,
        bound=bound,
        spend=(scores >= thresholds).mean(axis=0),
        is_calibrated=bound < target,
    )


class Escalated(NamedTuple):
    """The middle zone: flagged and not alerted, for somebody or something slower to look at."""

    budget: float
    n: int
    n_escalated: int
    """Benign texts in the zone."""
    achieved: float
    bound: float
    is_within: bool
    """Whether `bound` is below `budget`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCalibration:
    """Thresholds of every cluster for one score source."""

    flag: ZoneThresholds
    alert: ZoneThresholds
    clear: Float64[ndarray, " n_clusters"]
    """Below flag by a tenth of the way from the median benign score: hysteresis for streams."""
    escalated: Escalated | None = None
    """With a budget for the middle zone."""


def calibrate_source(
    scores: Float64[ndarray, "n_texts n_clusters"],
    *,
    flag_target: float = 0.05,
    alert_target: float = 0.01,
    confidence: float = CONFIDENCE,
    buckets: Int64[ndarray, " n_texts"] | None = None,
    escalate_budget: float | None = None,
    least_flag: Float64[ndarray, " n_clusters"] | None = None,
) -> SourceCalibration:
    """Flag and alert thresholds of one source; alert is above flag for every cluster.

    Every count is of the texts that set the level; see `split_texts`.

    Args:
        buckets: As `zone_thresholds`.
        escalate_budget: Share of benign texts that may be flagged without an alert.
        least_flag: Flag thresholds lie above these, such as the floor that a gate holds scores at.
    """
    if not alert_target < flag_target:
        raise CalibrationError(f"alert target is {alert_target}, expected below {flag_target}")
    _check(scores)
    if len(scores) < LEAST_TEXTS:
        raise CalibrationError(f"found {len(scores)} benign texts, expected {LEAST_TEXTS} or more")
    shape, level = split_texts(len(scores))
    tail, scores = Tail.of(scores[shape]), scores[level]
    buckets = None if buckets is None else buckets[level]
    n = len(scores)
    alert = zone_thresholds(scores, tail, alert_target, confidence=confidence, buckets=buckets)
    most = None
    if escalate_budget is not None:
        in_budget = max(most_allowed(n, escalate_budget, confidence), 0)
        most = alert.n_false_positive + in_budget
    flag = zone_thresholds(
        scores, tail, flag_target, confidence=confidence, buckets=buckets, most=most
    )
    if least_flag is not None:
        above = np.maximum(flag.thresholds, _just_above(least_flag))
        flag = zone_of(scores, above, flag_target, confidence)
    spread = flag.thresholds - np.median(scores, axis=0)
    least = _just_above(flag.thresholds + np.maximum(1e-3, 0.02 * spread))
    alert = zone_of(scores, np.maximum(alert.thresholds, least), alert_target, confidence)
    clear = np.minimum(_just_above(flag.thresholds - 0.1 * spread), flag.thresholds)
    escalated = None
    if escalate_budget is not None:
        count = flag.n_false_positive - alert.n_false_positive
        bound = upper_bound(count, n, confidence)
        escalated = Escalated(
            budget=escalate_budget,
            n=n,
            n_escalated=count,
            achieved=count / n,
            bound=bound,
            is_within=bound < escalate_budget,
        )
    return SourceCalibration(flag=flag, alert=alert, clear=clear, escalated=escalated)


def held_out_counts(
    scores: Float64[ndarray, "n_texts n_clusters"],
    calibrate: Callable[[Int64[ndarray, " n"]], SourceCalibration],
    *,
    n_folds: int = 5,
    seed: int = 0,
) -> tuple[int, int]:
    """Texts flagged and alerted by thresholds that were chosen without them, folds together.

    Args:
        calibrate: Thresholds from the texts of these indices.
    """
    order = np.random.default_rng(seed).permutation(len(scores))
    flagged = alerted = 0
    for fold in range(n_folds):
        held = order[fold::n_folds]
        found = calibrate(np.setdiff1d(order, held))
        flagged += int((scores[held] >= found.flag.thresholds).any(axis=1).sum())
        alerted += int((scores[held] >= found.alert.thresholds).any(axis=1).sum())
    return flagged, alerted


def _just_above(scores: Float64[ndarray, " n"]) -> Float64[ndarray, " n"]:
    steps: ndarray = np.floor(scores / STEP) + 1.5  # at least half a step above
    above: ndarray = np.round(np.ceil(steps) * STEP, 5)
    return above


def _check(scores: ndarray) -> None:
    if scores.ndim != 2 or len(scores) < 2 or scores.shape[1] < 1:
        raise CalibrationError(f"scores are {scores.shape}, expected (n >= 2, n_clusters >= 1)")
    if not np.isfinite(scores).all():
        text, cluster = np.argwhere(~np.isfinite(scores))[0]
        found = scores[text, cluster]
        raise CalibrationError(f"score of text {text}, cluster {cluster} is {found}, not finite")
