"""SAE -> a SAELens 6 folder, which SAELens and `saelens` read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_core.errors import SAEFormatError
from sae_core.formats.saelens import CFG, WEIGHTS
from sae_core.sae import SAE
from sae_core.sae_config import Architecture

LAYOUT_VERSION = "6.0.0"
"""Written as `metadata.sae_lens_version`: without it SAELens 6.54 takes a folder for an old one
and drops its metadata (loading/pretrained_sae_loaders.py, line 218)."""

NAMES: dict[Architecture, str] = {
    "relu": "standard",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "batchtopk": "jumprelu",
    "topk": "topk",
    "abstopk": "abstopk",
}
NORMALIZATIONS = {
    "none": "none",
    "layer_norm": "layer_norm",
    "unit_norm": "constant_norm_rescale",
}


def save_saelens(
    sae: SAE, path: Path, *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> None:
    """Writes `sae` as a SAELens 6 folder, made if it is not there.

    `dtype` is how the two matrices are stored; biases and thresholds, small and sensitive, stay
    float32. A `batchtopk` SAE is written as SAELens publishes one: jumprelu with its threshold
    repeated. Raises SAEFormatError where SAELens has no such formula, and where the card's facts
    are not JSON.
    """
    config = sae.config
    _check_expressible(sae, path)
    metadata: dict[str, Any] = dict(sae.card.facts)
    metadata.setdefault("sae_lens_version", LAYOUT_VERSION)
    metadata["model_name"] = sae.card.model_name
    metadata["hook_name"] = sae.card.hook_point
    if config.architecture == "batchtopk":
        metadata.setdefault("training_architecture", "batchtopk")
    cfg: dict[str, Any] = {
        "architecture": NAMES[config.architecture],
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": NORMALIZATIONS[config.normalize],
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if config.k is not None:
        rescaled = config.decoder_norms == "acts"
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": rescaled}
    try:
        text = json.dumps(cfg, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise SAEFormatError(f"{path / CFG}: the card's facts are not JSON: {error}") from error
    tensors: dict[str, Tensor] = {}
    for key, tensor in sae.weights._asdict().items():
        if tensor is not None:
            stored = getattr(torch, dtype) if tensor.ndim == 2 else torch.float32
            tensors[key] = tensor.detach().to("cpu", stored).contiguous()
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / (WEIGHTS + ".part"))
    (path / (CFG + ".part")).write_text(text, encoding="utf-8")
    for file in (WEIGHTS, CFG):
        (path / (file + ".part")).replace(path / file)


def _check_expressible(sae: SAE, path: Path) -> None:
    config, weights = sae.config, sae.weights
    more = (weights.W_glu, weights.scaling_factor, weights.W_skip)
    ranked = config.architecture in ("topk", "abstopk")
    problems = {
        f"architecture {config.architecture}": config.architecture not in NAMES,
        "a transcoder": config.predicts_another_place,
        "a GLU, a scaling factor or a skip connection": any(w is not None for w in more),
        "no decoder": weights.W_dec is None,
        "signed topk": config.signed,
        "one head of several": config.head_index is not None,
        "centred inputs": config.center_input,
        "scaled inputs": config.input_scale != 1 or config.output_scale != 1,
        f"decoder_norms {config.decoder_norms}": config.decoder_norms == "gate"
        or (config.decoder_norms == "acts" and not ranked),
    }
    for problem, is_there in problems.items():
        if is_there:
            raise SAEFormatError(f"{path}: found {problem}, which is not written as SAELens 6")
