from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from sae_core.calibration import (
    LENGTH_BUCKETS,
    CalibrationError,
    Tail,
    calibrate_source,
    held_out_counts,
    length_buckets,
    most_allowed,
    split_texts,
    texts_needed,
    upper_bound,
    zone_thresholds,
)
from sae_core.calibration_artefact import benign_table, calibration_artefact


@pytest.mark.parametrize(("k", "n"), [(0, 299), (2, 647), (7, 500), (40, 1000)])
def test_bound_is_scipys_exact_one(k: int, n: int) -> None:
    exact = binomtest(k, n, alternative="less").proportion_ci(0.95, method="exact").high
    assert upper_bound(k, n) == pytest.approx(exact, rel=1e-9)


def test_all_positive_bounds_at_one() -> None:
    assert upper_bound(5, 5) == 1.0


def test_texts_needed_is_where_zero_positives_suffice() -> None:
    for target in (0.05, 0.01, 0.001):
        n = len(split_texts(texts_needed(target))[1])
        assert upper_bound(0, n) <= target < upper_bound(0, n - 1)
    assert len(split_texts(texts_needed(0.001))[1]) == 2995


def test_most_allowed_is_the_last_count_below_target() -> None:
    assert most_allowed(100, 0.01) == -1
    allowed = most_allowed(647, 0.01)
    assert upper_bound(allowed, 647) < 0.01 <= upper_bound(allowed + 1, 647)


def parts(scores: np.ndarray) -> tuple[Tail, np.ndarray]:
    shape, level = split_texts(len(scores))
    return Tail.of(scores[shape]), scores[level]


def test_union_over_clusters_keeps_the_target() -> None:
    tail, scores = parts(np.random.default_rng(0).normal(size=(1200, 6)))
    zone = zone_thresholds(scores, tail, 0.05)
    raised = (scores >= zone.thresholds).any(axis=1)
    assert raised.sum() == zone.n_false_positive == most_allowed(800, 0.05)
    assert zone.bound < 0.05
    assert zone.is_calibrated
    assert zone.spend.max() < 0.03


def test_a_lower_level_would_break_the_bound() -> None:
    tail, scores = parts(np.random.default_rng(1).normal(size=(900, 3)))
    zone = zone_thresholds(scores, tail, 0.02)
    levels = np.sort(tail.levels(scores))
    lower = tail.thresholds(levels[levels < levels[-zone.n_false_positive] - 1e-3][-2])
    assert (lower < zone.thresholds).all()
    more = int((scores >= lower).any(axis=1).sum())
    assert upper_bound(more, 600) >= 0.02


def test_the_bound_holds_on_texts_never_seen() -> None:
    """The true rate is above target in at most 5 % of calibrations (10 of 200, and chance)."""
    scales = np.array([1.0, 1.0, 4.0, 0.2, 1.0, 1.0, 1.0, 30.0])
    rng = np.random.default_rng(11)

    def draw(n: int) -> np.ndarray:
        scores = rng.standard_exponential(size=(n, 8)) ** np.linspace(0.6, 1.8, 8)
        return np.asarray(scores * scales)

    unseen = draw(40_000)
    above = {"flag": 0, "alert": 0}
    for _ in range(200):
        found = calibrate_source(draw(650))
        for name, zone in (("flag", found.flag), ("alert", found.alert)):
            assert zone.is_calibrated
            above[name] += bool((unseen >= zone.thresholds).any(axis=1).mean() > zone.target)
    assert above["flag"] <= 18
    assert above["alert"] <= 18


def test_a_cluster_that_hardly_varies_does_not_lift_the_others() -> None:
    scores = np.random.default_rng(12).normal(size=(900, 4))
    plain = calibrate_source(scores).flag.thresholds
    scores[:, 3] = 0.0
    scores[split_texts(900)[1][5], 3] = 2.0
    flat = calibrate_source(scores).flag.thresholds
    assert (flat[:3] < plain[:3] + 0.5).all()


def test_too_few_texts_withhold_the_word_calibrated() -> None:
    scores = np.random.default_rng(0).normal(size=(120, 2))
    tail, level = parts(scores)
    zone = zone_thresholds(level, tail, 0.01)
    assert not zone.is_calibrated
    assert (level < zone.thresholds).all()
    source = calibrate_source(scores)
    artefact = calibration_artefact(
        ["a", "b"], scores, {"fused": source}, {"model": "m"}, aggregates=[{}, {}]
    )
    assert artefact["calibrated"] is False
    assert "at least 448" in artefact["reason"]
    assert "calibrated:" not in artefact["policy"]["fused"]["alert"]["claim"]
    with pytest.raises(CalibrationError, match="found 11 benign texts, expected 12 or more"):
        calibrate_source(scores[:11])


def test_thresholds_are_in_order() -> None:
    scores = np.random.default_rng(2).normal(size=(700, 4))
    source = calibrate_source(scores)
    assert (source.clear <= source.flag.thresholds).all()
    assert (source.flag.thresholds < source.alert.thresholds).all()


