"""Attention over a ragged batch: each segment of rows against its own stream's keys and values.

Hugging Face modelling code runs unchanged on `[1, total_tokens]`; this function stands in for its
attention through `transformers.AttentionInterface`, and as no mask function is registered beside
it, no dense mask is ever built. What it must know of the batch arrives as the keyword argument
`packed_plan` of the forward call. Knows no model family: window, scale and soft cap come with
the call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface

from sae_core.language_model.compiled_rows import attend_single_rows
from sae_core.language_model.span_attention import Heads, Terms, attend_span
from sae_core.language_model.span_workers import run_shares, shares_of
from sae_core.language_model.token_streams import KVStream, TokenStream

PACKED_ATTENTION = "sae_monitor_packed"
"""The name under which a model's config asks for this attention."""

WORTH_SHARING = 4
"""Single tokens for each thread from which on they are shared among threads."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where one segment lies in the batch, and how much of its stream came before."""

    stream: TokenStream
    start: int
    """First row of the batch."""
    stop: int
    """One past the last row."""
    past: int
    """Tokens of the stream before the first row: the first row's position."""


class PackedPlan:
    """One step's layout, handed through the model's forward call to every attention layer."""

    def __init__(
        self, spans: tuple[Span, ...], *, in_blocks: bool = False, compiled: bool = False
    ) -> None:
        """
        Args:
            in_blocks: Whether several rows of a stream attend as plain products.
            compiled: Whether single rows attend in compiled loops.
        """
        self.spans = spans
        self.heads: Heads | None = None
        """What the last layer to ask had."""
        self._in_blocks = in_blocks
        singles = _singles(spans)
        compiled_ones = [
            span
            for span in singles
            if compiled and isinstance(span.stream, KVStream) and span.stream.has_places
        ]
        self._rows = _Rows(compiled_ones) if compiled_ones else None
        shared = () if compiled else _worth_sharing(singles)
        apart = {*compiled_ones, *shared}
        self._one_by_one = tuple(span for span in spans if span not in apart)
        self._shares = shares_of(shared, lambda span: span.past + 1)

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "n_heads total_tokens head_dim"],
        key: Float[Tensor, "n_kv_heads total_tokens head_dim"],
        value: Float[Tensor, "n_kv_heads total_tokens head_dim"],
        terms: Terms,
    ) -> Float[Tensor, "total_tokens n_heads head_dim"]:
        """Writes new rows to their streams, and attends from each to what it sees."""
        n_heads, total, head_dim = query.shape
        n_kv_heads = len(key)
        group = n_heads // n_kv_heads
        grouped = query.view(n_kv_heads, group, total, head_dim)
        mixed = query.new_empty(total, n_kv_heads, group, value.shape[-1])
        by_head = mixed.permute(1, 2, 0, 3)
        self.heads = Heads(n_kv_heads, group, head_dim, value.shape[-1])

        def attend(span: Span) -> None:
            rows = slice(span.start, span.stop)
            assert isinstance(span.stream, KVStream)
            keys, values = span.stream.write(
                layer, span.past, key[:, rows], value[:, rows], terms.window
            )
            past = keys.shape[1] - (span.stop - span.start)
            by_head[:, :, rows] = attend_span(
                grouped[:, :, rows], keys, values, past, terms, in_blocks=self._in_blocks
            )

        for span in self._one_by_one:
            attend(span)
        if query.device.type == "cpu":
            run_shares(attend, self._shares)
        else:
            for share in self._shares:
                for span in share:
                    attend(span)
        mixed = mixed.view(total, n_heads, -1)
        if self._rows is not None:
            places = self._rows.places[:, layer]
            attend_single_rows(
                query, key, value, self._rows.rows, self._rows.past, places, terms, mixed
            )
        return mixed


class _Rows:
    """Single tokens of streams that hold others already, as compiled loops take them."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.rows = np.array([span.start for span in spans], np.int64)
        self.past = np.array([span.past for span in spans], np.int64)
        places = []
        for span in spans:
            assert isinstance(span.stream, KVStream)
            places.append(span.stream.places(span.past))
        self.places = np.stack(places)
        """[n_rows, n_layers, PLACE_FIELDS]"""


def _singles(spans: Sequence[Span]) -> list[Span]:
    """Spans of one token whose stream has no other: those of one stream follow each other."""
    seen = Counter(id(span.stream) for span in spans)
    return [s for s in spans if s.stop - s.start == 1 and seen[id(s.stream)] == 1]


def _worth_sharing(singles: Sequence[Span]) -> Sequence[Span]:
    """Single tokens that threads share where they are on the CPU; none where there are few."""
    threads = torch.get_num_threads()
    return singles if threads > 1 and len(singles) >= WORTH_SHARING * threads else ()


def register_packed_attention() -> str:
    """Makes the packed attention known to transformers, as often as called; returns its name."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    return PACKED_ATTENTION


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 n_heads total_tokens head_dim"],
    key: Float[Tensor, "1 n_kv_heads total_tokens head_dim"],
    value: Float[Tensor, "1 n_kv_heads total_tokens head_dim"],
    attention_mask: Tensor | None,
    *,
    packed_plan: PackedPlan,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_unused: object,
) -> tuple[Float[Tensor, "1 total_tokens n_heads head_dim"], None]:
    """Causal attention of each span against its stream, whose buffers take the new rows.

    Args:
        module: The attention layer; its `layer_idx` is read, and its `sliding_window` where the
            call has none (Qwen 2 MoE leaves the window to the mask, which is not built here).
        attention_mask: Always None; causality and window follow from positions.
        packed_plan: Passed to the model's forward call by `LanguageModel.step`.
        scaling: Factor on query-key products.
        sliding_window: A token sees itself and `sliding_window - 1` tokens before it.
        softcap: Scores become `softcap * tanh(score / softcap)` (Gemma 2).
    """
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if sliding_window is None:
        sliding_window = getattr(module, "sliding_window", None)
    terms = Terms(scaling, sliding_window, softcap)
    return packed_plan.attend(layer, query[0], key[0], value[0], terms)[None], None
