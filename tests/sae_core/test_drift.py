"""Tests of drift: false alarms as rare as stated, and what matters found."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from sae_core.anomaly import anomaly_scores
from sae_core.baseline import Baseline
from sae_core.calibration import CalibrationError
from sae_core.drift import (
    RateWatch,
    ScoreBins,
    drifted_latents,
    ratio_shift,
    score_shift,
)
from sae_core.vitals import FitSums, TextVitals, summed

N_LATENTS = 30
LATENTS = tuple(("l1", i) for i in range(N_LATENTS))


def texts(
    n: int, rng: np.random.Generator, *, rates: Any = None, l0: float = 40.0
) -> list[TextVitals]:
    """Texts whose latents go together: each text has a topic that fires its latents more."""
    base = np.geomspace(0.001, 0.3, N_LATENTS) if rates is None else rates
    found = []
    for _ in range(n):
        n_tokens = int(rng.integers(8, 60))
        mine = np.minimum(base * rng.gamma(2.0, 0.5, N_LATENTS), 1.0)
        firings = rng.binomial(n_tokens, mine)
        totals = firings * rng.uniform(0.5, 1.5, N_LATENTS)
        x = rng.normal(size=(n_tokens, 4))
        fit = FitSums(
            n_tokens=n_tokens,
            n_active=float(rng.poisson(l0 * n_tokens)),
            error=float((0.1 * x**2).sum()),
            squares=float((x**2).sum()),
            sums=x.sum(axis=0),
        )
        found.append(
            TextVitals(n_tokens=n_tokens, firings=firings, totals=totals, fits={"l1": fit})
        )
    return found


@pytest.fixture(scope="module")
def baseline() -> Baseline:
    return Baseline.of(LATENTS, texts(600, np.random.default_rng(0)))


def window(traffic: list[TextVitals]) -> tuple[Any, int]:
    firings = np.sum([text.firings for text in traffic], axis=0).astype(float)
    return firings, sum(text.n_tokens for text in traffic)


def test_like_traffic_raises_no_latent(baseline: Baseline) -> None:
    rng = np.random.default_rng(1)
    alarms = [drifted_latents(baseline, *window(texts(400, rng))).any() for _ in range(60)]
    assert sum(alarms) == 0  # at most 0.001 each


def test_a_silent_latent_and_a_loud_one_are_found(baseline: Baseline) -> None:
    rates = np.geomspace(0.001, 0.3, N_LATENTS)
    rates[20], rates[10] = 0.0, 8 * rates[10]
    found = drifted_latents(baseline, *window(texts(1000, np.random.default_rng(2), rates=rates)))
    assert found[20] == -1
    assert found[10] == 1
    assert np.count_nonzero(found) == 2


def test_a_difference_that_is_sure_and_small_is_no_drift(baseline: Baseline) -> None:
    rates = np.geomspace(0.001, 0.3, N_LATENTS) * 1.3
    found = drifted_latents(baseline, *window(texts(4000, np.random.default_rng(3), rates=rates)))
    assert not found.any()


def test_a_latent_that_never_fired_may_fire_a_little() -> None:
    rates = np.geomspace(0.001, 0.3, N_LATENTS)
    rates[0] = 0.0
    quiet = Baseline.of(LATENTS, texts(300, np.random.default_rng(4), rates=rates))
    firings, n_tokens = window(texts(300, np.random.default_rng(5), rates=rates))
    firings[0] = 3
    assert drifted_latents(quiet, firings, n_tokens)[0] == 0
    firings[0] = 300
    assert drifted_latents(quiet, firings, n_tokens)[0] == 1


@pytest.mark.parametrize(
    ("factor", "is_off"), [(1.0, False), (1.2, False), (1.6, True), (0.5, True)]
)
def test_a_ratio_is_off_beyond_its_share(factor: float, is_off: bool) -> None:
    rng = np.random.default_rng(6)
    b = rng.uniform(5, 50, 500)
    a = b * factor * rng.gamma(4, 0.25, 500)
    shift = ratio_shift(a.tolist(), b.tolist(), 1.0)
    assert shift is not None
    assert shift.is_off is is_off
    assert shift.relative == pytest.approx(factor, rel=0.1)


def test_a_ratio_of_nothing_is_not_known() -> None:
    assert ratio_shift([], [], 1.0) is None
    assert ratio_shift([1.0], [1.0], 1.0) is None


@pytest.mark.parametrize(("moved", "is_off"), [(0.0, False), (0.2, False), (2.0, True)])
def test_scores_that_move_far_are_a_shift(moved: float, is_off: bool) -> None:
    rng = np.random.default_rng(7)
    bins = ScoreBins.of(rng.normal(size=600).tolist())
    counts = bins.counts((rng.normal(size=500) + moved).tolist())
    assert counts.sum() == 500
    shift = score_shift(bins, counts, alpha=1e-4)
    assert shift is not None
    assert shift.is_off is is_off


def test_scores_held_at_a_floor_share_a_bin() -> None:
    scores = [-4.0] * 80 + [float(i) for i in range(20)]
    bins = ScoreBins.of(scores)
    assert bins.shares.sum() == pytest.approx(1.0)
    assert bins.shares[0] == pytest.approx(0.8)
    assert score_shift(ScoreBins.of([1.0] * 50), np.array([7]), alpha=0.01) is None


def test_a_rate_at_its_bound_hardly_ever_looks_above_it_however_often_one_looks() -> None:
    rng = np.random.default_rng(8)
    crossed = 0
    for _ in range(300):
        watch = RateWatch(0.02, alpha=0.01)
        crossed += any(watch.add(bool(hit)) for hit in rng.random(1500) < 0.02)
    assert crossed <= 9  # of 300, 3 expected at most; above 9 has probability 0.001


def test_a_rate_far_above_its_bound_is_found_soon() -> None:
    watch = RateWatch(0.02, alpha=0.001)
    hits = np.random.default_rng(9).random(1000) < 0.1
    first = next(n for n, hit in enumerate(hits, 1) if watch.add(bool(hit)))
    assert first < 300
    assert watch.rate > 0.05


def test_a_baseline_survives_json(baseline: Baseline) -> None:
    back = Baseline.from_json(json.loads(json.dumps(baseline.to_json())), "x.json")
    text = texts(1, np.random.default_rng(10))[0]
    assert back.latents == baseline.latents
    assert anomaly_scores(back, text) == pytest.approx(anomaly_scores(baseline, text), rel=1e-3)
    firings, n_tokens = window(texts(300, np.random.default_rng(11)))
    same = drifted_latents(back, firings, n_tokens) == drifted_latents(baseline, firings, n_tokens)
    assert same.all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema": 9}, "x.json: baseline: schema: found 9, expected 1"),
        ({"firings": [1.0]}, "x.json: baseline: firings: found 1 numbers, expected one for each"),
        ({"dispersion": [float("nan")] * N_LATENTS}, "numbers that are not finite"),
        ({"distance": None}, "x.json: baseline: found TypeError"),
    ],
)
def test_a_baseline_of_another_form_is_named(
    baseline: Baseline, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(CalibrationError) as raised:
        Baseline.from_json({**baseline.to_json(), **changes}, "x.json")
    assert said in str(raised.value)


def test_few_texts_make_no_baseline() -> None:
    with pytest.raises(CalibrationError, match="found 10 texts with scored tokens"):
        Baseline.of(LATENTS, texts(10, np.random.default_rng(0)))


def test_like_texts_are_ordinary_and_others_are_not(baseline: Baseline) -> None:
    rng = np.random.default_rng(12)
    z = np.array([anomaly_scores(baseline, text) for text in texts(400, rng)])
    assert np.abs(z.mean(axis=0)).max() < 0.25
    assert z.std(axis=0).max() < 1.3
    odd = texts(100, rng, rates=np.geomspace(0.3, 0.001, N_LATENTS), l0=80.0)
    strange = np.array([anomaly_scores(baseline, text) for text in odd])
    assert np.median(strange[:, 1]) > 3  # distance
    assert np.median(strange[:, 2]) > 3  # l0


def test_a_text_without_a_measured_fit_has_no_l0_and_no_fvu(baseline: Baseline) -> None:
    text = texts(1, np.random.default_rng(13))[0]
    bare = TextVitals(n_tokens=text.n_tokens, firings=text.firings, totals=text.totals)
    scores = anomaly_scores(baseline, bare)
    assert np.isfinite([scores.registered_l0, scores.distance]).all()
    assert np.isnan([scores.l0, scores.fvu]).all()


def test_sums_of_pieces_are_those_of_the_whole() -> None:
    rng = np.random.default_rng(14)
    x, recons = rng.normal(size=(30, 5)), rng.normal(size=(30, 5))

    def sums(rows: slice) -> FitSums:
        mine = x[rows]
        return FitSums(
            n_tokens=len(mine),
            n_active=float(len(mine)),
            error=float(((mine - recons[rows]) ** 2).sum()),
            squares=float((mine**2).sum()),
            sums=mine.sum(axis=0),
        )

    parts = [{"a": sums(slice(0, 7))}, {}, {"a": sums(slice(7, 30))}]
    expected = ((x - recons) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
    assert summed(parts)["a"].fvu == pytest.approx(expected)
    stored = TextVitals(
        n_tokens=30,
        firings=np.array([1, 2]),
        totals=np.array([0.5, 1.5]),
        fits={"a": summed(parts)["a"]},
    )
    back = TextVitals.from_bytes(stored.to_bytes(), ["a"])
    assert back.fits["a"].fvu == pytest.approx(expected)
    assert back.firings.tolist() == [1, 2]
