"""Weights for latents in which what differs between data sets counts as noise.

    w = max(0, mean_positive - mean_benign) / (var_within + lambda * var_between)

for each latent alone. `var_within` is the variance inside data sets, `var_between` that of the
means of data sets of one label. A latent in which benign data sets differ among themselves, or
harmful ones, says which data set a text is from, and does not carry over to one that was not seen.
The idea is known in speaker recognition as within-class covariance normalisation (Hatch et al.
2006).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from numpy import ndarray

from sae_core.training.activations import TrainingError


class RowGroups(NamedTuple):
    """Texts in groups: one data set's texts of one label."""

    group_of: Int64[ndarray, " n_texts"]
    """The group of each text, from 0."""
    is_positive: Bool[ndarray, " n_groups"]
    positive: Bool[ndarray, " n_texts"]
    weight: Float64[ndarray, " n_texts"]
    """Sums to 1 for each label; within a label a data set of n texts counts sqrt(n)."""

    @classmethod
    def of(cls, sources: Sequence[str], positive: Bool[ndarray, " n_texts"]) -> RowGroups:
        """Groups of texts by data set and label.

        Raises:
            TrainingError: One of the labels has no text.
        """
        if not positive.any() or positive.all():
            missing = "benign" if positive.any() else "of the risk"
            raise TrainingError(f"found no text {missing} among {len(positive)}, expected both")
        keys = sorted({*zip(sources, positive.tolist(), strict=True)})
        index = {key: i for i, key in enumerate(keys)}
        group_of = np.array(
            [index[key] for key in zip(sources, positive.tolist(), strict=True)], np.int64
        )
        sizes = np.bincount(group_of)
        weight = sizes[group_of] ** -0.5
        for label in (True, False):
            weight[positive == label] /= weight[positive == label].sum()
        return cls(group_of, np.array([key[1] for key in keys], np.bool_), positive, weight)


class _Moments(NamedTuple):
    difference: Float64[ndarray, " n"]
    within: Float64[ndarray, "total n"]
    """Weighted deviations from the group's mean; their squares sum to var_within."""
    between: Float64[ndarray, "n_groups n"]
    """Weighted deviations of group means from the label's mean."""


def _moments(features: Float32[ndarray, "n_texts n"], groups: RowGroups) -> _Moments:
    x = features.astype(np.float64)
    means = np.zeros((len(groups.is_positive), x.shape[1]))
    mass = np.bincount(groups.group_of, weights=groups.weight)
    for group in range(len(means)):
        means[group] = x[groups.group_of == group].mean(axis=0)
    centre = {
        label: np.average(
            means[groups.is_positive == label], axis=0, weights=mass[groups.is_positive == label]
        )
        for label in (True, False)
    }
    centres = np.where(groups.is_positive[:, None], centre[True], centre[False])
    return _Moments(
        centre[True] - centre[False],
        (x - means[groups.group_of]) * np.sqrt(groups.weight / 2)[:, None],
        (means - centres) * np.sqrt(mass / 2)[:, None],
    )


def latent_weights(
    features: Float32[ndarray, "n_texts n"],
    groups: RowGroups,
    *,
    n_latents: int,
    nuisance: float = 10.0,
) -> Float64[ndarray, " n"]:
    """Non-negative weights; at most `n_latents` are not 0. `nuisance` is lambda above.

    Those are kept whose weight times deviation is largest. `features` are a latent's text means
    after scaling; for a latent that hardly ever fires the variance is held at a floor.
    """
    m = _moments(features, groups)
    variance = (m.within**2).sum(axis=0) + nuisance * (m.between**2).sum(axis=0)
    found: ndarray = np.maximum(m.difference, 0.0) / (variance + 1e-3)
    effect = found * features.std(axis=0)
    if len(effect) > n_latents:
        found[np.argsort(-effect, kind="stable")[n_latents:]] = 0.0
    return found
