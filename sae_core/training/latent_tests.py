"""Which latents differ between harmful and benign texts, by three criteria, with errors counted.

mean difference and AUROC are read off each latent alone; a rank test gives its p-value and
Benjamini and Hochberg's procedure keeps the share of false findings below a rate. Stability
selection then asks which of the found latents a sparse model needs, on halves of the texts.

The p-values take texts as independent. Texts of one data set are not: `shortcut_audit` asks the
rest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from numpy import ndarray
from scipy.stats import false_discovery_control, mannwhitneyu

from sae_core.training.activations import TrainingError
from sae_core.training.linear_heads import fit_linear_heads

CHUNK_LATENTS = 256
"""Columns ranked at a time; 256 columns of 10,000 texts are 20 MiB in float64."""
NEGLIGIBLE = 0.01
"""A weight below this share of the largest one counts as not selected."""


class LatentTests(NamedTuple):
    """One number a latent, of one risk against benign texts."""

    mean_difference: Float64[ndarray, " d_sae"]
    """Of text means, in standard deviations over all texts."""
    auroc: Float64[ndarray, " d_sae"]
    p_value: Float64[ndarray, " d_sae"]
    """One-sided: larger on the risk's texts. 1 where a latent fires in too few texts."""
    q_value: Float64[ndarray, " d_sae"]
    """Smallest false discovery rate at which the latent is found."""


def latent_tests(
    mean_acts: Float32[ndarray, "n_texts d_sae"],
    positive: Bool[ndarray, " n_texts"],
    benign: Bool[ndarray, " n_texts"],
    *,
    min_texts: int = 8,
) -> LatentTests:
    """Every latent's contrast; those that fire in fewer than `min_texts` texts are not tested.

    The rank test is Mann and Whitney's with ties corrected. Untested latents take no part in the
    control of false discoveries.

    Raises:
        TrainingError: No positive or no benign text.
    """
    n_positive, n_benign = int(positive.sum()), int(benign.sum())
    if not n_positive or not n_benign:
        raise TrainingError(
            f"found {n_positive} texts of the risk and {n_benign} benign, expected both"
        )
    d_sae = mean_acts.shape[1]
    chosen = positive | benign
    tested = np.flatnonzero(np.count_nonzero(mean_acts[chosen], axis=0) >= min_texts)
    difference, auroc = np.zeros(d_sae), np.full(d_sae, 0.5)
    p_value, q_value = np.ones(d_sae), np.ones(d_sae)
    for start in range(0, len(tested), CHUNK_LATENTS):
        part = tested[start : start + CHUNK_LATENTS]
        acts = mean_acts[:, part].astype(np.float64)
        deviation = np.maximum(acts[chosen].std(axis=0), np.finfo(np.float64).tiny)
        difference[part] = (acts[positive].mean(axis=0) - acts[benign].mean(axis=0)) / deviation
        found = mannwhitneyu(
            acts[positive], acts[benign], alternative="greater", method="asymptotic", axis=0
        )
        auroc[part] = found.statistic / (n_positive * n_benign)
        p_value[part] = np.nan_to_num(found.pvalue, nan=1.0)
    if len(tested):
        q_value[tested] = false_discovery_control(p_value[tested], method="bh")
    return LatentTests(difference, auroc, p_value, q_value)


class Stability(NamedTuple):
    """How often a sparse model chose each candidate."""

    share: Float64[ndarray, " n_candidates"]
    """Of the halves of the texts, in which it had weight."""
    n_selected: float
    """Candidates with weight in one half, on average."""

    def expected_false(self, threshold: float) -> float:
        """Bound on how many candidates of no use have a share of at least `threshold`.

        `threshold` above one half. Source: Meinshausen and Buehlmann 2010, arXiv:0809.2932,
        theorem 1.
        """
        n = len(self.share)
        return min(self.n_selected**2 / ((2 * threshold - 1) * max(n, 1)), float(n))


def stability_selection(
    mean_acts: Float32[ndarray, "n_texts n_candidates"],
    target: Float32[ndarray, " n_texts"],
    text_weight: Float32[ndarray, " n_texts"],
    groups: Int64[ndarray, " n_texts"],
    *,
    n_halves: int = 40,
    l1: float = 5e-3,
    n_steps: int = 150,
    seed: int = 0,
) -> Stability:
    """Non-negative sparse logistic regression on halves of the texts, in complementary pairs.

    Each pair splits every group (a data set's texts of one label) in two. A candidate needs a
    weight beside all others, so that of several latents that say the same few are chosen.
    """
    rng = np.random.default_rng(seed)
    n_texts = len(target)
    inside = np.zeros((n_texts, 2 * (n_halves // 2)), np.float32)
    for pair in range(n_halves // 2):
        for group in np.unique(groups):
            members = rng.permutation(np.flatnonzero(groups == group))
            cut = (len(members) + int(rng.integers(2))) // 2
            inside[members[:cut], 2 * pair] = 1.0
            inside[members[cut:], 2 * pair + 1] = 1.0
    n_heads = inside.shape[1]
    heads = fit_linear_heads(
        mean_acts - mean_acts.mean(axis=0),  # the bias need not chase what always fires
        np.repeat(target[:, None], n_heads, axis=1),
        inside * text_weight[:, None],
        l2=np.full(n_heads, 1e-4, np.float32),
        l1=l1,
        non_negative=True,
        n_steps=n_steps,
        learning_rate=0.05,
    )
    effect = heads.weight * mean_acts.std(axis=0)[:, None]
    chosen = effect > NEGLIGIBLE * effect.max(axis=0, initial=0.0)
    return Stability(chosen.mean(axis=1), float(chosen.sum(axis=0).mean()))