def test_artefact_carries_thresholds_and_sorted_benign_scores() -> None:
    scores = np.random.default_rng(2).normal(size=(700, 2))
    found = calibrate_source(scores)
    calibrated = {"fused": found, "dense": found}
    artefact = calibration_artefact(
        ["a", "b"], scores, calibrated, {"model": "m"}, aggregates=[{}, {}]
    )
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
        zone_thresholds(scores, Tail(np.zeros(2), np.ones(2)), 0.01)


def test_targets_that_contradict_are_refused() -> None:
    with pytest.raises(CalibrationError, match="expected below"):
        calibrate_source(np.zeros((5, 2)), flag_target=0.01, alert_target=0.05)


def test_a_length_bucket_keeps_the_target_too() -> None:
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(1200, 3))
    long = np.arange(1200) % 4 == 0
    scores[long] += 1.5  # long texts score higher
    buckets = length_buckets(np.where(long, 600, 20))
    tail, level = parts(scores)
    of_level = split_texts(1200)[1]
    own = level[long[of_level]]
    loose = zone_thresholds(level, tail, 0.05)
    strict = zone_thresholds(level, tail, 0.05, buckets=buckets[of_level])
    raised_loose = int((own >= loose.thresholds).any(axis=1).sum())
    raised_strict = int((own >= strict.thresholds).any(axis=1).sum())
    assert upper_bound(raised_loose, len(own)) > 0.05
    assert upper_bound(raised_strict, len(own)) < 0.05
    assert strict.is_calibrated


def test_a_bucket_too_small_to_show_the_target_is_left_to_the_whole() -> None:
    tail, level = parts(np.random.default_rng(3).normal(size=(900, 2)))
    buckets = length_buckets(np.repeat([600, 20], [20, 580]))
    with_buckets = zone_thresholds(level, tail, 0.05, buckets=buckets)
    assert with_buckets.is_calibrated
    assert with_buckets.n_false_positive >= most_allowed(580, 0.05)


def test_length_buckets_end_where_they_say() -> None:
    ends = np.array([1, 32, 33, 128, 129, 512, 513, 9000])
    assert length_buckets(ends).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(LENGTH_BUCKETS) == 4


def test_the_middle_zone_keeps_its_budget() -> None:
    scores = np.random.default_rng(4).normal(size=(2000, 4))
    free = calibrate_source(scores)
    tight = calibrate_source(scores, escalate_budget=0.02)
    assert tight.escalated is not None
    assert tight.escalated.is_within
    assert tight.escalated.bound < 0.02
    level = scores[split_texts(2000)[1]]
    flagged = (level >= tight.flag.thresholds).any(axis=1)
    alerted = (level >= tight.alert.thresholds).any(axis=1)
    assert tight.escalated.n_escalated == (flagged & ~alerted).sum()
    assert tight.flag.n_false_positive < free.flag.n_false_positive


def test_a_budget_that_the_texts_cannot_show_is_not_claimed() -> None:
    scores = np.random.default_rng(4).normal(size=(100, 2))
    found = calibrate_source(scores, escalate_budget=0.02).escalated
    assert found is not None
    assert not found.is_within


def test_flag_thresholds_lie_above_the_floor() -> None:
    scores = np.random.default_rng(5).normal(size=(500, 2))
    found = calibrate_source(scores, least_flag=np.array([9.0, -9.0]))
    assert found.flag.thresholds[0] > 9.0
    assert found.flag.thresholds[1] < 9.0
    assert (found.alert.thresholds > found.flag.thresholds).all()


def test_alert_counts_are_those_of_the_thresholds_given_out() -> None:
    scores = np.random.default_rng(6).normal(size=(500, 3))
    alert = calibrate_source(scores).alert
    level = scores[split_texts(500)[1]]
    assert alert.n_false_positive == (level >= alert.thresholds).any(axis=1).sum()


def test_held_out_counts_are_of_texts_that_thresholds_did_not_see() -> None:
    scores = np.random.default_rng(7).normal(size=(3000, 3))
    flagged, alerted = held_out_counts(scores, lambda rows: calibrate_source(scores[rows]))
    assert 0.02 < flagged / 3000 < 0.05
    assert 0.001 < alerted / 3000 < 0.01


def test_artefact_states_each_bucket_and_what_is_missing() -> None:
    scores = np.random.default_rng(8).normal(size=(400, 1))
    buckets = length_buckets(np.where(np.arange(400) % 40 == 0, 600, 20))
    source = calibrate_source(scores, alert_target=0.001, buckets=buckets)
    artefact = calibration_artefact(
        ["a"], scores, {"fused": source}, {}, aggregates=[{"kind": "max"}], buckets=buckets
    )
    assert artefact["calibrated"] is False
    assert "at least 4492 texts are needed" in artefact["reason"]
    assert "calibrated" not in artefact["reason"]
    assert artefact["length_buckets"]["1-32"]["flag"]["calibrated"] is True
    assert artefact["length_buckets"]["513-"]["flag"]["calibrated"] is False
    assert artefact["clusters"]["a"]["aggregate"] == {"kind": "max"}
