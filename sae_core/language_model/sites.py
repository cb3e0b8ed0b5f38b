"""The module of a model that each hook point means, and how activations are read off it.

Found by family and without TransformerLens (see `families`). Knows nothing of how a model is
loaded or run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sae_core.errors import HookPointError
from sae_core.hook_points import IO, HookPoint, ModulePath, Site, n_layers_needed
from sae_core.language_model.families import (
    Family,
    blocks_of,
    is_parallel,
    is_post_norm,
    text_tower,
)


@dataclass(frozen=True, slots=True)
class HookSite:
    """A module, which side of it carries the activations, and what is done to them."""

    module: nn.Module
    io: IO
    transform: Callable[[Tensor], Tensor] | None = None
    """Applied to what is read; None reads it as it is."""

    def register(self, receive: Callable[[Tensor], None]) -> RemovableHandle:
        """Calls `receive` with the activations on every forward pass, until the handle is removed.

        An input site is read before its module runs. Tuple and Tensor outputs are taken alike,
        as are inputs by position or by name.
        """
        if self.io == "input":
            return self.module.register_forward_pre_hook(
                lambda module, args, kwargs: receive(self._read(args or tuple(kwargs.values()))),
                with_kwargs=True,
            )
        return self.module.register_forward_hook(
            lambda module, args, output: receive(self._read(output))
        )

    def _read(self, value: object) -> Tensor:
        if isinstance(value, tuple) and value:
            value = value[0]
        if not isinstance(value, Tensor):
            raise HookPointError(
                f"{type(self.module).__name__}: found {type(value).__name__}, "
                "expected a Tensor or a tuple that begins with one"
            )
        return value if self.transform is None else self.transform(value)


def locate(model: nn.Module, hook_point: HookPoint) -> HookSite:
    """The module of `model` that carries a hook point.

    `model` is a Hugging Face base model, or one with a head or a vision tower around it. On a
    model of L blocks, cut short or whole, resid_pre L is the stream after the last of them.

    Raises:
        HookPointError: The model is of another family, is not deep enough or has no such place.
    """
    hook_point = canonical(model, hook_point)
    blocks, family, model_type = blocks_of(model)
    if hook_point.stack:
        raise HookPointError(
            f"hook point {hook_point}: a {model_type} model has one stack of blocks, "
            f"expected a name without {hook_point.stack!r}"
        )
    if n_layers_needed([hook_point]) > len(blocks):
        raise HookPointError(
            f"hook point {hook_point}: the {model_type} model has {len(blocks)} layers, "
            f"so the deepest is {HookPoint(len(blocks) - 1, 'resid_post')}"
        )
    if hook_point.site == "embed":
        if family.is_embed_stream:
            return HookSite(blocks[0], "input")  # scaled, whether in the embedding or after it
        return HookSite(text_tower(model)[0].get_submodule(family.embed), "output")
    if hook_point.site == "resid_pre" and hook_point.layer == len(blocks):
        return HookSite(blocks[-1], "output")
    block = blocks[hook_point.layer]
    if isinstance(hook_point, ModulePath):
        return HookSite(_submodule(block, hook_point, model_type), hook_point.side)
    missing = _why_missing(block, family, hook_point.site)
    if missing is not None:
        raise HookPointError(f"hook point {hook_point}: {model_type} {missing}")
    path, io = _places(family)[hook_point.site]
    transform = None
    if hook_point.site == "mlp_normalized":
        transform = without_gain(block.get_submodule(path))
    return HookSite(block.get_submodule(path), io, transform)


def canonical(model: nn.Module, hook_point: HookPoint) -> HookPoint:
    """The named site that a module path means in `model`, or the path where no name fits.

    A named site is returned as it is. The path of Gemma's embedding means what it gives out here,
    scaled; before transformers 5 Gemma 2 scaled it later. Raises HookPointError when the path's
    list of blocks is not the family's.
    """
    if not isinstance(hook_point, ModulePath):
        return hook_point
    blocks, family, model_type = blocks_of(model)
    expected = family.blocks.rpartition(".")[2] if hook_point.blocks else family.embed
    found = hook_point.blocks or hook_point.submodule
    if found != expected.rpartition(".")[2]:
        raise HookPointError(
            f"hook point {hook_point}: a {model_type} model has no {found}, expected {expected}"
        )
    if not hook_point.blocks:
        if hook_point.side == "input":
            raise HookPointError(f"hook point {hook_point}: what enters it are token ids")
        return HookPoint(0, "embed")
    block = blocks[min(hook_point.layer, len(blocks) - 1)]
    place = hook_point.submodule, hook_point.side
    for site, known in _places(family).items():
        if place == known and site != "mlp_normalized" and not _why_missing(block, family, site):
            return HookPoint(hook_point.layer, site)
    if place == (family.mlp_norm, "output") and not is_post_norm(block):
        return HookPoint(hook_point.layer, "mlp_in")
    return hook_point


def _places(family: Family) -> dict[Site, tuple[str, IO]]:
    """Where in a block each site is read."""
    return {
        "resid_pre": ("", "input"),
        "z": (family.z, "input"),
        "attn_out": (family.attn_out, "output"),
        "resid_mid": (family.mlp_norm, "input"),
        "mlp_normalized": (family.mlp_norm, "input"),
        "mlp_in": (family.mlp, "input"),
        "mlp_post": (family.mlp_post, "input"),
        "mlp_out": (family.mlp_out, "output"),
        "resid_post": ("", "output"),
    }


def _why_missing(block: nn.Module, family: Family, site: Site) -> str | None:
    """Why the block has no such place, as the end of a sentence; None where it has one."""
    if site == "resid_mid" and is_parallel(block, family):
        return (
            "runs attention and MLP in parallel on the same "
            "input, so there is no stream between them; use hook_resid_pre or hook_resid_post"
        )
    if site in ("resid_mid", "mlp_normalized") and is_post_norm(block):
        return (
            "normalises the stream after each addition, so there is nothing between attention "
            "and MLP that other models have; use mlp.hook_in for what enters the MLP"
        )
    if site == "mlp_post" and hasattr(block.get_submodule(family.mlp), "experts"):
        return "has experts in this block, each with neurons of its own; use hook_mlp_out"
    return None


def _submodule(block: nn.Module, hook_point: ModulePath, model_type: str) -> nn.Module:
    try:
        return block.get_submodule(hook_point.submodule)
    except AttributeError:
        known = ", ".join(name for name, _ in block.named_children())
        raise HookPointError(
            f"hook point {hook_point}: a {model_type} block has no {hook_point.submodule}, "
            f"it has {known}"
        ) from None


def without_gain(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a LayerNorm or RMSNorm makes of its input before gain and bias.

    Computed from the input, as a gain of 0 cannot be divided out; in float32, as the norms do.
    For RMSNorm this is TransformerLens's `hook_normalized` always; for LayerNorm it is that of a
    processed model (fold_ln), and of any in version 3, while an unprocessed model of version 2
    has gain and bias in it.
    """
    eps = float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)  # type: ignore[arg-type]
    subtracts_mean = isinstance(norm, nn.LayerNorm)

    def normalise(x: Tensor) -> Tensor:
        wide = x.float()
        if subtracts_mean:
            wide = wide - wide.mean(dim=-1, keepdim=True)
        return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)

    return normalise
