"""Llama Scope folders, as lm-saes 1.0 wrote them: `hyperparams.json` and `checkpoints/`.

With s_in = sqrt(d_model) / mean length of the inputs, s_out of the targets, z = s_in x:

    training scale   h = (z @ We + be) ||Wd|| s_in / s_out,   on where h > s_in jump_relu_threshold
    raw scale        everything divided by s_in: activations in units of the residual stream

The published threshold is in raw scale, which is what lm-saes computes in; SAELens computes in
training scale. Without `sparsity_include_decoder_norm` there is no ||Wd||. lm-saes folds all this
into bfloat16 weights, here it stays float32: a few latents at their threshold differ from it.
Source: lm_saes 1.0 sae.py; He et al. 2024, arXiv:2410.20526.
"""

from __future__ import annotations

from pathlib import Path

import torch

from sae_core.formats.files import Cfg, Tensors, open_safetensors, read_cfg
from sae_core.formats.openmoss import NORMS, bias_or_zeros, read_hook_points, read_scales, scaled
from sae_core.sae import SAE
from sae_core.sae_config import Architecture, SAECard, SAEConfig
from sae_core.sae_weights import SAEStore
from sae_core.stored import InMemory, Stored

CFG = "hyperparams.json"
WEIGHTS = "checkpoints/final.safetensors"
GATES: dict[str, Architecture] = {"jumprelu": "jumprelu", "relu": "relu", "topk": "topk"}


def is_llama_scope(path: Path) -> bool:
    """Whether the folder holds the two files of a Llama Scope SAE."""
    return (path / CFG).is_file() and (path / WEIGHTS).is_file()


def read_llama_scope(path: Path, *, training_scale: bool = False) -> SAE:
    """The SAE in the folder, in raw scale.

    `training_scale` gives activations as SAELens does, s_in times as large; refused where the
    checkpoint has no such factor.
    """
    cfg = read_cfg(path / CFG)
    tensors = open_safetensors(path / WEIGHTS)
    d_in, d_sae = cfg.count("d_model"), cfg.count("d_sae")
    read, predicted = read_hook_points(cfg)

    def norm(side: str) -> tuple[str, float]:
        return f"{cfg.path}: {NORMS}.{side}", cfg.mapping(NORMS).number(side)

    scales = read_scales(cfg, norm)
    if training_scale and cfg.values.get("norm_activation") != "dataset-wise":
        raise cfg.error("norm_activation", "dataset-wise with the hint training_scale")
    gate = GATES[cfg.one_of("act_fn", GATES)]
    kept = scales.input if training_scale else 1.0  # what activations are multiplied by
    config = SAEConfig(
        architecture=gate,
        d_in=d_in,
        d_sae=d_sae,
        k=cfg.count("top_k") if gate == "topk" else None,
        normalize=scales.normalize,
        input_scale=kept,
        output_scale=kept,
        apply_b_dec_to_input=cfg.flag("apply_decoder_bias_to_pre_encoder")
        and cfg.flag("use_decoder_bias", default=True),
        decoder_norms="acts" if cfg.flag("sparsity_include_decoder_norm") else "unused",
        predicts_another_place=predicted != read,
    )
    named = _named_tensors(cfg, tensors, config)
    ratio = scales.input / scales.output
    folds = {
        "b_enc": kept / scales.input,
        "W_dec": ratio,
        "b_dec": kept / scales.output,
        "W_glu": scales.input / kept,
    }
    for name, factor in folds.items():
        if name in named:
            named[name] = scaled(named[name], factor)
    if gate == "jumprelu":
        threshold = _threshold(cfg) * kept
        named["threshold"] = InMemory(torch.full((d_sae,), threshold), "jump_relu_threshold")
    scale = "training's" if training_scale else "the raw"
    card = SAECard(
        format="Llama Scope (lm-saes 1.0)",
        source=str(path),
        hook_point=read,
        hook_point_out=predicted if predicted != read else None,
        facts=dict(cfg.values),
        notes=(
            f"Activations and thresholds are in {scale} scale; the other differs by a factor.",
            "It was not trained on BOS, EOS and padding: latents there mean nothing.",
        ),
    )
    return SAE(config, SAEStore(config, named), card)


def _threshold(cfg: Cfg) -> float:
    value = cfg.number("jump_relu_threshold")
    if value < 0:  # lm-saes would then let negative activations through
        raise cfg.error("jump_relu_threshold", "a number from 0")
    return value


def _named_tensors(cfg: Cfg, tensors: Tensors, config: SAEConfig) -> dict[str, Stored]:
    names = {"encoder.weight", "encoder.bias", "decoder.weight"}
    if cfg.flag("use_decoder_bias", default=True):
        names.add("decoder.bias")
    if cfg.flag("use_glu_encoder", default=False):
        names |= {"encoder_glu.weight", "encoder_glu.bias"}
    tensors.only(names)
    found = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": bias_or_zeros(tensors, "decoder.bias", config.d_out),
    }
    if "encoder_glu.weight" in names:
        found["W_glu"] = tensors["encoder_glu.weight"].T
        found["b_glu"] = tensors["encoder_glu.bias"]
    return found
