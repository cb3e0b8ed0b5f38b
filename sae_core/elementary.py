"""exp, sigmoid and tanh whose every result depends on its own argument alone.

torch computes these in vectors and what is left over one by one, by another formula, so that the
last bit of a latent depends on where in a tensor it lies. Here they are sums and products, which
IEEE 754 rounds in one way everywhere, in float64; sixteen times slower than torch's, which only
GLU and tanh_relu encoders notice (benchmarks/LOG.md, 2026-11-24).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

TERMS = 10
"""Of the series of exp over |r| <= ln(2) / 2; the next one is below 2^-40 of the result."""
LARGEST = 700.0
"""exp(700) is still a float64, and long not a float32."""


def exp(x: Float32[Tensor, "*any"]) -> Float32[Tensor, "*any"]:
    """e to the power of each number."""
    return _exp(x.double()).float()


def sigmoid(x: Float32[Tensor, "*any"]) -> Float32[Tensor, "*any"]:
    """1 / (1 + exp(-x))."""
    return (1 / (_exp(-x.double()) + 1)).float()


def tanh(x: Float32[Tensor, "*any"]) -> Float32[Tensor, "*any"]:
    """The hyperbolic tangent."""
    wide = x.double()
    large = 1 - 2 / (_exp(wide * 2) + 1)
    small = wide - wide * wide * wide / 3  # the next term is below 2^-30 of it
    return torch.where(wide.abs() < 2.0**-7, small, large).float()


def _exp(x: Float64[Tensor, "*any"]) -> Float64[Tensor, "*any"]:
    """Powers of two times a short series; no `alpha=`, no `addcmul`: these may fuse or not."""
    x = x.clamp(-LARGEST, LARGEST)
    power = torch.round(x * math.log2(math.e))
    r = x - power * math.log(2)
    series = torch.full_like(r, 1 / math.factorial(TERMS))
    for term in range(TERMS - 1, -1, -1):
        series.mul_(r).add_(1 / math.factorial(term))
    two_to_power = ((power.nan_to_num().long() + 1023) << 52).view(torch.float64)
    return series.mul_(two_to_power)
