"""circuit-tracer transcoders: `layer_N.safetensors`, one a layer, beside a `config.yaml`.

ReLU, or JumpReLU where the file holds thresholds. The encoder lies transposed, the decoder does
not, W_skip does. Source: circuit-tracer, transcoder/single_layer_transcoder.py, and sae_lens
6.54.12, loading/pretrained_sae_loaders.py (mwhanna, mntss).
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from sae_core.errors import SAEFormatError
from sae_core.formats.files import Cfg, open_safetensors
from sae_core.sae import SAE
from sae_core.sae_config import SAECard, SAEConfig
from sae_core.sae_weights import SAEStore

CFG = "config.yaml"
LAYER = re.compile(r"layer_(\d+)\.safetensors")
CROSS_LAYER = re.compile(r"W_(?:enc|dec)_\d+\.safetensors")
THRESHOLD = "activation_function.threshold"


def is_circuit_tracer(path: Path) -> bool:
    """Whether it is a layer's file, or a folder that holds layers."""
    return any(LAYER.fullmatch(n) or CROSS_LAYER.fullmatch(n) for n in _names(path))


def read_circuit_tracer(path: Path) -> SAE:
    """The transcoder of one layer.

    Where there is a config.yaml, it says which hooks of a block are read and predicted. Raises
    SAEFormatError for a whole folder, and for cross-layer transcoders.
    """
    names = _names(path)
    if any(CROSS_LAYER.fullmatch(name) for name in names):
        raise SAEFormatError(
            f"{path}: found a cross-layer transcoder, expected layer_N.safetensors: the latents "
            "of a cross-layer transcoder write to several layers"
        )
    if path.is_dir():
        layers = sum(LAYER.fullmatch(name) is not None for name in names)
        raise SAEFormatError(
            f"{path}: found {layers} layers, expected one, or the hint `weights_file` to say "
            "which (layer_N.safetensors)"
        )
    layer = LAYER.fullmatch(path.name)
    if layer is None:
        raise SAEFormatError(f"{path}: found the file {path.name}, expected layer_N.safetensors")
    tensors = open_safetensors(path)
    tensors.only(("W_enc", "W_dec", "b_enc", "b_dec"), optional=(THRESHOLD, "W_skip"))
    d_sae, d_in = tensors.shape("W_enc", 2)
    config = SAEConfig(
        architecture="jumprelu" if THRESHOLD in tensors else "relu",
        d_in=d_in,
        d_sae=d_sae,
        d_out=tensors.shape("W_dec", 2)[1],
        predicts_another_place=True,
    )
    named = {name: tensors[name] for name in ("W_dec", "b_enc", "b_dec")}
    named["W_enc"] = tensors["W_enc"].T
    if "W_skip" in tensors:
        named["W_skip"] = tensors["W_skip"].T
    if THRESHOLD in tensors:
        named["threshold"] = tensors[THRESHOLD]
    cfg = _read_yaml(path.with_name(CFG))
    reads, predicts = cfg.text("feature_input_hook"), cfg.text("feature_output_hook")
    card = SAECard(
        format="circuit-tracer",
        source=str(path),
        hook_point=reads and f"blocks.{layer[1]}.{reads}",
        hook_point_out=predicts and f"blocks.{layer[1]}.{predicts}",
        model_name=cfg.text("model_name"),
        facts=dict(cfg.values),
    )
    return SAE(config, SAEStore(config, named), card)


def _names(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir()] if path.is_dir() else [path.name]


def _read_yaml(path: Path) -> Cfg:
    """The mapping in `path`, empty where there is no such file."""
    if not path.is_file():
        return Cfg(path, {})
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SAEFormatError(f"{path}: cannot be read as YAML: {reason}") from error
    if not isinstance(values, dict):
        raise SAEFormatError(f"{path}: found {type(values).__name__}, expected a mapping")
    return Cfg(path, values)
