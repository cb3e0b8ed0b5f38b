"""The variable-length attention kernel of torch, and whether it can be used here.

Which cards, head sizes, data types and page sizes it serves depends on the build and on the kernels
that are installed beside it (block tables need FlashAttention 3 or later in torch 2.13), so it is
tried on a few rows and held to attention that is written out. Knows no streams.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias, cast

import torch
from torch import Tensor

TOLERANCE = 0.02
"""Between the kernel's half-precision result and float32, where values are of size one."""

Heads = tuple[int, int, int, int]
"""Query heads, key heads, and the sizes of a key and of a value."""


Kernel: TypeAlias = Callable[..., Tensor]
"""`torch.nn.attention.varlen.varlen_attn`. Queries are aligned to the end of their keys. With
`block_table`, keys and values are pages `n_pages page_tokens n_kv_heads head_dim`, and `cu_seq_k`
is None."""


def installed_kernel() -> Kernel | None:
    """torch's own; None where this torch has none that takes block tables."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes_pages = "block_table" in inspect.signature(varlen_attn).parameters
    return cast(Kernel, varlen_attn) if takes_pages else None


@lru_cache(maxsize=64)
def fits(
    kernel: Kernel, heads: Heads, page_tokens: int | None, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the kernel runs on such rows here and gives what attention should.

    Args:
        page_tokens: of pages under a block table; None for rows side by side.
    """
    n_heads, n_kv_heads, key_dim, value_dim = heads
    if key_dim != value_dim:
        return False
    lengths, new, window, generator = (300, 70), (3, 70), 40, torch.Generator().manual_seed(0)
    if page_tokens is None:
        new = lengths
    draw = [
        [torch.randn(n, h, key_dim, generator=generator) for h in (n_heads, n_kv_heads, n_kv_heads)]
        for n in lengths
    ]
    texts = [[t.to(device, dtype) for t in text] for text in draw]
    query = torch.cat([text[0][-n:] for text, n in zip(texts, new, strict=True)])
    cu_seq_q = torch.tensor([0, new[0], sum(new)], dtype=torch.int32, device=device)
    paged: dict[str, Tensor] = {}
    if page_tokens is None:
        keys, values = (torch.cat([text[i] for text in texts]) for i in (1, 2))
    else:
        n_pages = [-(-n // page_tokens) for n in lengths]
        keys, values = (
            query.new_zeros(sum(n_pages), page_tokens, n_kv_heads, key_dim) for _ in range(2)
        )
        table = torch.zeros(2, max(n_pages), dtype=torch.int32)
        for i, (n, text) in enumerate(zip(n_pages, texts, strict=True)):
            # The second text has the first pages, from the last to the first.
            pages = torch.arange(n).flip(0) + (n_pages[1] if i == 0 else 0)
            table[i, :n] = pages
            for rows, whole in ((keys, text[1]), (values, text[2])):
                padded = whole.new_zeros(n * page_tokens, *whole.shape[1:])
                padded[: len(whole)] = whole
                rows[pages.to(device)] = padded.view(n, page_tokens, *whole.shape[1:])
        used = torch.tensor(lengths, dtype=torch.int32, device=device)
        paged = {"seqused_k": used, "block_table": table.to(device)}
    for first in (-1, window - 1):
        try:
            found = kernel(
                query,
                keys,
                values,
                cu_seq_q,
                cu_seq_q if page_tokens is None else None,
                max(new),
                max(lengths),
                scale=key_dim**-0.5,
                window_size=(first, 0),
                enable_gqa=n_heads != n_kv_heads,
                **paged,
            )
        except (RuntimeError, NotImplementedError, ValueError, TypeError, ImportError):
            return False
        seen = max(lengths) if first < 0 else window
        expected = torch.cat(
            [_written_out(text, n, seen) for text, n in zip(draw, new, strict=True)]
        )
        if not bool(((found.float().cpu() - expected).abs() <= TOLERANCE).all()):
            return False
    return True


def _written_out(text: list[Tensor], n_new: int, window: int) -> Tensor:
    """Attention of the last rows in float64, one head after the other."""
    query, key, value = (t.double() for t in text)
    group = query.shape[1] // key.shape[1]
    n = len(query)
    mask = torch.ones(n, n, dtype=torch.bool).tril_()
    if window < n:
        mask = mask.triu_(1 - window)
    out = torch.empty_like(query)
    for head in range(query.shape[1]):
        scores = query[:, head] @ key[:, head // group].T * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        out[:, head] = weights @ value[:, head // group]
    return out[-n_new:].float()
