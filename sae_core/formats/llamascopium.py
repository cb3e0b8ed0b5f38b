"""llamascopium 2 folders (OpenMOSS Language-Model-SAEs): `config.json` and `sae_weights.*`.

With z = s_in x, h = z @ W_E + b_E, times sigmoid(z @ W_E_glu + b_E_glu) where it has a GLU:

    a = gate(h ||W_D||) / ||W_D||,   without ||W_D|| if the config says so
    y = (a @ W_D + b_D) / s_out

Activations are in training scale, as in `normalize_activations` and then `encode` of the library.
Its own option to fold the scale leaves JumpReLU's thresholds behind and lets other latents fire;
it has no counterpart here. Source: llamascopium 2.0.0b34, models/sae.py.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sae_core.errors import SAEFormatError
from sae_core.formats.files import (
    Cfg,
    Tensors,
    load_torch,
    open_safetensors,
    read_cfg,
    torch_tensors,
)
from sae_core.formats.llama_scope_r1 import is_llama_scope_r1
from sae_core.formats.openmoss import (
    NORMS,
    bias_or_zeros,
    read_hook_points,
    read_scales,
    stored_norms,
    width_times_expansion,
)
from sae_core.sae import SAE
from sae_core.sae_config import Architecture, SAECard, SAEConfig
from sae_core.sae_weights import SAEStore
from sae_core.stored import Stored

CFG = "config.json"
WEIGHTS = "sae_weights.safetensors"
TORCH_WEIGHTS = "sae_weights.pt"
SHARDED_WEIGHTS = "sae_weights.dcp"
THRESHOLD = "activation_function.log_jumprelu_threshold"
GATES: dict[str, Architecture] = {"jumprelu": "jumprelu", "relu": "relu", "topk": "topk"}


def is_llamascopium(path: Path) -> bool:
    """Whether the folder holds the config and weights in any of the library's three containers."""
    weights = (WEIGHTS, TORCH_WEIGHTS, SHARDED_WEIGHTS)
    if not (path / CFG).is_file() or not any((path / name).exists() for name in weights):
        return False
    return not is_llama_scope_r1(path)


def read_llamascopium(path: Path) -> SAE:
    """The SAE in the folder; of several containers the library's first choice is read."""
    cfg = read_cfg(path / CFG)
    kind = cfg.values.get("sae_type")
    if kind != "sae":
        raise cfg.error(
            "sae_type", "sae (others read several places or tokens, or their weights change)"
        )
    gate = _gate(cfg)
    tensors = _open_weights(path)
    read, predicted = read_hook_points(cfg)
    scales = read_scales(cfg, stored_norms(tensors, (read, predicted)))
    config = SAEConfig(
        architecture=gate,
        d_in=cfg.count("d_model"),
        d_sae=width_times_expansion(cfg),
        k=cfg.count("top_k") if gate == "topk" else None,
        normalize=scales.normalize,
        input_scale=scales.input,
        output_scale=scales.output,
        decoder_norms="gate" if cfg.flag("sparsity_include_decoder_norm") else "unused",
        predicts_another_place=predicted != read,
    )
    card = SAECard(
        format="llamascopium 2",
        source=str(path),
        hook_point=read,
        hook_point_out=predicted if predicted != read else None,
        model_name=cfg.text("model_name"),
        facts=dict(cfg.values),
        notes=("Activations are in training's scale.",),
    )
    return SAE(config, SAEStore(config, _named_tensors(cfg, tensors, config)), card)


def _gate(cfg: Cfg) -> Architecture:
    if str(cfg.values.get("act_fn")).startswith("batch"):
        raise cfg.error(
            "act_fn",
            "jumprelu, relu or topk (which latents of a token are on under batchtopk depends on "
            "its neighbours, and no threshold is stored)",
        )
    return GATES[cfg.one_of("act_fn", GATES)]


def _open_weights(path: Path) -> Tensors:
    if (path / WEIGHTS).is_file():
        return open_safetensors(path / WEIGHTS)
    file = path / TORCH_WEIGHTS
    if not file.is_file():
        raise SAEFormatError(
            f"{path}: found {SHARDED_WEIGHTS}, expected {WEIGHTS} or {TORCH_WEIGHTS}: the index "
            "of a distributed checkpoint is a pickle, which is code; save it as safetensors"
        )
    content = load_torch(file)
    state = content.get("sae")
    if not isinstance(state, dict):
        raise Cfg(file, content).error("sae", "the mapping of tensors")
    return torch_tensors(file, state)


def _named_tensors(cfg: Cfg, tensors: Tensors, config: SAEConfig) -> dict[str, Stored]:
    names = {"W_E": "W_enc", "b_E": "b_enc", "W_D": "W_dec"}
    if cfg.flag("use_decoder_bias", default=True):
        names["b_D"] = "b_dec"
    if config.architecture == "jumprelu":
        names[THRESHOLD] = "threshold"
    if cfg.flag("use_glu_encoder", default=False):
        names |= {"W_E_glu": "W_glu", "b_E_glu": "b_glu"}
    tensors.only(names, optional=[n for n in tensors.by_name if n.startswith(f"{NORMS}.")])
    found = {ours: tensors[theirs] for theirs, ours in names.items()}
    found.setdefault("b_dec", bias_or_zeros(tensors, "b_D", config.d_out))
    if "threshold" in found:
        found["threshold"] = found["threshold"].changed(torch.exp)
    return found
