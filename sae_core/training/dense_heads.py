"""Dense heads, SAE heads and their fusion, from the residuals of labelled texts.

All three are linear in their features, and fitted on the means of whole texts. Folds keep a data
set whole: what is chosen on held-out folds is chosen on data sets that the fold's heads never saw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from numpy import ndarray

from sae_core.evaluation.data import LabelledText
from sae_core.evaluation.detection import auroc
from sae_core.training.dictionary import Dictionary, ReadTexts, Streams, shared, some_texts
from sae_core.training.discovery import (
    ClusterPlan,
    LatentEvidence,
    TextActs,
    benign_ranks,
    rank_latents,
)
from sae_core.training.linear_heads import LinearHeads, fit_linear_heads
from sae_core.training.token_features import text_means


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    """Settings of everything that is fitted on labelled texts."""

    n_folds: int = 4
    """Folds over data sets."""
    l2_grid: tuple[float, ...] = (1e-2, 5e-2)
    """Weight penalties tried for the dense heads. On the default bundle's data, mean AUROC on
    unseen data sets was 0.855 at 1e-2, 0.876 at 5e-2, 0.874 at 2e-1."""
    n_candidates: int = 160
    """Latents by contrast that a cluster's SAE head may choose from."""
    n_latents: int = 32
    """Latents that a cluster keeps."""
    sae_l2: float = 1e-3
    sae_l1: float = 2e-4
    other_harm_weight: float = 0.05
    """Weight, against a benign text's 1, of a harmful text of another risk as a negative."""
    n_steps: int = 120


def source_folds(
    rows: Sequence[LabelledText], n_folds: int, origins: Mapping[str, str]
) -> Int64[ndarray, " n_texts"]:
    """A fold for every text, balanced in both labels; a data set lies in one.

    `origins` names the origin of data sets that have one in common; they lie in one fold too.
    """
    of_row = [origins.get(row.source, row.source) for row in rows]
    sizes: dict[str, list[int]] = {}
    for row, origin in zip(rows, of_row, strict=True):
        sizes.setdefault(origin, [0, 0])[int(row.is_harmful)] += 1
    totals = np.zeros((n_folds, 2))
    fold_of: dict[str, int] = {}
    for origin, size in sorted(sizes.items(), key=lambda item: (-max(item[1]), item[0])):
        after = totals + np.array(size)
        fold = int(np.argmin((after**2).sum(axis=1) - (totals**2).sum(axis=1)))
        fold_of[origin] = fold
        totals[fold] += size
    return np.array([fold_of[origin] for origin in of_row], np.int64)


class Targets(NamedTuple):
    """What each cluster's head should answer for each text, and how much the text counts."""

    target: Float32[ndarray, "n_texts n_clusters"]
    weight: Float32[ndarray, "n_texts n_clusters"]


def targets_of(
    plans: Sequence[ClusterPlan], rows: Sequence[LabelledText], other_harm_weight: float
) -> Targets:
    """Positives and benign texts weigh the same in sum; every data set of positives half evened.

    A data set's positives count by the square root of their number, so that one large data set
    does not define the risk.
    """
    target = np.array([[plan.has(row) for plan in plans] for row in rows], np.float32)
    benign = np.array([not row.is_harmful for row in rows])
    sources = np.array([row.source for row in rows])
    weight = np.full(target.shape, other_harm_weight, np.float32)
    for column in range(len(plans)):
        for positives in (True, False):
            chosen = target[:, column] == 1 if positives else benign
            for source in np.unique(sources[chosen]):
                same = chosen & (sources == source)
                weight[same, column] = 1 / np.sqrt(same.sum())
            weight[chosen, column] /= weight[chosen, column].sum()
        others = (target[:, column] == 0) & ~benign
        if others.any():
            weight[others, column] = other_harm_weight / others.sum()
    return Targets(target, weight)


class SAEHead(NamedTuple):
    """One cluster's latents with weights and scales."""

    evidence: tuple[LatentEvidence, ...]
    weight: Float32[ndarray, " n"]
    scale: Float32[ndarray, " n"]


