"""Figures against scikit-learn and plain loops; differences on the same resamples."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from sae_core.evaluation.comparison import compare, roc_curve
from sae_core.evaluation.data import EvaluationError
from sae_core.evaluation.detection import tpr_at


def planted(seed: int, n: int = 600) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    harmful = np.arange(n) % 3 == 0
    scores = np.round(rng.normal(harmful * 1.2, 1.0), 1)  # with ties
    return scores, harmful


def test_figures_equal_scikit_learns() -> None:
    scores, harmful = planted(0)
    found = compare({"a": scores}, harmful, n_resamples=20).figures["a"]
    assert found.auroc.value == pytest.approx(roc_auc_score(harmful, scores), abs=1e-12)
    assert found.auprc.value == pytest.approx(average_precision_score(harmful, scores), abs=1e-12)
    assert found.tpr_at_1pct is not None
    expected = tpr_at(scores[harmful], scores[~harmful], 0.01)
    assert found.tpr_at_1pct.value == pytest.approx(expected, abs=1e-12)
    assert found.tpr_at_01pct is None


def test_minus_infinity_is_below_everything() -> None:
    scores, harmful = planted(1)
    lowest = np.where(scores < -1, -np.inf, scores)
    finite = np.where(scores < -1, -50.0, scores)
    one = compare({"a": lowest}, harmful, n_resamples=5)
    assert one == compare({"a": finite}, harmful, n_resamples=5)


def test_intervals_are_about_as_wide_as_theory_says() -> None:
    scores, harmful = planted(2, 900)
    found = compare({"a": scores}, harmful, n_resamples=400).figures["a"].auroc
    a, p, n = found.value, harmful.sum(), (~harmful).sum()
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)  # Hanley and McNeil 1982
    error = np.sqrt((a * (1 - a) + (p - 1) * (q1 - a * a) + (n - 1) * (q2 - a * a)) / float(p * n))
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.25)
    assert found.low < a < found.high


def test_a_pairs_difference_is_narrower_than_its_parts() -> None:
    scores, harmful = planted(3)
    other = scores + np.random.default_rng(4).normal(0, 0.3, len(scores))
    found = compare({"a": scores, "b": other}, harmful, pairs=[("a", "b"), ("a", "c")])
    (difference,) = found.differences
    width = difference.auroc.high - difference.auroc.low
    alone = found.figures["a"].auroc
    assert width < 0.6 * (alone.high - alone.low)
    expected = alone.value - found.figures["b"].auroc.value
    assert difference.auroc.value == pytest.approx(expected)


def test_better_is_said_only_where_the_interval_is_above_zero() -> None:
    scores, harmful = planted(5)
    noise = np.random.default_rng(6).normal(size=len(scores))
    found = compare(
        {"a": scores, "b": noise, "c": scores + 1e-9}, harmful, pairs=[("a", "b"), ("a", "c")]
    )
    assert [d.is_better for d in found.differences] == [True, False]


def test_the_same_seed_draws_the_same() -> None:
    scores, harmful = planted(7)
    one = compare({"a": scores}, harmful, n_resamples=120, seed=3)
    assert one == compare({"a": scores}, harmful, n_resamples=120, seed=3)
    assert one != compare({"a": scores}, harmful, n_resamples=120, seed=4)


def test_the_curve_goes_from_corner_to_corner_under_the_same_area() -> None:
    scores, harmful = planted(8)
    fpr, tpr = roc_curve(scores, harmful)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(tpr, fpr) == pytest.approx(roc_auc_score(harmful, scores))


def test_rows_that_cannot_be_compared_are_refused() -> None:
    scores, harmful = planted(9, 30)
    with pytest.raises(EvaluationError, match="found 0 harmful and 30 benign rows"):
        compare({"a": scores}, np.zeros(30, np.bool_))
    scores[4] = np.nan
    with pytest.raises(EvaluationError, match="score a: found NaN at row 4"):
        compare({"a": scores}, harmful)


def test_rows_of_one_group_are_drawn_together() -> None:
    scores, harmful = planted(6)
    one = compare({"a": scores}, harmful, groups=np.zeros(600, np.int64), n_resamples=30)
    auroc = one.figures["a"].auroc
    assert auroc.low == pytest.approx(auroc.value) == pytest.approx(auroc.high)

    # Two data sets of either label, one easy and one hard: a resample may hold one of them only.
    groups = np.arange(600) // 3 % 2
    shifted = np.where(harmful & (groups == 1), scores + 5, scores)
    easy, hard = (
        roc_auc_score(harmful[keep], shifted[keep])
        for keep in (~harmful | (groups == g) for g in (1, 0))
    )
    found = compare({"a": shifted}, harmful, groups=groups, n_resamples=200).figures["a"].auroc
    assert found.value == pytest.approx(roc_auc_score(harmful, shifted))
    assert found.low == pytest.approx(hard, abs=0.03)
    assert found.high == pytest.approx(easy, abs=0.01)


def test_resampled_groups_count_as_repeated_rows() -> None:
    scores, harmful = planted(7, 90)
    groups = np.arange(90) % 6
    found = compare({"a": scores}, harmful, groups=groups, n_resamples=40, seed=3)
    rng = np.random.default_rng(3)
    own, others = np.unique(groups[harmful]), np.unique(groups[~harmful])
    h = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=40)
    b = rng.multinomial(len(others), np.full(len(others), 1 / len(others)), size=40)
    drawn = []
    for counts_h, counts_b in zip(h, b, strict=True):
        p = [
            scores[harmful & (groups == g)]
            for g, k in zip(own, counts_h, strict=True)
            for _ in range(k)
        ]
        n = [
            scores[~harmful & (groups == g)]
            for g, k in zip(others, counts_b, strict=True)
            for _ in range(k)
        ]
        values = np.concatenate([*p, *n])
        labels = np.arange(len(values)) < sum(map(len, p))
        drawn.append(roc_auc_score(labels, values))
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert found.figures["a"].auroc[1:] == pytest.approx((low, high))
