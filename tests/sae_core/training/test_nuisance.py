from __future__ import annotations

import numpy as np
import pytest
from numpy import ndarray

from sae_core.evaluation.detection import auroc
from sae_core.training.activations import TrainingError
from sae_core.training.nuisance import RowGroups, latent_weights


def _data(seed: int, sources: list[str]) -> tuple[ndarray, list[str], ndarray]:
    """Harm is weak in latent 0 everywhere; each data set has an own level of latents 1 to 3."""
    rng = np.random.default_rng(seed)
    x, names, positive = [], [], []
    for number, source in enumerate(sources):
        is_harmful = number % 2 == 0
        part = rng.normal(0, 1, (80, 6))
        part[:, 1:4] += rng.normal(0, 4, 3)
        part[:, 0] += 1.5 * is_harmful
        x.append(part)
        names += [source] * 80
        positive += [is_harmful] * 80
    return np.concatenate(x).astype(np.float32), names, np.array(positive)


def test_discounting_data_sets_carries_over_to_unseen_ones() -> None:
    found: dict[float, list[float]] = {0.0: [], 10.0: []}
    for seed in range(8):
        x, names, positive = _data(seed, [f"s{i}" for i in range(8)])
        unseen, _, labels = _data(100 + seed, [f"t{i}" for i in range(8)])
        groups = RowGroups.of(names, positive)
        for nuisance, results in found.items():
            weight = latent_weights(x, groups, n_latents=6, nuisance=nuisance)
            scores = unseen.astype(np.float64) @ weight
            results.append(auroc(scores[labels], scores[~labels]))
    assert np.mean(found[10.0]) > np.mean(found[0.0]) + 0.05


def test_a_weight_is_contrast_over_variance() -> None:
    x, names, positive = _data(3, ["a", "b"])
    weight = latent_weights(x, RowGroups.of(names, positive), n_latents=6)
    contrast = x[positive].mean(axis=0) - x[~positive].mean(axis=0)
    variance = (x[positive].var(axis=0) + x[~positive].var(axis=0)) / 2
    np.testing.assert_allclose(weight, np.maximum(contrast, 0) / (variance + 1e-3), rtol=1e-4)


def test_a_large_data_set_counts_by_the_root_of_its_size() -> None:
    groups = RowGroups.of(["a"] * 90 + ["b"] * 10 + ["c"], np.array([True] * 100 + [False]))
    mass = np.bincount(groups.group_of, weights=groups.weight)
    assert mass[0] / mass[1] == pytest.approx(3.0)
    assert mass[0] + mass[1] == pytest.approx(1.0)


def test_the_latents_kept_are_few_and_never_negative() -> None:
    x, names, positive = _data(0, [f"s{i}" for i in range(8)])
    weight = latent_weights(x, RowGroups.of(names, positive), n_latents=1)
    assert np.flatnonzero(weight).tolist() == [0]
    assert (latent_weights(-x, RowGroups.of(names, positive), n_latents=6) >= 0).all()


def test_texts_of_one_label_are_refused() -> None:
    with pytest.raises(TrainingError, match="found no text benign among 4"):
        RowGroups.of(["a"] * 4, np.ones(4, np.bool_))
