"""Which latents speak of a risk: contrast of labelled texts, one data set against the others.

A latent's evidence for a cluster is the AUROC of its text mean, harmful rows of the cluster
against all benign rows, and how many data sets agree: a latent that only marks one data set's
manner of writing is a shortcut and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from numpy import ndarray

from sae_core.evaluation.data import LabelledText
from sae_core.sae import SAE
from sae_core.training.examples import ResidualSet
from sae_core.training.token_features import latent_chunks

SCALE_QUANTILE = 0.9
BROAD = "*"
"""A cluster's category that stands for every harmful row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """A risk to build a cluster for."""

    id: str
    title: str
    severity: str
    """info | warning | critical."""
    categories: tuple[str, ...]
    """Categories of harmful rows that belong to it, or (BROAD,)."""

    def has(self, row: LabelledText) -> bool:
        """Whether a row is a positive example."""
        return row.is_harmful and (BROAD in self.categories or row.category in self.categories)


@dataclass(frozen=True, slots=True, kw_only=True)
class SilencePlan:
    """What latents may go silent in: refusals beside answers, jailbreaks beside plain requests."""

    id: str
    event: tuple[str, ...]
    """Categories of the texts in which they go silent, whatever the label."""
    reference: tuple[str, ...]
    """Categories of the texts on which they fire."""


class TextActs(NamedTuple):
    """Every latent, summarised over each text."""

    mean: Float32[ndarray, "n_texts d_sae"]
    fires: Bool[ndarray, "n_texts d_sae"]
    clipped: Float32[ndarray, "n_texts d_sae"]
    """Mean of min(act / scale, 1): what the transform `clip` makes of a latent."""
    scale: Float32[ndarray, " d_sae"]
    """90 % quantile of a latent's activations where it fires; 1 where it never does."""

    def of(self, texts: Int64[ndarray, " n"]) -> TextActs:
        """Some of the texts, on the same scales."""
        return TextActs(self.mean[texts], self.fires[texts], self.clipped[texts], self.scale)


class LatentEvidence(NamedTuple):
    """What speaks for one latent in one cluster."""

    latent_id: int
    auroc: float
    """Text mean, the cluster's rows against all benign rows."""
    auroc_hard: float
    """The same against benign rows that look dangerous."""
    n_sources: int
    """Data sets of positives in which its AUROC is above one half."""
    n_sources_tested: int
    positive_rate: float
    """Share of the cluster's texts in which it fires."""
    benign_rate: float


def text_acts(sae: SAE, texts: ResidualSet) -> TextActs:
    """Mean, firing and clipped mean of every latent in every text."""
    n, d_sae = len(texts), sae.config.d_sae
    text_of = texts.text_of_token()
    cells, values = [], []  # of the few pairs of token and latent that are active
    for part, acts in latent_chunks(sae, texts):
        rows, latents = np.nonzero(acts)
        cells.append(text_of[part][rows] * d_sae + latents)
        values.append(acts[rows, latents])
    cell = np.concatenate(cells) if cells else np.empty(0, np.int64)
    value = np.concatenate(values) if values else np.empty(0, np.float32)
    scale = _scales(cell % d_sae, value, d_sae)
    lengths = np.maximum(np.diff(texts.starts), 1)[:, None]

    def means(of_active: Float32[ndarray, " n_active"]) -> Float32[ndarray, "n_texts d_sae"]:
        sums = np.bincount(cell, weights=of_active, minlength=n * d_sae).reshape(n, d_sae)
        return (sums / lengths).astype(np.float32)

    mean = means(value)
    return TextActs(mean, mean > 0, means(np.minimum(value / scale[cell % d_sae], 1.0)), scale)


def _scales(
    latent_of: Int64[ndarray, " n_active"], value: Float32[ndarray, " n_active"], d_sae: int
) -> Float32[ndarray, " d_sae"]:
    order = np.argsort(latent_of, kind="stable")
    edges = np.searchsorted(latent_of[order], np.arange(d_sae + 1))
    scale = np.ones(d_sae, np.float32)
    for latent, (start, stop) in enumerate(pairwise(edges.tolist())):
        if stop > start:
            scale[latent] = np.quantile(value[order[start:stop]], SCALE_QUANTILE)
    return scale


