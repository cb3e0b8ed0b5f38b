"""Attention kernels' semantics written out, to stand in for a GPU's in tests."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def reference_kernel(
    query: Float[Tensor, "total_q n_heads head_dim"],
    key: Tensor,
    value: Tensor,
    cu_seq_q: Int[Tensor, " n_and_one"],
    cu_seq_k: Int[Tensor, " n_and_one"] | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Int[Tensor, " n"] | None = None,
    block_table: Int[Tensor, "n max_pages"] | None = None,
) -> Float[Tensor, "total_q n_heads head_dim"]:
    """`torch.nn.attention.varlen.varlen_attn`, one query row at a time, in the inputs' type.

    Reads no page and no row beyond what tables and lengths name. Refuses what the real one does,
    and lengths that do not belong to the rows.
    """
    n_heads, n_kv_heads = query.shape[1], key.shape[-2]
    if not enable_gqa and n_heads != n_kv_heads:
        raise ValueError(f"found {n_heads} query and {n_kv_heads} key heads without enable_gqa")
    if (block_table is None) != (seqused_k is None) or (block_table is None) == (cu_seq_k is None):
        raise ValueError("expected block_table and seqused_k, or cu_seq_k")
    bounds = cu_seq_q.tolist()
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    out = torch.full_like(query, float("nan"))
    for i, (start, n) in enumerate(zip(bounds, lengths, strict=False)):
        if block_table is not None and seqused_k is not None:
            n_keys, size = int(seqused_k[i]), key.shape[1]
            here = block_table[i, : -(-n_keys // size)].long()
            keys, values = (t[here].flatten(0, 1)[:n_keys] for t in (key, value))
        else:
            assert cu_seq_k is not None
            keys, values = (t[int(cu_seq_k[i]) : int(cu_seq_k[i + 1])] for t in (key, value))
            n_keys = len(keys)
        if n > max_q or n_keys > max_k or n > n_keys:
            raise ValueError(f"text {i}: found {n} queries and {n_keys} keys, {max_q} and {max_k}")
        keys, values = (t.repeat_interleave(n_heads // n_kv_heads, dim=1) for t in (keys, values))
        for row in range(n):
            at = n_keys - n + row
            left, right = window_size
            first = 0 if left < 0 else max(0, at - left)
            last = n_keys if right < 0 else at + right + 1
            scores = torch.einsum("hd,khd->hk", query[start + row], keys[first:last])
            weights = (scores * (scale or query.shape[-1] ** -0.5)).softmax(dim=-1)
            out[start + row] = torch.einsum("hk,khd->hd", weights, values[first:last])
    return out
