"""A tiny bundle on a tiny random model, with a cluster that fires on chosen words; for tests.

    folder = write_tiny_bundle(path, "gemma3")

Its cluster `danger` alerts on a text with one of the trigger words and passes without; its cluster
`quiet` reads random latents and never flags.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from monitor.bundle import FIDELITY_FOLDER, PROBES
from sae_core.fidelity import Bands, measure
from sae_core.formats.saelens_writer import save_saelens
from sae_core.heads import LatentTerm
from sae_core.hook_points import parse_hook_point
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.tokenizer import load_tokenizer
from sae_core.probe_reader import ProbeReader
from sae_core.sae import SAE
from sae_core.testing.planted import MARGIN, plant, planted_model_folder

HOOK_POINT = "blocks.1.hook_resid_post"
TRIGGER_WORDS = ("danger", "attack")
NEUTRAL_TEXTS = (
    "please tell me how to bake bread",
    "what is the weather like today in the north",
)


def write_tiny_bundle(
    path: Path,
    family: str = "gemma3",
    words: Sequence[str] = TRIGGER_WORDS,
    *,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a model folder and a bundle on it below `path`; returns the bundle's folder.

    Args:
        words: what raises the cluster `danger`.
        changes: top-level keys of bundle.yaml to replace.
    """
    model_folder = planted_model_folder(path / "model", family, words)
    hook_point = parse_hook_point(HOOK_POINT)
    planted = plant(
        load_language_model(model_folder, [hook_point]),
        load_tokenizer(model_folder),
        hook_point,
        words,
        NEUTRAL_TEXTS,
        sae_id="l1",
        cluster_id="danger",
    )
    bundle = path / "bundle"
    save_saelens(planted.sae, bundle / "saes" / "l1")
    cluster = planted.cluster
    save_file(
        {
            "dense/danger/weight": np.asarray(cluster.dense_weight, np.float32),
            "dense/danger/bias": np.array(cluster.dense_bias, np.float32),
        },
        bundle / "heads.safetensors",
    )
    random_latents = [
        LatentTerm(sae="l1", latent_id=i, weight=0.1 * i, scale=1.0, label=f"random {i}")
        for i in range(1, 6)
    ]
    spec = {
        "name": "tiny",
        "version": 1,
        "model": {"id": f"tiny/{family}", "path": str(model_folder)},
        "saes": {"l1": {"path": "saes/l1", "hook_point": HOOK_POINT}},
        "dense_heads": {"danger": {"hook_point": HOOK_POINT}},
        "clusters": [
            {
                "id": "danger",
                "title": f"Texts with {' or '.join(words)}",
                "severity": "critical",
                "latents": _latents(cluster.latents),
                "dense_head": "danger",
                "fusion": {
                    "sae": cluster.fusion_sae,
                    "dense": cluster.fusion_dense,
                    "bias": cluster.fusion_bias,
                },
                "aggregate": {"kind": "max", "min_evidence_tokens": 1, "evidence_floor": -MARGIN},
                "thresholds": {"flag": 0.0, "alert": MARGIN, "clear": -1.0},
            },
            {
                "id": "quiet",
                "title": "Random latents",
                "severity": "warning",
                "latents": _latents(random_latents),
                "transform": "clip",
                "aggregate": {"kind": "max_rolling_mean", "window": 4},
                "thresholds": {"flag": 1e6, "alert": 2e6, "clear": 0.0},
            },
        ],
        "policies": {
            "default": {"mode": "monitor", "deadline_ms": 30000},
            "strict": {"mode": "enforce", "on_error": "block", "deadline_ms": 30000},
        },
    }
    (bundle / "bundle.yaml").write_text(yaml.safe_dump({**spec, **(changes or {})}))
    _write_fidelity(bundle, planted.sae, model_folder)
    return bundle


def _write_fidelity(bundle: Path, sae: SAE, model_folder: Path) -> None:
    """Probe texts, and what the planted SAE gives on them, good or bad."""
    model = load_language_model(model_folder, [parse_hook_point(HOOK_POINT)])
    reader = ProbeReader(model, lambda _: model, load_tokenizer(model_folder), NEUTRAL_TEXTS)
    x = reader.read([HOOK_POINT], reader.begins_with_bos)[HOOK_POINT]
    rows = [{"id": f"probe-{n}", "text": text} for n, text in enumerate(NEUTRAL_TEXTS, 1)]
    (bundle / PROBES).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (bundle / FIDELITY_FOLDER).mkdir(exist_ok=True)
    latent_ids = range(sae.config.d_sae)  # whatever a test registers
    bands = Bands.around(measure(sae, x, latent_ids), with_bos=reader.begins_with_bos)
    (bundle / FIDELITY_FOLDER / "l1.json").write_text(json.dumps(bands.to_json()) + "\n")


def _latents(terms: Sequence[LatentTerm]) -> list[dict[str, Any]]:
    return [
        {"sae": t.sae, "id": t.latent_id, "weight": t.weight, "scale": t.scale, "label": t.label}
        for t in terms
    ]
