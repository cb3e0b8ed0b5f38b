"""Several scores on the same rows: figures with intervals, and which score beats which.

Every resample draws the same rows for every score, so that the interval of a difference is of the
difference and not of two independent figures. Harmful and benign rows are drawn apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray

from sae_core.evaluation.data import EvaluationError
from sae_core.evaluation.detection import MIN_BENIGN_PER_RATE, Interval

CHUNK_RESAMPLES = 50
"""Resamples counted at a time: 50 x 20,000 rows are 8 MB."""
AUROC, AUPRC, TPR_1PCT, TPR_01PCT = range(4)
RATES = {TPR_1PCT: 0.01, TPR_01PCT: 0.001}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How well one score tells harmful from benign rows; intervals are 95 % bootstrap."""

    auroc: Interval
    auprc: Interval
    """Average precision; depends on the share of harmful rows."""
    tpr_at_1pct: Interval | None
    """True-positive rate where at most 1 % of benign rows are raised; None where the benign rows
    are too few to say."""
    tpr_at_01pct: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One score's figures minus another's, on the same rows."""

    score: str
    minus: str
    auroc: Interval
    tpr_at_1pct: Interval | None

    @property
    def is_better(self) -> bool:
        """Whether the whole interval of AUROC's difference lies above 0."""
        return self.auroc.low > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Scores on the same question."""

    n_harmful: int
    n_benign: int
    figures: Mapping[str, Figures]
    differences: tuple[Difference, ...]


def compare(
    scores: Mapping[str, Float64[ndarray, " n"]],
    is_harmful: Bool[ndarray, " n"],
    *,
    pairs: Sequence[tuple[str, str]] = (),
    groups: Int64[ndarray, " n"] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """The figures of each score and the differences of the pairs; ties count half.

    Args:
        scores: Larger is riskier; minus infinity is allowed, NaN is not.
        pairs: Scores to subtract, second from first; those that are not there are left out.
        groups: Which rows are drawn together, such as those of one data set: the intervals then
            say how the figures would change with other data sets. None draws each on its own.

    Raises:
        EvaluationError: rows of one label only, or a score that is NaN.
    """
    n_harmful, n_benign = int(is_harmful.sum()), int((~is_harmful).sum())
    if not n_harmful or not n_benign:
        raise EvaluationError(
            f"found {n_harmful} harmful and {n_benign} benign rows, expected at least one of each"
        )
    for name, values in scores.items():
        if np.isnan(values).any():
            row = int(np.flatnonzero(np.isnan(values))[0])
            raise EvaluationError(f"score {name}: found NaN at row {row}, expected numbers")
    once = {
        name: _measures(values[is_harmful], values[~is_harmful], _ones(n_harmful), _ones(n_benign))
        for name, values in scores.items()
    }
    rng = np.random.default_rng(seed)
    parts: dict[str, list[ndarray]] = {name: [] for name in scores}
    for begin in range(0, n_resamples, CHUNK_RESAMPLES):
        size = min(CHUNK_RESAMPLES, n_resamples - begin)
        h = _draw(rng, size, n_harmful, None if groups is None else groups[is_harmful])
        b = _draw(rng, size, n_benign, None if groups is None else groups[~is_harmful])
        for name, values in scores.items():
            parts[name].append(_measures(values[is_harmful], values[~is_harmful], h, b))
    drawn = {
        name: np.concatenate([once[name][:, :0], *found], axis=1) for name, found in parts.items()
    }
    return Comparison(
        n_harmful=n_harmful,
        n_benign=n_benign,
        figures={
            name: Figures(
                auroc=_interval(once[name][AUROC], drawn[name][AUROC]),
                auprc=_interval(once[name][AUPRC], drawn[name][AUPRC]),
                tpr_at_1pct=_rate(TPR_1PCT, n_benign, once[name], drawn[name]),
                tpr_at_01pct=_rate(TPR_01PCT, n_benign, once[name], drawn[name]),
            )
            for name in scores
        },
        differences=tuple(
            Difference(
                score=a,
                minus=b,
                auroc=_interval(once[a][AUROC] - once[b][AUROC], drawn[a][AUROC] - drawn[b][AUROC]),
                tpr_at_1pct=_rate(TPR_1PCT, n_benign, once[a] - once[b], drawn[a] - drawn[b]),
            )
            for a, b in pairs
            if a in scores and b in scores
        ),
    )


def roc_curve(
    scores: Float64[ndarray, " n"], is_harmful: Bool[ndarray, " n"]
) -> tuple[Float64[ndarray, " m"], Float64[ndarray, " m"]]:
    """False- and true-positive rates at every distinct threshold, from (0, 0) to (1, 1)."""
    _, group = np.unique(-scores, return_inverse=True)
    harmful = np.bincount(group, weights=is_harmful)
    benign = np.bincount(group, weights=~is_harmful)
    tpr = np.concatenate(([0.0], np.cumsum(harmful) / harmful.sum()))
    fpr = np.concatenate(([0.0], np.cumsum(benign) / benign.sum()))
    return fpr, tpr


def _draw(
    rng: np.random.Generator, size: int, n: int, groups: Int64[ndarray, " n"] | None
) -> Int64[ndarray, "size n"]:
    """How often each row is drawn in each resample."""
    if groups is None:
        return rng.multinomial(n, np.full(n, 1 / n), size=size)
    names, of_row = np.unique(groups, return_inverse=True)
    drawn: ndarray = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=size)
    return drawn[:, of_row]


def _ones(n: int) -> Int64[ndarray, "1 n"]:
    return np.ones((1, n), np.int64)


def _measures(
    harmful: Float64[ndarray, " p"],
    benign: Float64[ndarray, " n"],
    harmful_counts: Int64[ndarray, "b p"],
    benign_counts: Int64[ndarray, "b n"],
) -> Float64[ndarray, "4 b"]:
    """Every measure of resamples that are given as how often each row was drawn."""
    values, group = np.unique(-np.concatenate((harmful, benign)), return_inverse=True)
    p = _by_group(harmful_counts, group[: len(harmful)], len(values))  # b groups, riskiest first
    n = _by_group(benign_counts, group[len(harmful) :], len(values))
    n_harmful, n_benign = p.sum(axis=1), n.sum(axis=1)
    raised_p, raised_n = np.cumsum(p, axis=1), np.cumsum(n, axis=1)
    result = np.empty((4, len(p)))
    result[AUROC] = (n * (raised_p - p / 2)).sum(axis=1) / (n_harmful * n_benign)
    precision = raised_p / np.maximum(raised_p + raised_n, 1)
    result[AUPRC] = (p * precision).sum(axis=1) / n_harmful
    for which, rate in RATES.items():
        allowed = np.floor(rate * n_benign + 1e-9)[:, None]
        # The threshold is the score of the first benign row that is too many; only above it counts.
        first = np.argmax(raised_n > allowed, axis=1)[:, None]
        above = np.take_along_axis(raised_p - p, first, axis=1)[:, 0]
        result[which] = above / n_harmful
    return result


def _by_group(
    counts: Int64[ndarray, "b n"], group: Int64[ndarray, " n"], n_groups: int
) -> Float64[ndarray, "b n_groups"]:
    order = np.argsort(group, kind="stable")
    totals = np.zeros((len(counts), n_groups))
    present, starts = np.unique(group[order], return_index=True)
    totals[:, present] = np.add.reduceat(counts[:, order], starts, axis=1)
    return totals


def _rate(
    which: int, n_benign: int, once: Float64[ndarray, "4 1"], drawn: Float64[ndarray, "4 b"]
) -> Interval | None:
    if RATES[which] * n_benign < MIN_BENIGN_PER_RATE:
        return None
    return _interval(once[which], drawn[which])


def _interval(once: Float64[ndarray, " 1"], drawn: Float64[ndarray, " b"]) -> Interval:
    value = float(once[0])
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (value, value)
    return Interval(value, float(low), float(high))
