"""Writes a bundle folder: bundle.yaml, heads, SAE, calibration, probes, figures and card.

The layout is the registry's (README, "The bundle"); what is written is data only. The manifest is
the registry's to write.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from sae_core.aggregation import AggregateSpec
from sae_core.evaluation.detection import Evaluation
from sae_core.fidelity import Bands
from sae_core.training.card import bundle_card
from sae_core.training.probes import probe_rows
from sae_core.training.unseen_figures import UnseenFigures

SAE_FILES = ("cfg.json", "sae_weights.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleParts:
    """Everything that goes into the folder."""

    name: str
    version: int
    model_id: str
    model_package: str | None
    model_digest: str
    tokenizer_digest: str
    saes: Mapping[str, tuple[str, Path]]
    """By id where each SAE reads, and the folder it is in."""
    dense_hook_point: str
    heads: dict[str, Any]
    """Stage 3's content."""
    specs: tuple[AggregateSpec, ...]
    artefact: dict[str, Any]
    """The calibration."""
    figures: Evaluation
    unseen: UnseenFigures
    probes: Sequence[str]
    """Texts of fidelity.jsonl."""
    bands: Mapping[str, Bands]
    """Of each SAE, on the probe texts."""
    canaries: Sequence[dict[str, Any]]
    """Rows of canaries.jsonl."""


def write_bundle(folder: Path, parts: BundleParts) -> None:
    """Write or overwrite the folder's files; manifest and canaries' scores are removed."""
    for name in ("calibration", "fidelity"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for sae_id, (_, place) in parts.saes.items():
        (folder / "saes" / sae_id).mkdir(parents=True, exist_ok=True)
        for name in SAE_FILES:
            shutil.copyfile(place / name, folder / "saes" / sae_id / name)
    for stale in ("MANIFEST.json", "canaries/expected.json"):
        (folder / stale).unlink(missing_ok=True)
    tensors = {}
    for cluster in parts.heads["clusters"]:
        tensors[f"dense/{cluster['id']}/weight"] = np.array(cluster["dense_weight"], np.float32)
        tensors[f"dense/{cluster['id']}/bias"] = np.array(cluster["dense_bias"], np.float32)
    save_file(tensors, folder / "heads.safetensors")
    _write_json(folder / "calibration" / "default.json", parts.artefact)
    _write_json(
        folder / "evaluation.json",
        {
            **_rounded(parts.figures.to_json()),
            "unseen_sources": _rounded(parts.unseen.to_json()),
            "latents": {
                c["id"]: [{"sae": t["sae"], "id": t["id"], **t["evidence"]} for t in c["latents"]]
                for c in parts.heads["clusters"]
            },
        },
    )
    text = yaml.safe_dump(bundle_content(parts), sort_keys=False, allow_unicode=True, width=100)
    (folder / "bundle.yaml").write_text(text, encoding="utf-8")
    write_json_lines(folder / "fidelity.jsonl", probe_rows(parts.probes))
    for sae_id, bands in parts.bands.items():
        _write_json(folder / "fidelity" / f"{sae_id}.json", bands.to_json())
    write_json_lines(folder / "canaries.jsonl", parts.canaries)
    sae_cfgs = {
        sae_id: json.loads((place / "cfg.json").read_text(encoding="utf-8"))
        for sae_id, (_, place) in parts.saes.items()
    }
    card = bundle_card(
        parts.name,
        parts.artefact,
        parts.dense_hook_point,
        sae_cfgs,
        parts.figures,
        parts.unseen,
    )
    (folder / "CARD.md").write_text(card, encoding="utf-8")


def bundle_content(parts: BundleParts) -> dict[str, Any]:
    """bundle.yaml as plain data."""
    model: dict[str, Any] = {
        "id": parts.model_id,
        "package": parts.model_package,
        "tokenizer_digest": parts.tokenizer_digest,
        "weights_digest": parts.model_digest,
    }
    clusters = [
        _cluster_content(cluster, spec, parts)
        for cluster, spec in zip(parts.heads["clusters"], parts.specs, strict=True)
    ]
    return {
        "name": parts.name,
        "version": parts.version,
        "model": {key: value for key, value in model.items() if value is not None},
        "saes": {
            sae_id: {"path": f"saes/{sae_id}", "hook_point": hook_point}
            for sae_id, (hook_point, _) in parts.saes.items()
        },
        "dense_heads": {c["id"]: {"hook_point": parts.dense_hook_point} for c in clusters},
        "clusters": clusters,
        "rules": [],
        "policies": {"default": {"mode": "monitor", "on_error": "allow", "deadline_ms": 2000}},
    }


def _cluster_content(
    cluster: dict[str, Any], spec: AggregateSpec, parts: BundleParts
) -> dict[str, Any]:
    calibrated = parts.artefact["clusters"][cluster["id"]]
    return {
        "id": cluster["id"],
        "title": cluster["title"],
        "severity": cluster["severity"],
        "stages": ["prompt", "completion"],
        "latents": [
            {k: t[k] for k in ("sae", "id", "weight", "scale", "label")} for t in cluster["latents"]
        ],
        "transform": "clip",
        "dense_head": cluster["id"],
        "fusion": cluster["fusion"],
        "aggregate": {
            "kind": spec.kind,
            "window": spec.window,
            "k": spec.k,
            "alpha": spec.alpha,
            "min_evidence_tokens": spec.min_evidence_tokens,
            "evidence_floor": spec.evidence_floor,
        },
        "thresholds": calibrated["thresholds"],
        "solo": calibrated["solo"],
        "calibration": "calibration/default.json",
        "categories": list(cluster["categories"]),
    }


def write_json_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
