"""Aggregation against a plain loop, and the same bits however the tokens arrive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_core.aggregation import AggregateKind, AggregateSpec, AggregateState, Aggregator
from sae_core.errors import HeadError, ScorerError, ShapeError

SPECS = st.builds(
    lambda k, window, **rest: AggregateSpec(k=min(k, window), window=window, **rest),
    kind=st.sampled_from(get_args(AggregateKind)),
    window=st.integers(1, 9),
    k=st.integers(1, 5),
    alpha=st.floats(0.01, 1.0),
    min_evidence_tokens=st.integers(0, 5),
    evidence_floor=st.floats(-2.0, 2.0),
)


def values_of(spec: AggregateSpec, logits: Sequence[float]) -> list[float]:
    """Each position's value before the gate, by the book."""
    values: list[float] = []
    for t, x in enumerate(logits):
        if spec.kind == "max":
            values.append(x)
        elif spec.kind == "mean":
            values.append(math.fsum(logits[: t + 1]) / (t + 1))
        elif spec.kind in ("max_rolling_mean", "max_window_mean"):
            last = logits[max(0, t + 1 - spec.window) : t + 1]
            values.append(math.fsum(last) / len(last))
        elif spec.kind == "top_k_mean":
            top = sorted(logits[: t + 1])[-spec.k :]
            values.append(math.fsum(top) / len(top))
        elif spec.kind == "k_of_window":
            last = sorted(logits[max(0, t + 1 - spec.window) : t + 1])
            values.append(last[-min(spec.k, len(last))])
        else:
            values.append(x if t == 0 else (1 - spec.alpha) * values[-1] + spec.alpha * x)
    return values


def running_of(spec: AggregateSpec, fused: Sequence[float], source: Sequence[float]) -> list[float]:
    """The running score of one source; gated where `source` is `fused`."""
    best, running, evidence = -math.inf, [], 0
    least = spec.window if spec.kind == "max_window_mean" else 1
    for t, value in enumerate(values_of(spec, source)):
        evidence += fused[t] > spec.evidence_floor
        if source is fused and evidence < spec.min_evidence_tokens:
            value = min(value, spec.evidence_floor)
        if t + 1 < least:
            value = -math.inf
        best = value if spec.kind in ("mean", "top_k_mean") else max(best, value)
        running.append(best)
    return running


def random_logits(rng: np.random.Generator, n: int, n_clusters: int) -> np.ndarray:
    logits = rng.normal(0, 3, (n, n_clusters, 3))
    logits[rng.random(logits.shape) < 0.2] = 1.0  # ties
    return logits.astype(np.float32)


def whole(aggregator: Aggregator, logits: np.ndarray) -> tuple[AggregateState, np.ndarray]:
    state = aggregator.start()
    return state, aggregator.update(state, logits)


