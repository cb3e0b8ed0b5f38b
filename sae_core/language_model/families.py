"""The families of causal language models that can be read, and how each one names its parts.

A table of facts about Hugging Face's modelling code; `sites` turns it into places. Names of
submodules are relative to a block unless they say otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from sae_core.errors import HookPointError

NormKind = Literal["layer_norm", "rms_norm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Where one `model_type` keeps its parts."""

    blocks: str = "layers"
    """Path of the list of blocks in the base model."""
    final_norm: str = "norm"
    """Path in the base model of what comes after every block."""
    after_norm: tuple[str, ...] = ()
    """Further parts of the base model that run only after the final norm."""
    embed: str = "embed_tokens"
    """Path of the token embedding in the base model."""
    is_embed_stream: bool = True
    """Whether the stream begins with the token embedding alone, no positions added to it."""
    norm: NormKind = "rms_norm"
    attn_norm: str = "input_layernorm"
    """The norm before attention."""
    attn: str = "self_attn"
    attn_out: str = "self_attn"
    """The module whose output attention adds to the stream."""
    z: str = "self_attn.o_proj"
    """The module whose input is the heads' output, side by side."""
    value: str = "self_attn.v_proj"
    """The projection that makes the values."""
    is_value_fused: Literal["no", "thirds", "heads"] = "no"
    """Whether `value` makes queries and keys too: all q, k, then v; or q, k, v of each head."""
    mlp_norm: str = "post_attention_layernorm"
    """The norm before the MLP."""
    mlp: str = "mlp"
    """The module whose input enters the MLP."""
    mlp_post: str = "mlp.down_proj"
    """The module whose input is the MLP's neurons."""
    mlp_out: str = "mlp"
    """The module whose output the MLP adds to the stream."""
    is_parallel: bool = False
    """Whether every model of the family runs attention and MLP side by side (see also `sites`)."""


_LLAMA = Family()
_GEMMA = Family(
    attn_out="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        blocks="h",
        final_norm="ln_f",
        embed="wte",
        is_embed_stream=False,
        norm="layer_norm",
        attn_norm="ln_1",
        attn="attn",
        attn_out="attn",
        z="attn.c_proj",
        value="attn.c_attn",
        is_value_fused="thirds",
        mlp_norm="ln_2",
        mlp_post="mlp.c_proj",
    ),
    "gpt_neox": Family(
        final_norm="final_layer_norm",
        embed="embed_in",
        norm="layer_norm",
        attn="attention",
        attn_out="attention",
        z="attention.dense",
        value="attention.query_key_value",
        is_value_fused="heads",
        mlp_post="mlp.dense_4h_to_h",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "opt": Family(
        blocks="decoder.layers",
        final_norm="decoder.final_layer_norm",
        after_norm=("decoder.project_out",),
        embed="decoder.embed_tokens",
        is_embed_stream=False,
        norm="layer_norm",
        attn_norm="self_attn_layer_norm",
        z="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        mlp="fc1",
        mlp_post="fc2",
        mlp_out="fc2",
    ),
    "phi": Family(
        final_norm="final_layernorm",
        norm="layer_norm",
        z="self_attn.dense",
        mlp_norm="input_layernorm",
        mlp_post="mlp.fc2",
        is_parallel=True,
    ),
    "phi3": Family(value="self_attn.qkv_proj"),
    "mixtral": _LLAMA,
    "qwen2_moe": _LLAMA,
    "qwen3_moe": _LLAMA,
}

SUPPORTED_MODEL_TYPES: tuple[str, ...] = tuple(FAMILIES)
"""Values of `model_type` in config.json; gemma3, which wraps images, is read as its text tower."""

_TOWERS = (
    "",
    "model",
    "transformer",
    "gpt_neox",
    "language_model",
    "model.language_model",
)
"""Where a model with a head or a vision tower keeps the text model."""


def text_tower(model: nn.Module) -> tuple[nn.Module, str]:
    """The base model that holds the blocks, and its model_type.

    `model` is that base model, or one with a head or a vision tower around it. Raises
    HookPointError when it is of no supported family.
    """
    for path in _TOWERS:
        try:
            tower = model.get_submodule(path)
        except AttributeError:
            continue
        model_type = str(getattr(getattr(tower, "config", None), "model_type", None))
        if model_type in FAMILIES and _has(tower, FAMILIES[model_type].blocks):
            return tower, model_type
    found = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    raise HookPointError(
        f"model type: found {found!r}, expected one of {', '.join(SUPPORTED_MODEL_TYPES)}"
    )


def blocks_of(model: nn.Module) -> tuple[nn.ModuleList, Family, str]:
    """The model's blocks, its family and its model_type; raises as `text_tower`."""
    tower, model_type = text_tower(model)
    family = FAMILIES[model_type]
    blocks = tower.get_submodule(family.blocks)
    if not isinstance(blocks, nn.ModuleList):
        raise HookPointError(f"{model_type}: {family.blocks} is not a list of blocks")
    return blocks, family, model_type


def uses_layer_norm(model_type: str) -> bool:
    """Whether the family has LayerNorm, which subtracts the mean; RMSNorm does not."""
    return FAMILIES[model_type].norm == "layer_norm"


def is_parallel(block: nn.Module, family: Family) -> bool:
    """Whether the block runs attention and MLP on the same input: no stream between the two."""
    return family.is_parallel or bool(getattr(block, "use_parallel_residual", False))


def is_post_norm(block: nn.Module) -> bool:
    """Whether the block normalises the stream itself, after each addition (OPT 350M)."""
    return not getattr(block, "do_layer_norm_before", True)


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
