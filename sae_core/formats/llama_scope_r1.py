"""Llama-Scope-R1-Distill folders, as lm-saes 2.0 beta of 2025 wrote them.

`config.json` and `sae_weights.safetensors`, whose tensors are named as torch.nn.Linear names
them and whose thresholds are logarithms. With z = s_in x and h = z @ We + be:

    a = h where h ||Wd|| > exp(log_jumprelu_threshold), without ||Wd|| if the config says so
    y = (a @ Wd + bd) / s_out

Activations are in training scale, unlike `llama_scope`'s. Source: lm_saes sae.py of that time.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sae_core.errors import SAEFormatError
from sae_core.formats.files import Cfg, Tensors, open_safetensors, read_cfg
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
THRESHOLD = "log_jumprelu_threshold"
GATES: dict[str, Architecture] = {"jumprelu": "jumprelu", "relu": "relu"}


def is_llama_scope_r1(path: Path) -> bool:
    """Whether the folder holds the two files, with tensors of this generation's names."""
    if not ((path / CFG).is_file() and (path / WEIGHTS).is_file()):
        return False
    try:
        return "encoder.weight" in open_safetensors(path / WEIGHTS)
    except SAEFormatError:  # llamascopium, whose file has the same name, says what is wrong
        return False


def read_llama_scope_r1(path: Path) -> SAE:
    """The SAE in the folder."""
    cfg = read_cfg(path / CFG)
    tensors = open_safetensors(path / WEIGHTS)
    read, predicted = read_hook_points(cfg)
    scales = read_scales(cfg, stored_norms(tensors, (read, predicted)))
    gate = _gate(cfg, tensors)
    config = SAEConfig(
        architecture=gate,
        d_in=cfg.count("d_model"),
        d_sae=width_times_expansion(cfg),
        normalize=scales.normalize,
        input_scale=scales.input,
        output_scale=scales.output,
        apply_b_dec_to_input=cfg.flag("apply_decoder_bias_to_pre_encoder", default=False),
        decoder_norms="gate" if cfg.flag("sparsity_include_decoder_norm") else "unused",
        predicts_another_place=predicted != read,
    )
    card = SAECard(
        format="Llama Scope R1 (lm-saes 2.0 beta)",
        source=str(path),
        hook_point=read,
        hook_point_out=predicted if predicted != read else None,
        facts=dict(cfg.values),
        notes=("Activations are in training's scale.",),
    )
    return SAE(config, SAEStore(config, _named_tensors(cfg, tensors, config)), card)


def _gate(cfg: Cfg, tensors: Tensors) -> Architecture:
    if "act_fn" not in cfg.values and THRESHOLD in tensors:
        return "jumprelu"
    if str(cfg.values.get("act_fn")).endswith("topk"):
        raise cfg.error(
            "act_fn",
            "jumprelu or relu (this library's topk lets negative pre-activations through where "
            "fewer than k are positive, its batchtopk depends on the batch)",
        )
    return GATES[cfg.one_of("act_fn", GATES)]


def _named_tensors(cfg: Cfg, tensors: Tensors, config: SAEConfig) -> dict[str, Stored]:
    names = {"encoder.weight", "encoder.bias", "decoder.weight"}
    if cfg.flag("use_decoder_bias", default=True):
        names.add("decoder.bias")
    if config.architecture == "jumprelu":
        names.add(THRESHOLD)
    if cfg.flag("use_glu_encoder", default=False):
        names |= {"encoder_glu.weight", "encoder_glu.bias"}
    tensors.only(names, optional=[n for n in tensors.by_name if n.startswith(f"{NORMS}.")])
    found = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": bias_or_zeros(tensors, "decoder.bias", config.d_out),
    }
    if THRESHOLD in names:
        found["threshold"] = tensors[THRESHOLD].changed(torch.exp)
    if "encoder_glu.weight" in names:
        found["W_glu"] = tensors["encoder_glu.weight"].T
        found["b_glu"] = tensors["encoder_glu.bias"]
    return found
