"""Scorers of tiny models in torch and in ONNX Runtime, exported once for each family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sae_core.heads import Cluster, ClusterHeads, LatentTerm
from sae_core.hook_points import HookPoint
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.tokenizer import load_tokenizer
from sae_core.onnx.export import export_onnx
from sae_core.onnx.scorer import OnnxLanguageModel, OnnxScorer
from sae_core.onnx.session import GraphSession
from sae_core.scorer import Scorer
from sae_core.testing.models import D_MODEL, tiny_model_folder
from sae_core.testing.planted import planted_sae

IDENTITY = {"bundle_digest": "b" * 64, "model_digest": "c" * 64}
EARLY, MIDDLE, LATE = (
    HookPoint(0, "resid_post"),
    HookPoint(1, "mlp_out"),
    HookPoint(2, "resid_post"),
)
SAES = {
    "topk": (EARLY, planted_sae(D_MODEL, 96, architecture="topk", seed=1)),
    "jumprelu": (MIDDLE, planted_sae(D_MODEL, 64, architecture="jumprelu", seed=2)),
    "relu": (LATE, planted_sae(D_MODEL, 40, architecture="relu", seed=4)),
}

Pair = Callable[[str], tuple[Scorer, OnnxScorer]]


def clusters() -> list[Cluster]:
    rng = np.random.default_rng(0)
    terms = tuple(
        LatentTerm(sae=sae, latent_id=int(i), weight=float(rng.normal()), scale=1.5)
        for sae, (_, one) in SAES.items()
        for i in rng.choice(one.config.d_sae, 6, replace=False)
    )
    return [
        Cluster(
            id="fused",
            latents=terms,
            dense_weight=rng.normal(size=D_MODEL).astype(np.float32),
            dense_bias=0.4,
            dense_hook_point=str(LATE),
            fusion_sae=0.6,
            fusion_dense=1.1,
            fusion_bias=-2.3,
        ),
        Cluster(id="clip", latents=terms[:8], transform="clip"),
        Cluster(id="step", latents=terms[4:], transform="step"),
        Cluster(
            id="dense",
            dense_weight=rng.normal(size=D_MODEL).astype(np.float32),
            dense_hook_point=str(EARLY),
        ),
    ]


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `scorers` puts the graph of a family."""
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="session")
def scorers(graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A family's scorer in torch, and the one on the graph that was exported from it."""
    made: dict[str, tuple[Scorer, OnnxScorer]] = {}

    def pair(family: str) -> tuple[Scorer, OnnxScorer]:
        if family not in made:
            folder = tiny_model_folder(tmp_path_factory.mktemp(family) / "model", family)
            model = load_language_model(folder, [EARLY, MIDDLE, LATE])
            tokenizer = load_tokenizer(folder)
            heads = ClusterHeads(clusters(), list(SAES))
            in_torch = Scorer(model, tokenizer, SAES, heads)
            export_onnx(in_torch, graphs / family, identity=IDENTITY)
            session = GraphSession(graphs / family, device="cpu", n_threads=1)
            on_graph = OnnxScorer(OnnxLanguageModel(session, folder), tokenizer, SAES, heads)
            made[family] = in_torch, on_graph
        return made[family]

    return pair