class FittedHeads(NamedTuple):
    """Dense and SAE heads of all clusters."""

    dense: LinearHeads
    sae: tuple[SAEHead, ...]


def choose_l2(
    plans: Sequence[ClusterPlan],
    rows: Sequence[LabelledText],
    means: Float32[ndarray, "n_texts d_in"],
    folds: Int64[ndarray, " n_texts"],
    config: HeadConfig,
) -> tuple[float, dict[float, float]]:
    """The dense penalty with the best mean AUROC on data sets not trained on, and all results."""
    targets = targets_of(plans, rows, config.other_harm_weight)
    n = len(plans)
    found: dict[float, list[float]] = {l2: [] for l2 in config.l2_grid}
    for fold in range(config.n_folds):
        train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        heads = fit_linear_heads(
            means[train],
            np.tile(targets.target[train], len(config.l2_grid)),
            np.tile(targets.weight[train], len(config.l2_grid)),
            l2=np.repeat(np.array(config.l2_grid, np.float32), n),
            n_steps=config.n_steps,
        )
        scores = heads.logits(means[test]).astype(np.float64)
        for i, l2 in enumerate(config.l2_grid):
            found[l2] += _aurocs(plans, rows, test, scores[:, i * n : (i + 1) * n])
    results = {l2: float(np.mean(values)) for l2, values in found.items()}
    return max(results, key=lambda l2: (results[l2], l2)), results


def _aurocs(
    plans: Sequence[ClusterPlan],
    rows: Sequence[LabelledText],
    texts: Int64[ndarray, " n"],
    scores: Float64[ndarray, "n n_clusters"],
) -> list[float]:
    benign = np.array([not rows[i].is_harmful for i in texts])
    values = []
    for column, plan in enumerate(plans):
        positive = np.array([plan.has(rows[i]) for i in texts])
        if positive.sum() >= 5 and benign.sum() >= 5:
            values.append(auroc(scores[positive, column], scores[benign, column]))
    return values


def fit_heads(
    plans: Sequence[ClusterPlan],
    rows: Sequence[LabelledText],
    means: Float32[ndarray, "n_texts d_in"],
    acts: TextActs,
    l2: float,
    config: HeadConfig,
) -> FittedHeads:
    """Dense and SAE heads of every cluster on all the rows given."""
    targets = targets_of(plans, rows, config.other_harm_weight)
    dense = fit_linear_heads(
        means,
        targets.target,
        targets.weight,
        l2=np.full(len(plans), l2, np.float32),
        n_steps=config.n_steps,
    )
    return FittedHeads(dense, fit_sae_heads(plans, rows, acts, targets, config))


