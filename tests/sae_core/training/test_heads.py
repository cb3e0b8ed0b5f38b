from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sae_core.aggregation import AggregateSpec
from sae_core.evaluation.data import LabelledText
from sae_core.evaluation.detection import auroc
from sae_core.sae import SAE
from sae_core.sae_config import SAEConfig
from sae_core.sae_weights import SAEWeights
from sae_core.training.dense_heads import (
    HeadConfig,
    choose_l2,
    cross_fitted_pairs,
    fit_fusion,
    fit_heads,
    source_folds,
    targets_of,
)
from sae_core.training.dictionary import Dictionary, PlacedSAE, ReadTexts
from sae_core.training.discovery import (
    BROAD,
    ClusterPlan,
    benign_ranks,
    latent_labels,
    rank_latents,
    text_acts,
)
from sae_core.training.examples import ResidualSet, cached_residuals
from sae_core.training.linear_heads import fit_linear_heads
from sae_core.training.token_features import text_means, text_scores

D_IN = 8
PLAN = ClusterPlan(id="a", title="A", severity="warning", categories=("a",))
ANY = ClusterPlan(id="any", title="Any", severity="warning", categories=(BROAD,))
CONFIG = HeadConfig(n_folds=2, l2_grid=(1e-3, 1e-2), n_candidates=4, n_latents=2, n_steps=80)


def _identity_sae() -> SAE:
    """Latent i is dimension i where it exceeds 0.5; latent 8 is always silent."""
    import torch

    return SAE(
        SAEConfig(architecture="jumprelu", d_in=D_IN, d_sae=D_IN + 1),
        SAEWeights(
            W_enc=torch.eye(D_IN, D_IN + 1),
            b_enc=torch.zeros(D_IN + 1),
            W_dec=torch.eye(D_IN + 1, D_IN),
            b_dec=torch.zeros(D_IN),
            threshold=torch.full((D_IN + 1,), 0.5),
        ),
    )


def _labelled() -> tuple[list[LabelledText], ResidualSet]:
    """Risk a raises dimension 2 for four tokens of a text; source s0 also raises dimension 5."""
    rng = np.random.default_rng(0)
    rows, parts = [], []
    for index in range(160):
        is_harmful, source = index % 2 == 0, f"s{index // 2 % 4}"
        resid = rng.normal(0, 0.3, size=(int(rng.integers(5, 30)), D_IN)).astype(np.float32)
        if is_harmful:
            start = rng.integers(0, len(resid) - 4)
            resid[start : start + 4, 2] += 2.0
            if source == "s0":
                resid[:, 5] += 2.0
        category = "a" if is_harmful else "benign_hard"
        rows.append(
            LabelledText(text=str(index), is_harmful=is_harmful, category=category, source=source)
        )
        parts.append(resid)
    starts = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
    resid = np.concatenate(parts)
    return rows, ResidualSet(resid, np.arange(len(resid), dtype=np.int32), starts)


def test_a_head_on_means_finds_what_tells_texts_apart() -> None:
    rows, texts = _labelled()
    targets = targets_of([PLAN], rows, 0.05)
    means = text_means(texts.resid, texts.starts)
    heads = fit_linear_heads(
        means, targets.target, targets.weight, l2=np.array([1e-4], np.float32), n_steps=120
    )
    direction = heads.weight[:, 0] / np.linalg.norm(heads.weight[:, 0])
    assert direction[2] > 0.6
    scores = heads.logits(means)[:, 0].astype(np.float64)
    harmful = np.array([row.is_harmful for row in rows])
    assert auroc(scores[harmful], scores[~harmful]) > 0.97
    of_tokens = text_means(heads.logits(texts.resid), texts.starts)
    np.testing.assert_allclose(of_tokens, heads.logits(means), rtol=1e-4, atol=1e-4)


def test_non_negative_heads_have_no_negative_weight() -> None:
    rows, texts = _labelled()
    targets = targets_of([PLAN], rows, 0.05)
    heads = fit_linear_heads(
        text_means(-texts.resid, texts.starts),
        targets.target,
        targets.weight,
        l2=np.array([1e-3], np.float32),
        non_negative=True,
        n_steps=40,
    )
    assert (heads.weight >= 0).all()
    assert heads.weight[2, 0] == 0


def test_ranks_average_to_auroc() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, size=(50, 3)).astype(np.float32)
    benign = np.arange(50) < 30
    ranks = benign_ranks(values, benign)
    for column in range(3):
        expected = auroc(
            values[~benign, column].astype(np.float64), values[benign, column].astype(np.float64)
        )
        assert float(ranks[~benign, column].mean()) == pytest.approx(expected, abs=1e-6)


def test_shortcut_of_one_data_set_is_not_chosen() -> None:
    rows, texts = _labelled()
    acts = text_acts(_identity_sae(), texts)
    benign = np.array([not row.is_harmful for row in rows])
    ranks = benign_ranks(acts.mean, benign)
    found = rank_latents(PLAN, rows, acts, ranks, ranks, n_candidates=9)
    ids = [evidence.latent_id for evidence in found]
    assert ids[0] == 2
    assert 5 not in ids
    assert 8 not in ids
    assert found[0].n_sources == found[0].n_sources_tested == 4


