"""How a model's matrices are multiplied fastest here: by which library, in which data type.

torch's `linear` uses MKL in float32, which takes older instructions than it could on the processors
of other makers; oneDNN, which comes with torch, has kernels for them, and keeps weights packed
between calls. Neither is always faster, so both are timed on the model's own shapes.
"""

from __future__ import annotations

from collections import Counter
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

Products = Literal["auto", "torch", "onednn"]
"""`auto` times both; the others are for tests and benchmarks."""

CLEAR_GAIN = 1.25
"""How many times faster oneDNN must be: a smaller gain changes with the machine's load, and with it
the last bits of every score."""

WORTH_TIMING = 10_000_000
"""Weights of a model below which `auto` is torch: its products take less time than the choice."""

_TIMED_ROWS = 256
_TIMED_RUNS = 5


class OneDNNLinear(nn.Module):
    """`nn.Linear` with its weight in oneDNN's own layout, which is the only copy."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.bias = like.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(like.weight.detach(), _TIMED_ROWS)

    @property
    def weight(self) -> Tensor:
        """A copy in the ordinary layout, [out_features, in_features]."""
        weight: Tensor = self._packed.to_dense()
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias, over the last axis."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self.bias, "none", [], ""
        )
        return product


def choose_products(module: nn.Module, products: Products = "auto") -> str:
    """Gives a module's linear layers to the library that is fastest; returns its name.

    Only for a module on the CPU that is not trained any more. In another type than float32 torch
    asks oneDNN by itself.
    """
    layers = {
        name: m
        for name, m in module.named_modules()
        if type(m) is nn.Linear and m.weight.dtype == torch.float32
    }
    if not layers or not _has_onednn():
        return "torch"
    if products == "auto" and sum(m.weight.numel() for m in layers.values()) < WORTH_TIMING:
        return "torch"
    if products == "auto":
        torch_seconds, onednn_seconds = _seconds(list(layers.values()))
        products = "onednn" if torch_seconds >= CLEAR_GAIN * onednn_seconds else "torch"
    if products == "onednn":
        for name, layer in layers.items():
            module.set_submodule(name, OneDNNLinear(layer))
    return products


def bfloat16_is_faster(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16, rather than only stores it.

    Asked of the driver on CUDA. On the CPU timed, as a processor that lacks the instructions takes
    hundreds of times longer.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    ops = torch.ops.mkldnn
    if not _has_onednn() or not ops._is_mkldnn_bf16_supported():
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


def _has_onednn() -> bool:
    ops = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(ops, "_linear_pointwise")
        and hasattr(ops, "_reorder_linear_weight")
    )


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
