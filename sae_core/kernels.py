"""Triton kernels for CUDA that nothing uses yet, beside the torch forms they must equal.

    cluster_sums    some latents of an elementwise gate, weighed and summed per cluster, fused
    count_rivals    how many latents of the dictionary come before each registered one

No kernel is chosen anywhere until `benchmarks/kernels.py` has shown it faster than torch by a
margin that `benchmarks/LOG.md` holds, on the card in question. Products are IEEE float32, without
TF32. Importing this needs the package `triton`, which nothing else does. Triton's interpreter
(TRITON_INTERPRET=1, set before triton is imported) runs the kernels on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

ROWS, LATENTS, INPUTS = 16, 64, 32
"""Tile of one program; `tl.dot` wants at least 16 a side."""
SPLITS = 16
"""Parts of the dictionary that `count_rivals` goes through at the same time."""


def cluster_sums_torch(
    z: Float[Tensor, "rows d_in"],
    W: Float[Tensor, "d_in n"],
    b_enc: Float[Tensor, " n"],
    threshold: Float[Tensor, " n"],
    mix: Float[Tensor, "n n_clusters"],
) -> Float[Tensor, "rows n_clusters"]:
    """Activations of the latents times `mix`, which holds weight / scale of each in each cluster.

    JumpReLU; a threshold of 0 makes it ReLU.
    """
    h = z @ W + b_enc
    return (torch.relu(h) * (h > threshold)) @ mix


def count_rivals_torch(
    z: Float[Tensor, "rows d_in"],
    W: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    own: Float[Tensor, "rows n"],
    latent_ids: Int[Tensor, " n"],
    chunk: int = 4096,
) -> Int[Tensor, "rows n"]:
    """How many latents come before each registered one: larger keys, or equal ones of lower id."""
    counts = torch.zeros(own.shape, dtype=torch.int32, device=z.device)
    for start in range(0, W.shape[1], chunk):
        keys = z @ W[:, start : start + chunk] + b_enc[start : start + chunk]
        ids = torch.arange(start, start + keys.shape[1], device=z.device)
        for r, latent_id in enumerate(latent_ids.tolist()):
            mine = own[:, r : r + 1]
            is_before = (keys > mine) | ((keys == mine) & (ids < latent_id))
            is_before &= ids != latent_id
            counts[:, r] += is_before.sum(dim=1, dtype=torch.int32)
    return counts


def cluster_sums(
    z: Float[Tensor, "rows d_in"],
    W: Float[Tensor, "d_in n"],
    b_enc: Float[Tensor, " n"],
    threshold: Float[Tensor, " n"],
    mix: Float[Tensor, "n n_clusters"],
) -> Float[Tensor, "rows n_clusters"]:
    """`cluster_sums_torch` in one kernel: no activation leaves the chip."""
    rows, d_in = z.shape
    n, n_clusters = mix.shape
    out = z.new_empty((rows, n_clusters))
    wide = max(16, triton.next_power_of_2(n_clusters))
    z, W, mix = z.contiguous(), W.contiguous(), mix.contiguous()
    _cluster_sums[(triton.cdiv(rows, ROWS),)](
        z, W, b_enc, threshold, mix, out, rows, d_in, n, n_clusters, ROWS, LATENTS, INPUTS, wide
    )
    return out


def count_rivals(
    z: Float[Tensor, "rows d_in"],
    W: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    own: Float[Tensor, "rows n"],
    latent_ids: Int[Tensor, " n"],
) -> Int[Tensor, "rows n"]:
    """`count_rivals_torch` in one kernel: no key leaves the chip."""
    rows, d_in = z.shape
    counts = torch.zeros(own.shape, dtype=torch.int32, device=z.device)
    z, W, own = z.contiguous(), W.contiguous(), own.contiguous()
    n_splits = min(SPLITS, triton.cdiv(W.shape[1], LATENTS))
    _count_rivals[(triton.cdiv(rows, ROWS), n_splits)](
        z,
        W,
        b_enc,
        own,
        latent_ids.int(),
        counts,
        rows,
        d_in,
        W.shape[1],
        own.shape[1],
        n_splits,
        ROWS,
        LATENTS,
        INPUTS,
    )
    return counts


@triton.jit
def _pre_acts(
    z,
    W,
    b_enc,
    row,
    latent,
    rows,
    d_in,
    n,
    ROWS: tl.constexpr,
    LATENTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    h = tl.zeros((ROWS, LATENTS), tl.float32)
    for start in range(0, d_in, INPUTS):
        i = start + tl.arange(0, INPUTS)
        z_at = row[:, None] * d_in + i[None, :]
        W_at = i[:, None].to(tl.int64) * n + latent[None, :]
        part = tl.load(z + z_at, (row[:, None] < rows) & (i[None, :] < d_in), 0.0)
        columns = tl.load(W + W_at, (i[:, None] < d_in) & (latent[None, :] < n), 0.0)
        h += tl.dot(part, columns, input_precision="ieee")
    return h + tl.load(b_enc + latent, latent < n, 0.0)[None, :]


@triton.jit
def _cluster_sums(
    z,
    W,
    b_enc,
    threshold,
    mix,
    out,
    rows,
    d_in,
    n,
    n_clusters,
    ROWS: tl.constexpr,
    LATENTS: tl.constexpr,
    INPUTS: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cluster = tl.arange(0, WIDE)
    sums = tl.zeros((ROWS, WIDE), tl.float32)
    for start in range(0, n, LATENTS):
        latent = start + tl.arange(0, LATENTS)
        h = _pre_acts(z, W, b_enc, row, latent, rows, d_in, n, ROWS, LATENTS, INPUTS)
        bar = tl.load(threshold + latent, latent < n, 0.0)[None, :]
        acts = tl.where((h > bar) & (h > 0), h, 0.0)
        mix_at = latent[:, None] * n_clusters + cluster[None, :]
        weights = tl.load(
            mix + mix_at, (latent[:, None] < n) & (cluster[None, :] < n_clusters), 0.0
        )
        sums += tl.dot(acts, weights, input_precision="ieee")
    there = (row[:, None] < rows) & (cluster[None, :] < n_clusters)
    tl.store(out + row[:, None] * n_clusters + cluster[None, :], sums, there)


@triton.jit
def _count_rivals(
    z,
    W,
    b_enc,
    own,
    latent_ids,
    counts,
    rows,
    d_in,
    d_sae,
    n,
    n_splits,
    ROWS: tl.constexpr,
    LATENTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    for start in range(tl.program_id(1) * LATENTS, d_sae, n_splits * LATENTS):
        latent = start + tl.arange(0, LATENTS)
        keys = _pre_acts(z, W, b_enc, row, latent, rows, d_in, d_sae, ROWS, LATENTS, INPUTS)
        for r in range(n):
            mine = tl.load(own + row * n + r, row < rows, 0.0)[:, None]
            latent_id = tl.load(latent_ids + r)
            is_before = (keys > mine) | ((keys == mine) & (latent[None, :] < latent_id))
            is_rival = (latent[None, :] < d_sae) & (latent[None, :] != latent_id)
            n_before = tl.sum((is_before & is_rival).to(tl.int32), axis=1)
            tl.atomic_add(counts + row * n + r, n_before, row < rows)
