"""Names of places in the residual stream, and the module of a model that each one means.

Names are TransformerLens's (`blocks.8.hook_resid_post`); modules are Hugging Face's, found by
class of architecture and without TransformerLens. Knows nothing of how a model is loaded or run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sae_core.errors import HookPointError

Site = Literal["resid_pre", "resid_mid", "resid_post"]
"""Before a block, between its attention and its MLP, after it."""

_NAME = re.compile(r"blocks\.(0|[1-9][0-9]*)\.hook_(resid_pre|resid_mid|resid_post)")
_SITES: dict[str, Site] = {
    "resid_pre": "resid_pre",
    "resid_mid": "resid_mid",
    "resid_post": "resid_post",
}


@dataclass(frozen=True, slots=True)
class HookPoint:
    """One place where the residual stream is read; `str()` gives the name back."""

    layer: int
    """Index of the block, from 0."""
    site: Site

    def __str__(self) -> str:
        return f"blocks.{self.layer}.hook_{self.site}"


@dataclass(frozen=True, slots=True)
class HookSite:
    """A module, and which side of it carries the residual stream."""

    module: nn.Module
    io: Literal["input", "output"]

    def register(self, receive: Callable[[Tensor], None]) -> RemovableHandle:
        """Calls `receive` with the stream on every forward pass, until the handle is removed.

        An input site is read before its module runs. Tuple and Tensor outputs are taken alike.
        """
        if self.io == "input":
            return self.module.register_forward_pre_hook(
                lambda module, args: receive(_stream(module, args))
            )
        return self.module.register_forward_hook(
            lambda module, args, output: receive(_stream(module, output))
        )


def _stream(module: nn.Module, value: object) -> Tensor:
    if isinstance(value, tuple) and value:
        value = value[0]
    if not isinstance(value, Tensor):
        raise HookPointError(
            f"{type(module).__name__}: found {type(value).__name__}, "
            "expected a Tensor or a tuple that begins with one"
        )
    return value


@dataclass(frozen=True, slots=True)
class _Family:
    blocks: str
    """Path of the list of blocks in the base model."""
    final_norm: str
    mid: str
    """Submodule of a block whose input is resid_mid."""


_FAMILIES: dict[str, _Family] = {
    "gpt2": _Family("h", "ln_f", "ln_2"),
    "gpt_neox": _Family("layers", "final_layer_norm", "post_attention_layernorm"),
    "llama": _Family("layers", "norm", "post_attention_layernorm"),
    "mistral": _Family("layers", "norm", "post_attention_layernorm"),
    "gemma2": _Family("layers", "norm", "pre_feedforward_layernorm"),
    "gemma3_text": _Family("layers", "norm", "pre_feedforward_layernorm"),
    "qwen2": _Family("layers", "norm", "post_attention_layernorm"),
    "qwen3": _Family("layers", "norm", "post_attention_layernorm"),
}

SUPPORTED_MODEL_TYPES: tuple[str, ...] = tuple(_FAMILIES)
"""Values of `model_type` in config.json; gemma3, which wraps images, is read as its text tower."""


def parse_hook_point(text: str) -> HookPoint:
    """The hook point that `text` names; anything but the three residual forms is an error."""
    match = _NAME.fullmatch(text)
    if match is None:
        raise HookPointError(
            f"hook point: found {text!r}, expected blocks.LAYER.hook_resid_pre, "
            "blocks.LAYER.hook_resid_mid or blocks.LAYER.hook_resid_post"
        )
    return HookPoint(layer=int(match[1]), site=_SITES[match[2]])


def n_layers_needed(hook_points: Iterable[HookPoint]) -> int:
    """How many blocks must exist to reach every hook point; resid_pre L is the stream after L."""
    return max((h.layer + (h.site != "resid_pre") for h in hook_points), default=0)


def locate(model: nn.Module, hook_point: HookPoint) -> HookSite:
    """The module of `model` that carries a hook point.

    `model` is a Hugging Face base model, or one with a head or a vision tower around it. On a
    model cut short after L blocks, resid_pre L is what enters the final norm; so it is too on a
    whole model, where resid_post of the last block is the same stream.
    """
    tower, model_type = text_tower(model)
    family = _FAMILIES[model_type]
    blocks = tower.get_submodule(family.blocks)
    if not isinstance(blocks, nn.ModuleList):
        raise HookPointError(f"{model_type}: {family.blocks} is not a list of blocks")
    n_layers = len(blocks)
    if n_layers_needed([hook_point]) > n_layers:
        raise HookPointError(
            f"hook point {hook_point}: the {model_type} model has {n_layers} layers, "
            f"so the deepest is {HookPoint(n_layers - 1, 'resid_post')}"
        )
    if hook_point.site == "resid_pre" and hook_point.layer == n_layers:
        return HookSite(tower.get_submodule(family.final_norm), "input")
    block = blocks[hook_point.layer]
    if hook_point.site == "resid_pre":
        return HookSite(block, "input")
    if hook_point.site == "resid_post":
        return HookSite(block, "output")
    if getattr(block, "use_parallel_residual", False):
        raise HookPointError(
            f"hook point {hook_point}: {model_type} runs attention and MLP in parallel on the same "
            "input, so there is no stream between them; use hook_resid_pre or hook_resid_post"
        )
    return HookSite(block.get_submodule(family.mid), "input")


def text_tower(model: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the blocks, and its model_type; HookPointError when unsupported."""
    for path in ("", "model", "transformer", "gpt_neox", "language_model", "model.language_model"):
        try:
            tower = model.get_submodule(path)
        except AttributeError:
            continue
        model_type = getattr(getattr(tower, "config", None), "model_type", None)
        family = _FAMILIES.get(str(model_type))
        if family is not None and hasattr(tower, family.blocks):
            return tower, str(model_type)
    found = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    raise HookPointError(
        f"model type: found {found!r}, expected one of {', '.join(SUPPORTED_MODEL_TYPES)}"
    )


def final_norm_name(model_type: str) -> str:
    """Name of the base model's last normalisation, which comes after every hook point."""
    return _FAMILIES[model_type].final_norm
