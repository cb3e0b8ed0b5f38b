"""Causal attention of one stream's last tokens: by torch's fused kernel, or in blocks on the CPU.

torch's fused kernel multiplies small tiles, on some processors at a tenth of the rate of a plain
product. So whole blocks of queries are also multiplied by oneDNN, and whichever is faster on the
model's own shapes is taken when it is loaded. Scores and softmax are float32 either way.
"""

from __future__ import annotations

from functools import lru_cache
from time import perf_counter
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sae_core.language_model.products import CLEAR_GAIN, has_onednn

Attention = Literal["auto", "torch", "blocks"]
"""`auto` times both on the CPU; the others are for tests and benchmarks."""

QUERY_BLOCK = 512
"""Rows of queries that one explicit mask covers; bounds it to 512 x keys, whatever the length."""

PRODUCT_ROWS = 128
"""Most tokens of a block of plain products: half of its last 128 columns are computed in vain."""

PRODUCT_SCORES = 4 << 20
"""Most scores of a block, where that leaves it `_LEAST_ROWS` tokens: what is far larger than the
caches is slow, and memory grows with the text."""

_LEAST_ROWS = 16

WORTH_BLOCKS = 4 << 20
"""Multiplications of queries with keys, for each key-value head, below which the fused kernel is
faster whatever its rate: a block takes some 50 us however small it is."""

WORTH_TIMING = 512
"""Numbers of all of a token's query heads below which `auto` is torch."""

_TIMED_RUNS = 5


class Terms(NamedTuple):
    """What a layer asks of attention beside causality."""

    scaling: float
    """Factor on query-key products."""
    window: int | None
    """A token sees itself and `window - 1` tokens before it; None for all."""
    softcap: float | None
    """Scores become `softcap * tanh(score / softcap)` (Gemma 2)."""


class Heads(NamedTuple):
    """The shape of one token's queries, keys and values."""

    n_kv_heads: int
    group: int
    """Query heads of each."""
    key_dim: int
    value_dim: int


def attend_span(
    query: Float[Tensor, "n_kv_heads group n head_dim"],
    keys: Float[Tensor, "n_kv_heads stop head_dim"],
    values: Float[Tensor, "n_kv_heads stop head_dim"],
    past: int,
    terms: Terms,
    *,
    in_blocks: bool = False,
) -> Float[Tensor, "n_kv_heads group n head_dim"]:
    """Causal attention of one stream's last `n` tokens, which have `past` rows before them.

    Args:
        in_blocks: Multiply whole blocks with oneDNN; for tensors on the CPU.
    """
    scaling, window, softcap = terms
    n, stop = query.shape[2], keys.shape[1]
    if n == 1:
        # One query row sees a plain range of keys: the group stands in for the query axis.
        first = 0 if window is None else max(0, stop - window)
        keys, values = keys[None, :, first:], values[None, :, first:]
        row = query[None, :, :, 0]
        if softcap is None:
            return scaled_dot_product_attention(row, keys, values, scale=scaling)[0, :, :, None]
        return _softcapped(row, keys, values, None, scaling, softcap)[0, :, :, None]
    n_seen = stop if window is None else min(stop, window + n)
    if in_blocks and query.shape[1] * n * n_seen * query.shape[3] >= WORTH_BLOCKS:
        return _in_blocks(query, keys, values, past, terms)
    shared_keys = keys[:, None].expand(-1, query.shape[1], -1, -1)
    shared_values = values[:, None].expand(-1, query.shape[1], -1, -1)
    if past == 0 and softcap is None and (window is None or n <= window):
        return scaled_dot_product_attention(
            query, shared_keys, shared_values, scale=scaling, is_causal=True
        )
    blocks = []
    for start in range(0, n, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, n)
        first = 0 if window is None else max(0, past + start - window + 1)
        seen = slice(first, past + end)
        offset = past + start - first
        mask = torch.ones(end - start, past + end - first, dtype=torch.bool, device=query.device)
        mask = mask.tril_(offset)
        if window is not None:
            mask = mask.triu_(offset - window + 1)
        rows, block_keys, block_values = (
            query[:, :, start:end],
            shared_keys[:, :, seen],
            shared_values[:, :, seen],
        )
        if softcap is None:
            block = scaled_dot_product_attention(
                rows, block_keys, block_values, attn_mask=mask, scale=scaling
            )
        else:
            block = _softcapped(rows, block_keys, block_values, mask, scaling, softcap)
        blocks.append(block)
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def choose_attention(heads: Heads, dtype: torch.dtype, attention: Attention) -> str:
    """What attends from several rows of a stream on the CPU: torch or blocks."""
    possible = has_onednn() and dtype in (torch.float32, torch.bfloat16)
    if attention != "auto" or not possible:
        return attention if possible else "torch"
    if heads.n_kv_heads * heads.group * heads.key_dim < WORTH_TIMING:
        return "torch"
    fused, in_blocks = _seconds(heads, dtype)
    return "blocks" if fused >= CLEAR_GAIN * in_blocks else "torch"