def benign_ranks(
    values: Float32[ndarray, "n_texts n"],
    is_benign: Bool[ndarray, " n_texts"],
    *,
    min_texts: int = 1,
) -> Float32[ndarray, "n_texts n"]:
    """For each text and column the share of benign texts below it, ties counted half.

    The mean over a set of texts is that set's AUROC against the benign texts. Columns that are
    not zero in fewer than `min_texts` texts tell nothing and get one half everywhere.
    """
    ranks = np.full(values.shape, 0.5, np.float32)
    n_benign = int(is_benign.sum())
    for column in np.flatnonzero(np.count_nonzero(values, axis=0) >= min_texts):
        ordered = np.sort(values[is_benign, column])
        below = np.searchsorted(ordered, values[:, column], side="left")
        upto = np.searchsorted(ordered, values[:, column], side="right")
        ranks[:, column] = (below + upto) / (2.0 * n_benign)
    return ranks


def rank_latents(
    plan: ClusterPlan,
    rows: Sequence[LabelledText],
    acts: TextActs,
    ranks: Float32[ndarray, "n_texts d_sae"],
    hard_ranks: Float32[ndarray, "n_texts d_sae"],
    *,
    n_candidates: int,
    min_positive_rate: float = 0.02,
    min_source_texts: int = 8,
    min_sources: int = 3,
    min_agreement: float = 0.6,
) -> tuple[LatentEvidence, ...]:
    """The strongest latents of a cluster, best first.

    `hard_ranks` are ranks among hard benign texts. A latent must fire in `min_positive_rate` of
    the positives, more often than among benign texts, and have AUROC above one half in
    `min_agreement` of the data sets that have `min_source_texts` positives (and in at least
    `min_sources` of them, where there are as many).
    """
    positive = np.array([plan.has(row) for row in rows])
    benign = np.array([not row.is_harmful for row in rows])
    sources = np.array([row.source for row in rows])
    auroc = ranks[positive].mean(axis=0, dtype=np.float64)
    auroc_hard = hard_ranks[positive].mean(axis=0, dtype=np.float64)
    positive_rate = acts.fires[positive].mean(axis=0)
    benign_rate = acts.fires[benign].mean(axis=0)
    tested = [
        s for s in np.unique(sources[positive]) if _n(positive, sources, s) >= min_source_texts
    ]
    agree = np.zeros(len(auroc), np.int64)
    for source in tested:
        agree += ranks[positive & (sources == source)].mean(axis=0) > 0.5
    enough = (agree >= min(min_sources, len(tested))) & (agree >= min_agreement * len(tested))
    good = enough & (positive_rate >= min_positive_rate) & (positive_rate > benign_rate)
    good &= (auroc > 0.5) & (auroc_hard > 0.5)
    strength: Float64[ndarray, " d_sae"] = np.where(good, auroc + 0.5 * auroc_hard, -1.0)
    order: Int64[ndarray, " n"] = np.argsort(-strength, kind="stable")[:n_candidates]
    return tuple(
        LatentEvidence(
            latent_id=int(i),
            auroc=float(auroc[i]),
            auroc_hard=float(auroc_hard[i]),
            n_sources=int(agree[i]),
            n_sources_tested=len(tested),
            positive_rate=float(positive_rate[i]),
            benign_rate=float(benign_rate[i]),
        )
        for i in order
        if strength[i] > 0
    )


def _n(positive: ndarray, sources: ndarray, source: str) -> int:
    return int((positive & (sources == source)).sum())


def latent_labels(
    acts: Float32[ndarray, "total n_latents"],
    token_texts: Sequence[str],
    *,
    n_tokens: int = 4,
    min_count: int = 3,
) -> tuple[str, ...]:
    """For each latent the tokens on which it is strongest, as "tokens: a, b, c".

    Plain token statistics, no interpretation: a token's rank is its mean activation where the
    latent fires, times the root of how often it does. `token_texts` has one entry a token.
    """
    folded = np.array([text.strip(" \t\n\r\u2581").lower() for text in token_texts])
    words, word_of = np.unique(folded, return_inverse=True)
    labels = []
    for column in range(acts.shape[1]):
        active = np.flatnonzero(acts[:, column] > 0)
        counts = np.bincount(word_of[active], minlength=len(words))
        sums = np.bincount(word_of[active], weights=acts[active, column], minlength=len(words))
        needed = min_count if counts.max(initial=0) >= min_count else 1
        score = np.where(counts >= needed, sums / np.sqrt(np.maximum(counts, 1)), 0.0)
        best = [i for i in np.argsort(-score, kind="stable")[: 4 * n_tokens] if score[i] > 0]
        printable = [words[i] for i in best if words[i] and words[i].isprintable()]
        spoken = [word for word in printable if sum(c.isalnum() for c in word) > 1]
        names = (spoken or printable)[:n_tokens]
        labels.append("tokens: " + ", ".join(names) if names else "tokens: (no single token)")
    return tuple(labels)
