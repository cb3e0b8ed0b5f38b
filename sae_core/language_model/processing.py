"""From Hugging Face's activations to those of a processed TransformerLens model.

`HookedTransformer.from_pretrained` rewrites weights before it runs them. The logits stay the same,
some activations do not, and SAEs were trained on those. What is undone here, exactly:

    fold_ln                  nothing changes where activations are read, except that what enters
                             the MLP has no gain any more (that place is ln2.hook_normalized)
    center_writing_weights   LayerNorm families only: x - mean(x) wherever something was written
                             to the stream; RMSNorm families are never centred
    fold_value_biases        hook_z minus the value bias (with fold_ln, the one that took in the
                             norm's bias), as attention weights sum to one

Knows which places a processing moves; which SAE was trained with one is for the format to say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sae_core.errors import HookPointError
from sae_core.hook_points import HookPoint, ModulePath, Site
from sae_core.language_model.families import Family, blocks_of, is_post_norm
from sae_core.language_model.sites import canonical, locate

_WRITTEN: tuple[Site, ...] = (
    "embed",
    "resid_pre",
    "attn_out",
    "resid_mid",
    "mlp_out",
    "resid_post",
)
"""Places that hold the stream or a part of it, so that centred writes move them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Processing:
    """What was done to a TransformerLens model's weights, by the names of its loader's flags."""

    fold_ln: bool = False
    center_writing_weights: bool = False
    fold_value_biases: bool = False


DEFAULT_PROCESSING = Processing(fold_ln=True, center_writing_weights=True, fold_value_biases=True)
"""What `HookedTransformer.from_pretrained` does when it is not told otherwise."""


@dataclass(frozen=True, slots=True)
class ProcessedShift:
    """From Hugging Face's activations at one hook point to a processed model's."""

    is_centred: bool
    """Whether each token's mean is subtracted."""
    shift: Float[Tensor, " width"] | None
    """Subtracted from every token; None where nothing is."""

    def __call__(self, acts: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        if self.is_centred:
            acts = acts - acts.mean(dim=-1, keepdim=True)
        return acts if self.shift is None else acts - self.shift


def processed_shift(
    model: nn.Module, hook_point: HookPoint, processing: Processing
) -> ProcessedShift:
    """What takes the model's activations at `hook_point` to those of the processed model.

    The shift is a tensor of its own, in the dtype and on the device of the model's weights.

    Raises:
        HookPointError: The model has no such place; or the processed model has none, or one that
            cannot be said exactly.
    """
    locate(model, hook_point)
    hook_point = canonical(model, hook_point)
    blocks, family, model_type = blocks_of(model)
    centres = processing.center_writing_weights and family.norm == "layer_norm"
    folds = processing.fold_ln or processing.fold_value_biases
    if isinstance(hook_point, ModulePath) and (centres or folds):
        raise HookPointError(
            f"hook point {hook_point}: found a place without a TransformerLens name, so that what "
            "processing does to it is not known; expected a named one or no processing"
        )
    if processing.fold_ln and hook_point.site == "mlp_in":
        expected = HookPoint(hook_point.layer, "mlp_normalized")
        raise HookPointError(
            f"hook point {hook_point}: with fold_ln the gain is in the MLP's weights, "
            f"so nothing has it; expected {expected}"
        )
    if centres and hook_point.site in _WRITTEN and is_post_norm(blocks[0]):
        raise HookPointError(
            f"hook point {hook_point}: this {model_type} model normalises the stream itself, "
            "so centring what is written does not centre the stream"
        )
    shift = None
    if processing.fold_value_biases and hook_point.site == "z":
        shift = _value_bias(blocks[hook_point.layer], family, fold_ln=processing.fold_ln)
    return ProcessedShift(centres and hook_point.site in _WRITTEN, shift)


def _value_bias(
    block: nn.Module, family: Family, *, fold_ln: bool
) -> Float[Tensor, " width"] | None:
    """What the values of all heads have of the input-independent part, side by side as in hook_z.

    With `fold_ln` the bias of the norm before attention has moved into it, through the values'
    weights. None where there is neither.
    """
    attn, projection = block.get_submodule(family.attn), block.get_submodule(family.value)
    norm = block.get_submodule(family.attn_norm)
    weight, bias = projection.weight, getattr(projection, "bias", None)
    assert isinstance(weight, Tensor)
    if isinstance(projection, Conv1D):
        weight = weight.T  # GPT-2 keeps [d_in, d_out]
    norm_bias = getattr(norm, "bias", None) if fold_ln else None
    if bias is None and norm_bias is None:
        return None
    with torch.no_grad():
        total = weight.new_zeros(len(weight))
        if bias is not None:
            total = total + bias
        if norm_bias is not None:
            total = total + weight @ norm_bias
        return _of_all_heads(total, attn, family)


def _of_all_heads(
    bias: Float[Tensor, " d_out"], attn: nn.Module, family: Family
) -> Float[Tensor, " width"]:
    """The values' part of a fused projection's bias, once for each query head."""
    head_dim = int(getattr(attn, "head_dim", 0) or attn.head_size)  # type: ignore[arg-type]
    if family.is_value_fused == "thirds":
        return bias.chunk(3)[2].clone()
    if family.is_value_fused == "heads":
        return bias.view(-1, 3, head_dim)[:, 2].flatten()
    group = int(getattr(attn, "num_key_value_groups", 1))
    return bias.view(-1, 1, head_dim).expand(-1, group, -1).flatten()
