"""A base model whose matrices are split over ranks, by transformers' own tensor-parallel plan.

Every rank holds a part of the heads, of the MLP's neurons and of the vocabulary, and the sums in
between are taken over all ranks, so that the residual stream is whole on each. Which parts, and
which rows of the checkpoint make them, is transformers' to say; here is what it does not check.
Knows no processes (see `ranks`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from sae_core.errors import HookPointError, ModelLoadError
from sae_core.hook_points import HookPoint
from sae_core.language_model.sites import locate

_SPLIT_OUTPUT = "colwise"
_SPLIT_INPUT = "rowwise"
_SPLIT_EXPERTS = "moe_tp_experts"
_PACKED = "packed_colwise"
"""Gate and up projections, one behind the other, each split."""


def split_plan(module: nn.Module, n_ranks: int) -> dict[str, str]:
    """transformers' style for each module and parameter of `module` that has one, by name.

    Raises:
        ModelLoadError: transformers has no plan for this family, or its sizes do not divide.
    """
    config: Any = module.config
    wildcards: dict[str, str] = getattr(module, "tp_plan", None) or {}
    if not wildcards:
        raise ModelLoadError(
            f"tensor parallel: found a {config.model_type} model, for which transformers has no "
            "plan; expected a family that it has one for, such as llama, gemma3 or qwen3"
        )
    try:
        from transformers.integrations.tensor_parallel import replace_layer_number_by_wildcard
    except ImportError as error:
        raise _too_old() from error
    plan: dict[str, str] = {}
    for name, submodule in module.named_modules():
        style = wildcards.get(replace_layer_number_by_wildcard(name))
        for parameter, _ in submodule.named_parameters(recurse=False):
            full = f"{name}.{parameter}"
            own = wildcards.get(replace_layer_number_by_wildcard(full), style)
            if own is not None:
                plan[full] = own
        if style is not None:
            plan[name] = style
    _check_divides(module, plan, n_ranks)
    return plan


def _check_divides(module: nn.Module, plan: dict[str, str], n_ranks: int) -> None:
    config: Any = module.config
    n_heads = config.num_attention_heads
    counts = {
        "attention heads": n_heads,
        "key-value heads": getattr(config, "num_key_value_heads", None) or n_heads,
    }
    if _SPLIT_OUTPUT not in plan.values():
        counts = {}  # heads are gathered before they attend
    for name, style in plan.items():
        if style == _PACKED:
            counts["neurons of an expert"] = module.get_parameter(name).shape[-2] // 2
    for what, found in counts.items():
        if found % n_ranks:
            raise ModelLoadError(
                f"tensor parallel: found {found} {what} of the {config.model_type} model, "
                f"expected a multiple of the {n_ranks} ranks"
            )


def check_whole(module: nn.Module, plan: dict[str, str], hook_points: Iterable[HookPoint]) -> None:
    """Raises HookPointError where a rank would see a part of the activations only."""
    names = {id(submodule): name for name, submodule in module.named_modules()}
    for hook_point in hook_points:
        site = locate(module, hook_point)
        if _is_split(names[id(site.module)], site.io, plan):
            raise HookPointError(
                f"hook point {hook_point}: found a place whose activations are split over the "
                "ranks of a tensor-parallel model, expected one where they are whole, such as "
                f"{HookPoint(hook_point.layer, 'resid_post')}"
            )


def _is_split(name: str, io: str, plan: dict[str, str]) -> bool:
    style = plan.get(name)
    if style in (_SPLIT_OUTPUT, _SPLIT_INPUT):
        return (style, io) in ((_SPLIT_OUTPUT, "output"), (_SPLIT_INPUT, "input"))
    parent = name.rpartition(".")[0]
    while parent:
        if plan.get(parent) == _SPLIT_EXPERTS:
            return True
        beside = (s for n, s in plan.items() if n.rpartition(".")[0] == parent)
        if _SPLIT_OUTPUT in beside:
            return True
        parent = parent.rpartition(".")[0]
    return False


def split(module: nn.Module, plan: dict[str, str], mesh: Any) -> None:
    """Puts in each planned parameter's place the empty part of this rank, and hooks the modules.

    Args:
        plan: of `split_plan`.
        mesh: one-dimensional DeviceMesh over the ranks.
    """
    try:
        from transformers.integrations.tensor_parallel import apply_tensor_parallelism
    except ImportError as error:
        raise _too_old() from error
    for name in plan:
        path, _, parameter = name.rpartition(".")
        owner = module.get_submodule(path)
        whole = owner._parameters.get(parameter)
        if whole is not None:  # on meta nothing is copied
            owner._parameters[parameter] = nn.Parameter(whole.to("meta"), requires_grad=False)
    apply_tensor_parallelism(module, mesh, plan)


class Shard:
    """This rank's part of one parameter, as it is read from a checkpoint."""

    def __init__(self, parameter: Any) -> None:
        from transformers.distributed.sharding_utils import DtensorShardOperation

        self._parameter = parameter
        self._read = DtensorShardOperation(parameter)

    @property
    def part(self) -> Tensor:
        """A tensor of the part's shape, without numbers."""
        part = self._parameter.to_local()
        assert isinstance(part, Tensor)
        return part

    def read(self, stored: Any, index: int) -> Tensor | None:
        """Of a tensor in a file (a safetensors slice), what this rank needs; None for nothing.

        `index` says which expert it is, where each has a tensor of its own.
        """
        part: Tensor | None = self._read.shard_tensor(stored, index)
        return part

    def whole(self, part: Tensor) -> Tensor:
        """The parameter of which `part` is this rank's."""
        from torch.distributed.tensor import DTensor

        like = self._parameter
        return DTensor.from_local(
            part.contiguous(),
            like.device_mesh,
            like.placements,
            run_check=False,
            shape=like.shape,
            stride=tuple(like.stride()),
        )


def shard_of(parameter: Tensor) -> Shard | None:
    """How to read a parameter that is split; None for one that is not."""
    return None if type(parameter) in (Tensor, nn.Parameter) else Shard(parameter)


def _too_old() -> ModelLoadError:
    from transformers import __version__

    return ModelLoadError(
        f"tensor parallel: found transformers {__version__}, expected 5.23 or later"
    )
