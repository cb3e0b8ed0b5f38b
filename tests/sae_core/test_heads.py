"""Cluster heads against plain loops over the formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from sae_core.errors import HeadError, ShapeError
from sae_core.heads import Cluster, ClusterHeads, LatentTerm

HOOK_A, HOOK_B = "blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"
D_MODEL = 10


def term(latent_id: int, weight: float, scale: float = 1.0, sae: str = "a") -> LatentTerm:
    return LatentTerm(sae=sae, latent_id=latent_id, weight=weight, scale=scale, label="")


def mixed_clusters() -> list[Cluster]:
    rng = np.random.default_rng(0)
    return [
        Cluster(
            id="plain",
            latents=(term(7, 0.8, 3.2), term(2, -1.5, 0.5), term(2, 0.25, 2.0, "b")),
            dense_weight=rng.normal(size=D_MODEL).astype(np.float32),
            dense_bias=-0.3,
            dense_hook_point=HOOK_A,
            fusion_sae=0.6,
            fusion_dense=1.1,
            fusion_bias=-2.3,
        ),
        Cluster(id="clipped", latents=(term(7, 2.0, 0.4), term(9, 1.0, 5.0)), transform="clip"),
        Cluster(id="stepped", latents=(term(2, 3.0, 9.0), term(9, 1.0)), transform="step"),
        Cluster(
            id="dense only",
            dense_weight=rng.normal(size=D_MODEL),
            dense_bias=1.5,
            dense_hook_point=HOOK_B,
        ),
        Cluster(id="constant", fusion_bias=0.75),
        Cluster(id="other sae", latents=(term(0, 1.0, 1.0, "b"),), fusion_sae=-2.0),
    ]


def random_acts(n: int, heads: ClusterHeads) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return {
        sae: torch.relu(torch.randn(n, len(ids), generator=generator))
        for sae, ids in heads.latent_ids.items()
    }


def g(transform: str, x: float) -> float:
    return {"identity": x, "clip": min(x, 1.0), "step": float(x > 0)}[transform]


def test_logits_equal_the_formulas() -> None:
    clusters = mixed_clusters()
    heads = ClusterHeads(clusters, ["a", "b"])
    acts = random_acts(25, heads)
    resid = {h: torch.randn(25, D_MODEL) for h in (HOOK_A, HOOK_B)}
    logits = heads(resid, acts)
    rows = np.concatenate([acts["a"].numpy(), acts["b"].numpy()], axis=1)
    for c, cluster in enumerate(clusters):
        parts = heads.contributions(c, rows)
        assert parts.shape == (25, len(cluster.latents))
        for t in range(25):
            sae = 0.0
            for i, latent in enumerate(cluster.latents):
                column = heads.latent_ids[latent.sae].index(latent.latent_id)
                act = float(acts[latent.sae][t, column])
                share = latent.weight * g(cluster.transform, act / latent.scale)
                assert parts[t, i] == pytest.approx(cluster.fusion_sae * share, rel=1e-6)
                sae += share
            dense = 0.0
            if cluster.dense_weight is not None:
                x = resid[str(cluster.dense_hook_point)][t].double().numpy()
                dense = float(x @ cluster.dense_weight.astype(float)) + cluster.dense_bias
            fused = cluster.fusion_bias + cluster.fusion_sae * sae + cluster.fusion_dense * dense
            assert float(logits.sae[t, c]) == pytest.approx(sae, rel=1e-5, abs=1e-5)
            assert float(logits.dense[t, c]) == pytest.approx(dense, rel=1e-5, abs=1e-5)
            assert float(logits.fused[t, c]) == pytest.approx(fused, rel=1e-5, abs=1e-5)


def test_registered_latents_are_unique_and_in_column_order() -> None:
    heads = ClusterHeads(mixed_clusters(), ["b", "a"])
    assert heads.latent_ids == {"b": (0, 2), "a": (2, 7, 9)}
    assert list(heads.latent_ids) == ["b", "a"]
    assert heads.n_latents == 5
    assert heads.hook_points == (HOOK_A, HOOK_B)


def test_an_sae_that_no_cluster_uses_has_no_columns() -> None:
    heads = ClusterHeads([Cluster(id="x", latents=(term(3, 1.0),))], ["a", "idle"])
    logits = heads({}, {"a": torch.full((2, 1), 4.0), "idle": torch.zeros(2, 0)})
    assert logits.fused.tolist() == [[4.0], [4.0]]


def test_heads_without_any_sae_read_the_residual_stream_alone() -> None:
    weight = np.ones(3, np.float32)
    heads = ClusterHeads([Cluster(id="x", dense_weight=weight, dense_hook_point=HOOK_A)], [])
    assert heads({HOOK_A: torch.ones(2, 3)}, {}).fused.tolist() == [[3.0], [3.0]]


def test_the_same_rows_give_the_same_bits_twice() -> None:
    heads = ClusterHeads(mixed_clusters(), ["a", "b"])
    resid = {h: torch.randn(9, D_MODEL) for h in (HOOK_A, HOOK_B)}
    one, two = (heads.to("cpu")(resid, random_acts(9, heads)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"latents": (term(1, 1.0), term(1, 2.0))}, "latent 1 of SAE 'a' is registered twice"),
        ({"latents": (term(-1, 1.0),)}, "latent -1 of SAE 'a', expected an id from 0"),
        ({"latents": (term(1, 1.0, 0.0),)}, "latent 1 of SAE 'a' has scale 0.0"),
        ({"latents": (term(1, 1.0, math.inf),)}, "latent 1 of SAE 'a' has scale inf"),
        ({"latents": (term(1, math.nan),)}, "latent 1 of SAE 'a' has weight nan"),
        ({"fusion_bias": math.inf}, "fusion_bias is inf"),
        ({"dense_bias": math.nan}, "dense_bias is nan"),
        ({"dense_hook_point": HOOK_A}, "dense_weight is absent, dense_hook_point is blocks.1"),
        ({"dense_weight": np.ones(3)}, "dense_weight is present, dense_hook_point is None"),
        (
            {"dense_weight": np.array([1.0, np.nan]), "dense_hook_point": HOOK_A},
            "dense_weight is nan at index 1",
        ),
    ],
)
def test_a_cluster_that_contradicts_itself_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(HeadError, match=said) as caught:
        Cluster(id="weapons", **change)
    assert "cluster 'weapons'" in str(caught.value)


def test_an_unknown_sae_is_refused() -> None:
    with pytest.raises(
        HeadError, match="cluster 'x': latent 3 is of SAE 'a', registered SAEs: 'b'"
    ):
        ClusterHeads([Cluster(id="x", latents=(term(3, 1.0),))], ["b"])


def test_a_repeated_cluster_is_refused() -> None:
    with pytest.raises(HeadError, match="cluster 'x' is registered twice"):
        ClusterHeads([Cluster(id="x"), Cluster(id="y"), Cluster(id="x")], [])


def test_a_latent_outside_its_sae_is_refused() -> None:
    heads = ClusterHeads(mixed_clusters(), ["a", "b"])
    widths = {HOOK_A: D_MODEL, HOOK_B: D_MODEL}
    heads.check_fit({"a": 10, "b": 3}, widths)
    with pytest.raises(HeadError, match="'clipped': latent 9 of SAE 'a', expected 0 to 8"):
        heads.check_fit({"a": 9, "b": 3}, widths)


def test_a_dense_weight_of_another_length_is_refused() -> None:
    heads = ClusterHeads(mixed_clusters(), ["a", "b"])
    with pytest.raises(HeadError, match=f"dense_weight has 10 entries, {HOOK_B} is 12 wide"):
        heads.check_fit({"a": 10, "b": 3}, {HOOK_A: 10, HOOK_B: 12})
    two = [Cluster(id=f"c{n}", dense_weight=np.ones(n), dense_hook_point=HOOK_A) for n in (3, 4)]
    with pytest.raises(HeadError, match="have lengths {'c3': 3, 'c4': 4}"):
        ClusterHeads(two, [])


def test_latent_acts_with_other_columns_are_refused() -> None:
    heads = ClusterHeads([Cluster(id="x", latents=(term(3, 1.0),))], ["a"])
    with pytest.raises(ShapeError, match=r"latent_acts are \(2, 2\), expected \(2, 1\)"):
        heads({}, {"a": torch.zeros(2, 2)})