@settings(max_examples=150, deadline=None)
@given(st.lists(SPECS, min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_running_scores_equal_a_plain_loop(specs: list[AggregateSpec], n: int, seed: int) -> None:
    logits = random_logits(np.random.default_rng(seed), n, len(specs))
    aggregator = Aggregator(specs)
    state, running = whole(aggregator, logits)
    for c, spec in enumerate(specs):
        columns = [logits[:, c, s].astype(float).tolist() for s in range(3)]
        for s in range(3):
            expected = running_of(spec, columns[0], columns[s])
            np.testing.assert_allclose(running[:, c, s], expected, rtol=1e-12, atol=1e-12)
        if spec.kind == "max_window_mean" and n < spec.window:
            rows = logits[:, c, 1:].astype(float)
            assert aggregator.score(state)[c, 1:] == pytest.approx(rows.mean(axis=0), abs=1e-12)
        else:
            assert np.array_equal(aggregator.score(state)[c], running[-1, c])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(SPECS, min_size=1, max_size=6),
    st.lists(st.integers(0, 12), min_size=1, max_size=12),
    st.integers(0, 2**32 - 1),
)
def test_any_chunking_gives_the_same_bits(
    specs: list[AggregateSpec], chunks: list[int], seed: int
) -> None:
    logits = random_logits(np.random.default_rng(seed), sum(chunks), len(specs))
    aggregator = Aggregator(specs)
    one_state, one = whole(aggregator, logits)
    for sizes in (chunks, [1] * sum(chunks)):
        state, parts, start = aggregator.start(), [], 0
        for size in sizes:
            parts.append(aggregator.update(state, logits[start : start + size]))
            start += size
        many = np.concatenate(parts) if parts else one
        assert many.tobytes() == one.tobytes()
        assert aggregator.score(state).tobytes() == aggregator.score(one_state).tobytes()
        for c in range(len(specs)):
            ours, theirs = aggregator.support(state, c), aggregator.support(one_state, c)
            assert ours[:2] == theirs[:2]
            assert ours.gated == theirs.gated
            assert ours.weights.tobytes() == theirs.weights.tobytes()


@settings(max_examples=150, deadline=None)
@given(SPECS, st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_support_reproduces_the_fused_score(spec: AggregateSpec, n: int, seed: int) -> None:
    logits = random_logits(np.random.default_rng(seed), n, 1)
    aggregator = Aggregator([spec])
    state, _ = whole(aggregator, logits)
    support = aggregator.support(state, 0)
    fused = logits[support.start : support.stop, 0, 0].astype(float)
    ungated = float(np.sum(support.weights * fused))
    score = float(aggregator.score(state)[0, 0])
    values = values_of(spec, logits[:, 0, 0].astype(float).tolist())
    at = len(values) - 1 if spec.kind == "top_k_mean" else support.stop - 1
    if spec.kind == "k_of_window":  # the token may lie before the end of its window
        at = int(np.argmin(np.abs(np.array(values) - ungated)))
    assert ungated == pytest.approx(values[at], rel=1e-9, abs=1e-9)
    assert math.fsum(support.weights) == pytest.approx(1.0, rel=1e-9)
    if support.gated:
        assert score == spec.evidence_floor < ungated
    else:
        assert score == pytest.approx(ungated, rel=1e-9, abs=1e-9)


def one_cluster(spec: AggregateSpec, fused: Sequence[float]) -> list[float]:
    logits = np.zeros((len(fused), 1, 3), np.float32)
    logits[:, 0, 0] = fused
    return [float(x) for x in whole(Aggregator([spec]), logits)[1][:, 0, 0]]


def test_rolling_mean_is_of_the_last_window_and_keeps_its_maximum() -> None:
    spec = AggregateSpec(kind="max_rolling_mean", window=2, min_evidence_tokens=0)
    assert one_cluster(spec, [1, 3, 5, -9, -9]) == [1, 2, 4, 4, 4]


def test_window_mean_is_of_whole_windows_and_provisional_before() -> None:
    spec = AggregateSpec(kind="max_window_mean", window=2, min_evidence_tokens=0)
    aggregator = Aggregator([spec])
    state = aggregator.start()
    first = aggregator.update(state, np.full((1, 1, 3), 9.0, np.float32))
    assert first[0, 0, 0] == -math.inf
    assert aggregator.score(state)[0, 0] == 9.0
    assert aggregator.support(state, 0)[:2] == (0, 1)
    later = aggregator.update(
        state, np.array([1.0, 3.0, 0.0], np.float32).reshape(3, 1, 1).repeat(3, 2)
    )
    assert later[:, 0, 0].tolist() == [5.0, 5.0, 5.0]
    assert aggregator.support(state, 0)[:2] == (0, 2)


def test_top_k_mean_is_of_the_largest_wherever_they_are() -> None:
    spec = AggregateSpec(kind="top_k_mean", k=2, min_evidence_tokens=0)
    assert one_cluster(spec, [4, 0, 6, -9, 8]) == [4, 2, 5, 5, 7]


def test_k_of_window_reaches_a_threshold_where_k_tokens_of_one_window_do() -> None:
    spec = AggregateSpec(kind="k_of_window", k=2, window=3, min_evidence_tokens=0)
    assert one_cluster(spec, [5, 1, -2, -2, 7, 6, -9]) == [5, 5, 5, 5, 5, 6, 6]
    assert one_cluster(spec, [-1, 5, -2, 4, -9, 3]) == [-1, -1, -1, 4, 4, 4]


def test_gate_holds_the_score_at_the_floor_until_evidence_is_enough() -> None:
    spec = AggregateSpec(kind="max", min_evidence_tokens=3, evidence_floor=0.5)
    assert one_cluster(spec, [9, 0.5, 8, -1, 7]) == [0.5, 0.5, 0.5, 0.5, 7]


def test_gate_lets_low_scores_through_as_they_are() -> None:
    spec = AggregateSpec(kind="max", min_evidence_tokens=3)
    assert one_cluster(spec, [-4, -2, -3]) == [-4, -2, -2]


def test_gate_leaves_dense_and_sae_alone() -> None:
    spec = AggregateSpec(kind="max", min_evidence_tokens=3)
    _, running = whole(Aggregator([spec]), np.full((1, 1, 3), 5, np.float32))
    assert running[0, 0].tolist() == [0, 5, 5]


def test_first_of_equal_positions_supports_the_score() -> None:
    aggregator = Aggregator([AggregateSpec(kind="max", min_evidence_tokens=0)])
    state, _ = whole(aggregator, np.full((4, 1, 3), 2, np.float32))
    assert aggregator.support(state, 0)[:2] == (0, 1)


def test_before_the_first_token_the_score_is_nan_and_nothing_supports_it() -> None:
    aggregator = Aggregator([AggregateSpec(), AggregateSpec(kind="ema")])
    state = aggregator.start()
    assert aggregator.update(state, np.zeros((0, 2, 3), np.float32)).shape == (0, 2, 3)
    assert np.isnan(aggregator.score(state)).all()
    assert aggregator.support(state, 1)[:2] == (0, 0)


def test_a_copied_state_goes_its_own_way() -> None:
    aggregator = Aggregator([AggregateSpec(kind=kind) for kind in get_args(AggregateKind)])
    logits = random_logits(np.random.default_rng(0), 30, len(aggregator.specs))
    state, _ = whole(aggregator, logits[:10])
    before = state.copy()
    aggregator.update(state, logits[10:])
    running = aggregator.update(before, logits[10:])
    assert running.tobytes() == whole(aggregator, logits)[1][10:].tobytes()


def test_a_logit_that_is_not_finite_is_refused_and_changes_nothing() -> None:
    aggregator = Aggregator([AggregateSpec(), AggregateSpec()])
    state, _ = whole(aggregator, np.zeros((5, 2, 3), np.float32))
    logits = np.zeros((2, 2, 3), np.float32)
    logits[1, 1, 2] = np.nan
    with pytest.raises(ScorerError, match="sae logit nan of cluster 1 at token 6"):
        aggregator.update(state, logits)
    assert state.n_tokens == 5


def test_logits_of_another_number_of_clusters_are_refused() -> None:
    aggregator = Aggregator([AggregateSpec()])
    with pytest.raises(ShapeError, match=r"\(4, 2, 3\), expected \(n, 1, 3\)"):
        aggregator.update(aggregator.start(), np.zeros((4, 2, 3), np.float32))


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"window": 0}, "window is 0"),
        ({"k": 0}, "k is 0"),
        ({"kind": "k_of_window", "k": 3, "window": 2}, "k is 3 tokens of a window of 2"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"min_evidence_tokens": -1}, "min_evidence_tokens is -1"),
        ({"evidence_floor": math.nan}, "evidence_floor is nan"),
    ],
)
def test_impossible_settings_are_refused(settings_: dict[str, float], said: str) -> None:
    with pytest.raises(HeadError, match=said):
        AggregateSpec(**settings_)  # type: ignore[arg-type]
