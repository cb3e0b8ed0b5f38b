"""Matrix products whose every number depends on its own row and column alone.

A BLAS picks its kernel by the shape of the whole product, so that the same token and the same
latent can differ in the last bit between a large batch and a small one, or between a whole
encoder and some of its columns. Where rows and columns are padded to whole tiles it does not:
checked over 10,400 random shapes with MKL 2024.2 on AVX2 (benchmarks/LOG.md, 2026-11-24). `W` has
to lie row after row: under MKL_CBWR=COMPATIBLE a transposed one gives other bits than a plain one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

TILE_ROWS = 8
TILE_COLUMNS = 64


def padded_to_tiles(W: Float[Tensor, "d_in n"]) -> Float[Tensor, "d_in padded"]:
    """`W` with columns of zeros up to whole tiles, contiguous; itself where nothing is to do."""
    missing = -W.shape[1] % TILE_COLUMNS
    if not missing:
        return W.contiguous()
    return torch.nn.functional.pad(W, (0, missing))


def exact_product(
    z: Float[Tensor, "rows d_in"], W: Float[Tensor, "d_in padded"], n: int
) -> Float[Tensor, "rows n"]:
    """`z @ W[:, :n]`, the same bits for a row and a column in whatever company.

    `W` comes from `padded_to_tiles`.
    """
    rows = z.shape[0]
    missing = -rows % TILE_ROWS
    if missing:
        z = torch.nn.functional.pad(z, (0, 0, 0, missing))
    return (z @ W)[:rows, :n]
