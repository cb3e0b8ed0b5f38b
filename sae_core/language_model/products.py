"""How a model's matrices are multiplied fastest here: by which library, in which data type.

torch's `linear` uses MKL in float32, which takes older instructions than it could on the processors
of other makers; oneDNN, which comes with torch, has kernels for them, and keeps weights packed
between calls. Neither is always faster, so both are timed on the model's own shapes. In bfloat16
torch's `linear` is oneDNN's too, with weights that are packed anew in every call.

oneDNN applies an activation function to a product while that is still in cache; the gate of a
gated MLP then comes out activated, and the MLP's own function is the identity.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from time import perf_counter
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, relu, silu

Products = Literal["auto", "torch", "onednn"]
"""`auto` times both; the others are for tests and benchmarks."""

CLEAR_GAIN = 1.25
"""How many times faster oneDNN must be: a smaller gain changes with the machine's load, and with it
the last bits of every score."""

WORTH_TIMING = 10_000_000
"""Weights of a model below which `auto` is torch: its products take less time than the choice."""

_TIMED_ROWS = 256
_TIMED_RUNS = 5

_ACTIVATIONS: tuple[tuple[tuple[str, str], Callable[[Tensor], Tensor]], ...] = (
    (("gelu", "tanh"), lambda x: gelu(x, approximate="tanh")),
    (("gelu", "none"), gelu),
    (("swish", ""), silu),
    (("relu", ""), relu),
)
"""oneDNN's name and variant of a function, and the function."""


class OneDNNLinear(nn.Module):
    """`nn.Linear` with its weight in oneDNN's own layout, which is the only copy."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.bias = like.bias
        self.activation = ("none", "")
        """What is applied to the product: oneDNN's name, and which variant of it."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(like.weight.detach(), _TIMED_ROWS)

    @property
    def weight(self) -> Tensor:
        """A copy in the ordinary layout, [out_features, in_features]."""
        weight: Tensor = self._packed.to_dense()
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias, over the last axis, and the activation of that."""
        name, variant = self.activation
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self.bias, name, [], variant
        )
        return product


def choose_products(module: nn.Module, products: Products = "auto") -> str:
    """Gives a module's linear layers to the library that is fastest; returns its name.

    Only for a module on the CPU that is not trained any more, in float32 or bfloat16.
    """
    layers = {name: m for name, m in module.named_modules() if _can_be_packed(m)}
    if not layers:
        return "torch"
    if products == "auto" and sum(m.weight.numel() for m in layers.values()) < WORTH_TIMING:
        return "torch"
    if products == "auto":
        products = "onednn" if _is_worth_packing(list(layers.values())) else "torch"
    if products == "onednn":
        for name, layer in layers.items():
            module.set_submodule(name, OneDNNLinear(layer))
    return products


def fuse_gates(module: nn.Module) -> int:
    """Gives the activation function of gated MLPs to the products before it; returns how many.

    What the modules `gate_proj` and `act_fn` of such an MLP give is then another; what the MLP
    gives, and what enters its `down_proj`, is the same within rounding. Needs oneDNN's layers.
    """
    n_fused = 0
    for mlp in module.modules():
        gate, act = getattr(mlp, "gate_proj", None), getattr(mlp, "act_fn", None)
        if isinstance(gate, OneDNNLinear) and isinstance(act, nn.Module):
            n_fused += _fuse(mlp, gate, act)
    return n_fused


@torch.inference_mode()
def _fuse(mlp: nn.Module, gate: OneDNNLinear, act: nn.Module) -> bool:
    """Whether it was done; it is not where the function is unknown or the MLP is no usual one."""
    x = torch.linspace(-8, 8, 257)
    known = (name for name, function in _ACTIVATIONS if torch.equal(act(x), function(x)))
    activation = next(known, None)
    if activation is None:
        return False
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, gate.in_features, generator=generator).to(gate.weight.dtype)
    expected = mlp(rows)
    gate.activation, mlp.act_fn = activation, nn.Identity()
    tolerance = 1e-4 if rows.dtype == torch.float32 else 3e-2
    if (mlp(rows) - expected).abs().max() <= tolerance * expected.abs().max():
        return True
    gate.activation, mlp.act_fn = ("none", ""), act
    return False


def _can_be_packed(module: nn.Module) -> TypeGuard[nn.Linear]:
    if type(module) is not nn.Linear or not has_onednn():
        return False
    dtype = module.weight.dtype
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_bfloat16())


def _is_worth_packing(layers: list[nn.Linear]) -> bool:
    if layers[0].weight.dtype == torch.bfloat16:
        return True  # the same library, less one packing a call
    torch_seconds, onednn_seconds = _seconds(layers)
    return torch_seconds >= CLEAR_GAIN * onednn_seconds


def bfloat16_is_faster(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16, rather than only stores it.

    Asked of the driver on CUDA. On the CPU timed, as a processor that lacks the instructions takes
    hundreds of times longer.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not has_onednn() or not has_bfloat16():
        return False
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(_TIMED_ROWS, 1024, dtype=dtype)
        weight = torch.ones(1024, 1024, dtype=dtype)
        seconds.append(min(_timed(x, weight) for _ in range(_TIMED_RUNS)))
    return seconds[0] >= CLEAR_GAIN * seconds[1]


@torch.inference_mode()
def _timed(x: Tensor, weight: Tensor) -> float:
    began = perf_counter()
    linear(x, weight)
    return perf_counter() - began


def has_onednn() -> bool:
    """Whether this torch has oneDNN's products."""
    ops = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(ops, "_linear_pointwise")
        and hasattr(ops, "_reorder_linear_weight")
    )


def has_bfloat16() -> bool:
    """Whether oneDNN packs matrices of bfloat16 here."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.inference_mode()
def _seconds(layers: list[nn.Linear]) -> tuple[float, float]:
    """Least time of all layers' products, one shape after the other: torch's, and oneDNN's."""
    counts = Counter(layer.weight.shape for layer in layers)
    examples = {layer.weight.shape: layer for layer in layers}
    totals = [0.0, 0.0]
    for shape, count in counts.items():
        layer = examples[shape]
        x = torch.ones(_TIMED_ROWS, layer.in_features)
        packed = OneDNNLinear(layer)
        best = [float("inf"), float("inf")]
        for _ in range(_TIMED_RUNS):
            # Turn by turn, so that a burst of other work meets both.
            began = perf_counter()
            linear(x, layer.weight, layer.bias)
            between = perf_counter()
            packed(x)
            ended = perf_counter()
            best = [min(best[0], between - began), min(best[1], ended - between)]
        totals = [total + count * seconds for total, seconds in zip(totals, best, strict=True)]
    return totals[0], totals[1]
