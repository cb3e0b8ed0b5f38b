from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from sae_core.calibration import (
    CalibrationError,
    benign_table,
    calibrate_source,
    calibration_artefact,
    most_allowed,
    texts_needed,
    upper_bound,
    zone_thresholds,
)


@pytest.mark.parametrize(("k", "n"), [(0, 299), (2, 647), (7, 500), (40, 1000)])
def test_bound_is_scipys_exact_one(k: int, n: int) -> None:
    exact = binomtest(k, n, alternative="less").proportion_ci(0.95, method="exact").high
    assert upper_bound(k, n) == pytest.approx(exact, rel=1e-9)


def test_all_positive_bounds_at_one() -> None:
    assert upper_bound(5, 5) == 1.0


def test_texts_needed_is_where_zero_positives_suffice() -> None:
    for target in (0.05, 0.01, 0.001):
        n = texts_needed(target)
        assert upper_bound(0, n) <= target < upper_bound(0, n - 1)
    assert texts_needed(0.001) == 2995


def test_most_allowed_is_the_last_count_below_target() -> None:
    assert most_allowed(100, 0.01) == -1
    allowed = most_allowed(647, 0.01)
    assert upper_bound(allowed, 647) < 0.01 <= upper_bound(allowed + 1, 647)


def test_union_over_clusters_keeps_the_target() -> None:
    scores = np.random.default_rng(0).normal(size=(800, 6))
    zone = zone_thresholds(scores, 0.05)
    raised = (scores >= zone.thresholds).any(axis=1)
    assert raised.sum() == zone.n_false_positive == most_allowed(800, 0.05)
    assert zone.bound < 0.05
    assert zone.is_calibrated
    assert zone.spend.max() < 0.03


def test_lower_thresholds_would_break_the_bound() -> None:
    scores = np.random.default_rng(1).normal(size=(600, 3))
    zone = zone_thresholds(scores, 0.02)
    for cluster in range(3):
        lower = zone.thresholds.copy()
        lower[cluster] = scores[scores[:, cluster] < lower[cluster], cluster].max()
        more = int((scores >= lower).any(axis=1).sum())
        assert upper_bound(more, 600) >= 0.02


def test_too_few_texts_withhold_the_word_calibrated() -> None:
    scores = np.random.default_rng(0).normal(size=(120, 2))
    zone = zone_thresholds(scores, 0.01)
    assert not zone.is_calibrated
    assert (scores < zone.thresholds).all()
    source = calibrate_source(scores)
    artefact = calibration_artefact(["a", "b"], scores, {"fused": source}, {"model": "m"})
    assert artefact["calibrated"] is False
    assert "at least 299" in artefact["reason"]
    assert "calibrated:" not in artefact["policy"]["fused"]["alert"]["claim"]


def test_thresholds_are_in_order() -> None:
    scores = np.random.default_rng(2).normal(size=(700, 4))
    source = calibrate_source(scores)
    assert (source.clear <= source.flag.thresholds).all()
    assert (source.flag.thresholds < source.alert.thresholds).all()


def test_artefact_carries_thresholds_and_sorted_benign_scores() -> None:
    scores = np.random.default_rng(2).normal(size=(700, 2))
    found = calibrate_source(scores)
    calibrated = {"fused": found, "dense": found}
    artefact = calibration_artefact(["a", "b"], scores, calibrated, {"model": "m"})
    assert artefact["calibrated"] is True
    entry = artefact["clusters"]["b"]
    assert entry["thresholds"]["flag"] == found.flag.thresholds[1]
    assert entry["solo"]["dense"]["alert"] == found.alert.thresholds[1]
    assert entry["benign_scores"] == sorted(entry["benign_scores"])
    assert len(entry["benign_scores"]) == 700


def test_many_benign_scores_are_thinned_to_their_ranks() -> None:
    table = benign_table(np.arange(100_000, dtype=np.float64))
    assert len(table) == 4096
    assert (table[0], table[-1]) == (0.0, 99_999.0)
    assert table[2048] == pytest.approx(50_000, rel=1e-2)


def test_scores_that_are_not_finite_are_refused() -> None:
    scores = np.zeros((5, 2))
    scores[3, 1] = np.nan
    with pytest.raises(CalibrationError, match="text 3, cluster 1"):
        zone_thresholds(scores, 0.01)


def test_targets_that_contradict_are_refused() -> None:
    with pytest.raises(CalibrationError, match="expected below"):
        calibrate_source(np.zeros((5, 2)), flag_target=0.01, alert_target=0.05)