def test_text_acts_are_means_over_the_text() -> None:
    _, texts = _labelled()
    acts = text_acts(_identity_sae(), texts)
    resid = texts.resid[texts.rows_of(7)]
    active = np.where(resid > 0.5, resid, 0)
    np.testing.assert_allclose(acts.mean[7, :D_IN], active.mean(axis=0), rtol=1e-5, atol=1e-6)
    for latent in range(D_IN):
        column = texts.resid[:, latent]
        scale = np.quantile(column[column > 0.5], 0.9)
        assert acts.scale[latent] == pytest.approx(scale, rel=1e-5)
        clipped = np.minimum(active[:, latent] / scale, 1.0).mean()
        assert acts.clipped[7, latent] == pytest.approx(clipped, rel=1e-4, abs=1e-6)
    assert acts.scale[D_IN] == 1.0
    assert (acts.fires[7, :D_IN] == (resid > 0.5).any(axis=0)).all()


def test_labels_name_the_tokens_of_a_latent() -> None:
    acts = np.array([[3.0, 0.0], [2.5, 0.0], [3.0, 0.0], [0.1, 0.0]], np.float32)
    labels = latent_labels(acts, [" Hack", "hack", "hack ", "the"], min_count=2)
    assert labels[0].startswith("tokens: hack")
    assert labels[1] == "tokens: (no single token)"


def test_folds_keep_a_data_set_whole() -> None:
    rows, _ = _labelled()
    sources = {row.source for row in rows}

    def folds_of(origins: dict[str, str]) -> dict[str, set[int]]:
        found = source_folds(rows, 2, origins).tolist()
        return {
            source: {f for f, row in zip(found, rows, strict=True) if row.source == source}
            for source in sources
        }

    alone = folds_of({})
    assert all(len(folds) == 1 for folds in alone.values())
    assert set.union(*alone.values()) == {0, 1}
    together = folds_of({"s1": "x", "s2": "x", "s3": "x"})
    assert together["s1"] == together["s2"] == together["s3"] != together["s0"]


def test_heads_fusion_and_served_aggregation_agree() -> None:
    rows, texts = _labelled()
    sae, plans = _identity_sae(), [ANY, PLAN]
    read = ReadTexts.of({"here": texts}, Dictionary([PlacedSAE("a", "here", sae)]), "here")
    acts, means = read.acts, read.means
    folds = source_folds(rows, CONFIG.n_folds, {})
    l2, results = choose_l2(plans, rows, means, folds, CONFIG)
    assert results[l2] == max(results.values()) > 0.9
    pairs = cross_fitted_pairs(plans, rows, read, folds, l2, CONFIG)
    fusion = fit_fusion(plans, rows, pairs, texts.starts, CONFIG)
    assert (fusion.sae >= 0).all()
    assert (fusion.dense >= 0).all()
    fused = fusion.bias + fusion.sae * pairs[:, :, 0] + fusion.dense * pairs[:, :, 1]
    logits = np.stack([fused, pairs[:, :, 1], pairs[:, :, 0]], axis=-1).astype(np.float32)
    specs = [AggregateSpec(kind="max_window_mean", window=16, min_evidence_tokens=0)] * 2
    scores = text_scores(logits, texts.starts, specs)
    harmful = np.array([row.is_harmful for row in rows])
    assert auroc(scores[harmful, 1, 0], scores[~harmful, 1, 0]) > 0.95
    heads = fit_heads(plans, rows, means, acts, l2, CONFIG)
    ids = [e.latent_id for e in heads.sae[1].evidence]
    effect = heads.sae[1].weight * acts.clipped[:, ids].std(axis=0)
    assert ids[int(effect.argmax())] == 2
    assert 5 not in ids
    assert np.sort(effect)[:-1].sum() < 0.25 * effect.max()
    assert (heads.sae[1].weight > 0).all()
    assert (heads.sae[1].scale > 0.5).all()


def test_residuals_are_computed_once(tmp_path: Path) -> None:
    class Letters:
        def encode(self, text: str, add_bos: bool = True) -> list[int]:
            return [0, *map(ord, text)]

    calls = []

    def forward(contexts):  # type: ignore[no-untyped-def]
        import torch

        calls.append(len(contexts))
        return torch.tensor([[float(i)] for context in contexts for i in context[1:]])

    texts = ["abc", "", "zy", "abcdefgh"]
    for _ in range(2):
        found = cached_residuals(
            texts, Letters(), forward, tmp_path, identity="m", max_tokens=5, forward_tokens=4
        )
    assert sum(calls) == 3
    assert found.starts.tolist() == [0, 3, 3, 5, 10]
    assert found.resid[:, 0].tolist() == [float(ord(c)) for c in "abczyabcde"]
    part = found.subset([3, 0])
    assert part.resid[:, 0].tolist() == [float(ord(c)) for c in "abcdeabc"]
    assert part.token_ids.tolist() == [ord(c) for c in "abcdeabc"]
    cached_residuals(texts, Letters(), forward, tmp_path, identity="other", forward_tokens=400)
    assert sum(calls) == 6