def fit_sae_heads(
    plans: Sequence[ClusterPlan],
    rows: Sequence[LabelledText],
    acts: TextActs,
    targets: Targets,
    config: HeadConfig,
) -> tuple[SAEHead, ...]:
    """For each cluster: candidates by contrast, non-negative weights, the strongest, refitted."""
    benign = np.array([not row.is_harmful for row in rows])
    hard = np.array([row.category == "benign_hard" for row in rows])
    least = max(3, len(rows) // 500)
    ranks = benign_ranks(acts.mean, benign, min_texts=least)
    hard_ranks = benign_ranks(acts.mean, hard, min_texts=least) if hard.any() else ranks
    heads = []
    for column, plan in enumerate(plans):
        evidence = rank_latents(
            plan, rows, acts, ranks, hard_ranks, n_candidates=config.n_candidates
        )
        if not evidence:
            heads.append(SAEHead((), np.empty(0, np.float32), np.empty(0, np.float32)))
            continue
        ids = [e.latent_id for e in evidence]
        features = acts.clipped[:, ids]
        target = targets.target[:, [column]]
        weight = targets.weight[:, [column]]

        def fit(
            features: ndarray, l1: float, target: ndarray = target, weight: ndarray = weight
        ) -> Float32[ndarray, " n"]:
            found = fit_linear_heads(
                features,
                target,
                weight,
                l2=np.array([config.sae_l2], np.float32),
                l1=l1,
                non_negative=True,
                n_steps=config.n_steps,
                learning_rate=0.05,
            )
            return found.weight[:, 0]

        first = fit(features, config.sae_l1)
        deviation = features.std(axis=0)
        strongest = np.argsort(-first * deviation, kind="stable")[: config.n_latents]
        strongest = np.sort(strongest[first[strongest] > 0])
        second = fit(features[:, strongest], 0.0)
        keep = second > 0
        kept = strongest[keep]
        scale = acts.scale[np.array(ids)[kept]]
        heads.append(SAEHead(tuple(evidence[i] for i in kept), second[keep], scale))
    return tuple(heads)


class Fusion(NamedTuple):
    """logit = bias + sae * sae_logit + dense * dense_logit, for every cluster."""

    sae: Float32[ndarray, " n_clusters"]
    dense: Float32[ndarray, " n_clusters"]
    bias: Float32[ndarray, " n_clusters"]


def token_pairs(
    heads: FittedHeads, streams: Streams, dictionary: Dictionary, dense_hook_point: str
) -> Float32[ndarray, "total n_clusters 2"]:
    """SAE and dense logit of every token."""
    resid = np.asarray(streams[dense_hook_point].resid)
    pairs = np.empty((len(resid), len(heads.sae), 2), np.float32)
    pairs[:, :, 1] = heads.dense.logits(resid)
    for column, head in enumerate(heads.sae):
        ids = [e.latent_id for e in head.evidence]
        if ids:
            acts = np.minimum(dictionary.acts_of(streams, ids) / head.scale, 1.0)
            pairs[:, column, 0] = acts @ head.weight
        else:
            pairs[:, column, 0] = 0.0
    return pairs


def fit_fusion(
    plans: Sequence[ClusterPlan],
    rows: Sequence[LabelledText],
    pairs: Float32[ndarray, "total n_clusters 2"],
    starts: Int64[ndarray, " n_texts_and_one"],
    config: HeadConfig,
) -> Fusion:
    """Non-negative fusion weights on token logits that their heads' training never saw."""
    targets = targets_of(plans, rows, config.other_harm_weight)
    result = np.zeros((3, len(plans)), np.float32)
    for column in range(len(plans)):
        fitted = fit_linear_heads(
            text_means(pairs[:, column], starts),
            targets.target[:, [column]],
            targets.weight[:, [column]],
            l2=np.array([1e-3], np.float32),
            non_negative=True,
            n_steps=config.n_steps,
            learning_rate=0.05,
        )
        result[:, column] = (*fitted.weight[:, 0], fitted.bias[0])
    return Fusion(*result)


def cross_fitted_pairs(
    plans: Sequence[ClusterPlan],
    rows: Sequence[LabelledText],
    read: ReadTexts,
    folds: Int64[ndarray, " n_texts"],
    l2: float,
    config: HeadConfig,
    progress: Callable[[str], None] = lambda line: None,
) -> Float32[ndarray, "total n_clusters 2"]:
    """Token logits of every text by heads that were fitted, latents chosen, on other folds."""
    texts = shared(read.streams)
    pairs = np.empty((len(texts.token_ids), len(plans), 2), np.float32)
    for fold in range(config.n_folds):
        train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        progress(f"fold {fold + 1} of {config.n_folds}: {len(train)} texts, {len(test)} held out")
        heads = fit_heads(
            plans,
            [rows[int(i)] for i in train],
            read.means[train],
            read.acts.of(train),
            l2,
            config,
        )
        held = some_texts(read.streams, test)
        found = token_pairs(heads, held, read.dictionary, read.dense_hook_point)
        for position, text in enumerate(test):
            pairs[texts.rows_of(int(text))] = found[shared(held).rows_of(position)]
    return pairs


def is_positive(
    plans: Sequence[ClusterPlan], rows: Sequence[LabelledText]
) -> dict[str, Bool[ndarray, " n_texts"]]:
    """For each cluster which rows are its positives."""
    return {plan.id: np.array([plan.has(row) for row in rows]) for plan in plans}