def _in_blocks(
    query: Tensor, keys: Tensor, values: Tensor, past: int, terms: Terms
) -> Float[Tensor, "n_kv_heads group n head_dim"]:
    """Plain products of blocks of rows with all that any of them sees."""
    scaling, window, softcap = terms
    n_kv_heads, group, n, head_dim = query.shape
    longest = keys.shape[1] if window is None else min(keys.shape[1], window + PRODUCT_ROWS)
    step = min(PRODUCT_ROWS, max(_LEAST_ROWS, PRODUCT_SCORES // (group * longest)))
    mixed = query.new_empty(n_kv_heads, group, n, values.shape[-1])
    for head in range(n_kv_heads):
        wide_keys, columns = keys[head].float(), values[head].t()
        for start in range(0, n, step):
            end = min(start + step, n)
            n_rows = end - start
            first = 0 if window is None else max(0, past + start - window + 1)
            seen = slice(first, past + end)
            # float32 products of bfloat16 numbers are exact; one of bfloat16 would be rounded.
            rows = query[head, :, start:end].reshape(-1, head_dim).float() * scaling
            scores = _product(rows, wide_keys[seen]).view(group, n_rows, -1)
            if softcap is not None:
                scores = scores.div_(softcap).tanh_().mul_(softcap)
            scores[:, :, -n_rows:] += _hidden(n_rows, 0)
            if window is not None and past + end - window > 0:
                offset = past + start - first
                scores[:, :, :n_rows] += _hidden(n_rows, window - offset)
            weights = scores.softmax(dim=-1).to(values.dtype)
            block = _product(weights.view(group * n_rows, -1), columns[:, seen])
            mixed[head, :, start:end] = block.view(group, n_rows, -1)
    return mixed


@lru_cache(maxsize=256)
def _hidden(n_rows: int, before: int) -> Float[Tensor, "n_rows n_rows"]:
    """-inf where a row must not look: after itself, or, from 1 on, that far before itself."""
    hidden = torch.full((n_rows, n_rows), float("-inf"))
    return hidden.tril_(-before) if before else hidden.triu_(1)


def _product(x: Float[Tensor, "n d"], weight: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """x @ weight.T by oneDNN."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


@torch.inference_mode()
def _seconds(heads: Heads, dtype: torch.dtype) -> tuple[float, float]:
    """Least time of a block of rows: torch's, and that of plain products."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    n = PRODUCT_ROWS
    query = some(heads.n_kv_heads, heads.group, n, heads.key_dim)
    keys = some(heads.n_kv_heads, n, heads.key_dim)
    values = some(heads.n_kv_heads, n, heads.value_dim)
    terms = Terms(heads.key_dim**-0.5, None, None)
    best = [float("inf"), float("inf")]
    for _ in range(_TIMED_RUNS):  # turn by turn, so that a burst of other work meets both
        for kind in (False, True):
            began = perf_counter()
            attend_span(query, keys, values, 0, terms, in_blocks=kind)
            best[kind] = min(best[kind], perf_counter() - began)
    return best[0], best[1]


def _softcapped(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float, softcap: float
) -> Tensor:
    """Attention with capped scores, softmax in float32; torch's fused kernels have no cap."""
    scores = torch.tanh(query @ keys.transpose(-1, -2) * (scaling / softcap)) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(values.dtype) @ values
