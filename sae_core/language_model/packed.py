"""Attention over a ragged batch: each segment of rows against its own stream's keys and values.

Hugging Face modelling code runs unchanged on `[1, total_tokens]`; this function stands in for its
attention through `transformers.AttentionInterface`, and as no mask function is registered beside
it, no dense mask is ever built. What it must know of the batch arrives as the keyword argument
`packed_plan` of the forward call. Knows no model family: window, scale and soft cap come with
the call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface

from sae_core.language_model.pages import PagePool
from sae_core.language_model.span_attention import Heads, Terms, attend_span
from sae_core.language_model.span_workers import run_shares, shares_of

PACKED_ATTENTION = "sae_monitor_packed"
"""The name under which a model's config asks for this attention."""

GO_BACK_TOKENS = 128
"""How far a stream can go back over a sliding window without being computed anew: far more than
tokens change where a text grows, a quarter of Gemma 3's window."""

WORTH_SHARING = 4
"""Single tokens for each thread from which on they are shared among threads."""

_FIRST_CAPACITY = 64


class TokenRows(ABC):
    """Some tokens' keys and values, whatever becomes of their stream."""

    __slots__ = ()
    n_tokens: int

    @property
    @abstractmethod
    def n_bytes(self) -> int:
        """Memory held by these rows alone."""


class TokenStream(ABC):
    """The keys and values of one token stream: in buffers of its own, or in pages of a pool.

    Of a sliding-window layer it may drop what lies before the window, but for `GO_BACK_TOKENS`.
    Belongs to one user at a time; rows at and beyond `length` mean nothing.
    """

    def __init__(self) -> None:
        self._length = 0

    @property
    def pool(self) -> PagePool | None:
        """Whose pages it shares with other streams; None where it has buffers of its own."""
        return None

    @property
    def length(self) -> int:
        """Tokens that later tokens can attend to; moves only when a whole step has succeeded."""
        return self._length

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Memory held, unused capacity included."""

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """Memory of one token's keys and values in all layers; 0 before the first."""

    @abstractmethod
    def release(self) -> None:
        """Forgets every token and gives the memory back."""

    @abstractmethod
    def copy_rows(self, start: int, stop: int) -> TokenRows:
        """The rows of tokens `start` to `stop`, which lie within the last step or just before."""

    @abstractmethod
    def paste_rows(self, start: int, rows: Sequence[TokenRows]) -> None:
        """Puts rows one after the other at `start`; the stream ends behind the last.

        They are those of the tokens that the stream has read, or reads with them.
        """

    def truncate(self, n: int) -> None:
        """Forgets all but the first `n` tokens.

        Forgets every token where a window before `n` has been dropped: `length` says which.
        """
        if not 0 <= n <= self._length:
            raise ValueError(f"truncate: found {n}, expected 0 to the length {self._length}")
        if self._truncate(n):
            self._length = n
        else:
            self.release()

    def advance(self, n: int) -> None:
        """Makes `n` more written tokens part of the stream; called when a step has succeeded."""
        self._length += n

    @abstractmethod
    def _truncate(self, n: int) -> bool:
        """Whether the window before `n` is still there; lets go of what is not needed."""


@dataclass(frozen=True, slots=True)
class KVRows(TokenRows):
    """A copy of some tokens' keys and values."""

    n_tokens: int
    layers: tuple[tuple[Tensor, Tensor] | None, ...]
    """None where a layer keeps nothing."""

    @property
    def n_bytes(self) -> int:
        """Memory held."""
        return sum(t.nbytes for pair in self.layers if pair is not None for t in pair)


class KVStream(TokenStream):
    """The keys and values of one token stream, layer by layer, in buffers that grow.

    Where a sliding-window layer's buffer is full it drops what lies before its window.
    """

    def __init__(self, n_layers: int) -> None:
        super().__init__()
        self._keys: list[Tensor | None] = [None] * n_layers
        self._values: list[Tensor | None] = [None] * n_layers
        self._windows: list[int | None] = [None] * n_layers
        self._starts = [0] * n_layers

    @property
    def cache_bytes(self) -> int:
        """Memory held by the buffers, unused capacity included."""
        return sum(t.nbytes for t in (*self._keys, *self._values) if t is not None)

    @property
    def row_bytes(self) -> int:
        """Memory of one token's keys and values in all layers; 0 before the first."""
        buffers = (t for t in (*self._keys, *self._values) if t is not None)
        return sum(t.nbytes // t.shape[1] for t in buffers)

    def release(self) -> None:
        """Forgets every token and gives the memory back."""
        self._length = 0
        self._keys = [None] * len(self._keys)
        self._values = [None] * len(self._values)
        self._starts = [0] * len(self._starts)

    def copy_rows(self, start: int, stop: int) -> KVRows:
        """The rows of tokens `start` to `stop`, which lie within the last step or just before."""
        assert start >= max(self._starts), "rows that a sliding window has dropped"
        layers: list[tuple[Tensor, Tensor] | None] = []
        for keys, values, first in zip(self._keys, self._values, self._starts, strict=True):
            if keys is None or values is None:
                layers.append(None)
                continue
            rows = slice(start - first, stop - first)
            layers.append((keys[:, rows].clone(), values[:, rows].clone()))
        return KVRows(stop - start, tuple(layers))

    @torch.inference_mode()
    def paste_rows(self, start: int, rows: Sequence[TokenRows]) -> None:
        """Copies rows one after the other to `start`; the stream ends behind the last."""
        copies = [part for part in rows if isinstance(part, KVRows)]
        assert len(copies) == len(rows), "rows of another kind of stream"
        stop = start + sum(part.n_tokens for part in rows)
        for layer, pairs in enumerate(zip(*(part.layers for part in copies), strict=True)):
            kept = [pair for pair in pairs if pair is not None]
            if not kept:
                continue
            # Not joined first: glibc cannot use again what an aligned tensor of one size left.
            keys, values = self._room(layer, start, stop, kept[0], self._windows[layer])
            at = start - self._starts[layer]
            for some_keys, some_values in kept:
                place = slice(at, at + some_keys.shape[1])
                keys[:, place], values[:, place] = some_keys, some_values
                at = place.stop
        self._length = stop

    def _truncate(self, n: int) -> bool:
        return all(
            window is None or first <= max(0, n - window + 1)
            for window, first in zip(self._windows, self._starts, strict=True)
        )

    def read(
        self, layer: int, start: int, stop: int
    ) -> tuple[Float[Tensor, "n_kv_heads n head_dim"], Float[Tensor, "n_kv_heads n head_dim"]]:
        """Views of one layer's rows from `start` to before `stop`, which lie within a window of
        `length`."""
        keys, values, first = self._keys[layer], self._values[layer], self._starts[layer]
        assert keys is not None
        assert values is not None
        assert first <= start <= stop <= self._length, "rows that are not there"
        rows = slice(start - first, stop - first)
        return keys[:, rows], values[:, rows]

    def write(
        self,
        layer: int,
        start: int,
        keys: Float[Tensor, "n_kv_heads n head_dim"],
        values: Float[Tensor, "n_kv_heads n head_dim"],
        window: int | None = None,
    ) -> tuple[
        Float[Tensor, "n_kv_heads kept head_dim"], Float[Tensor, "n_kv_heads kept head_dim"]
    ]:
        """Puts one layer's new rows at `start`; returns views of that layer's rows up to them.

        Args:
            window: how many rows a token of this layer sees, its own included; None for all. The
                views may begin later than with the first token, but never within a window of
                `length` or `start`.
        """
        stop = start + keys.shape[1]
        all_keys, all_values = self._room(layer, start, stop, (keys, values), window)
        rows = slice(start - self._starts[layer], stop - self._starts[layer])
        all_keys[:, rows], all_values[:, rows] = keys, values
        return all_keys[:, : rows.stop], all_values[:, : rows.stop]

    def _room(
        self, layer: int, start: int, stop: int, like: tuple[Tensor, Tensor], window: int | None
    ) -> tuple[Tensor, Tensor]:
        """One layer's buffers, with room for the rows from `start` to before `stop`."""
        first = self._starts[layer]
        all_keys, all_values = self._keys[layer], self._values[layer]
        self._windows[layer] = window
        if all_keys is None or all_values is None or stop - first > all_keys.shape[1]:
            capacity = _FIRST_CAPACITY if all_keys is None else all_keys.shape[1] * 3 // 2
            oldest = first
            if window is not None:
                # A step that fails goes back to `length`: its window counts, not that of `start`.
                oldest = max(first, self._length - window - GO_BACK_TOKENS)
                capacity = min(capacity, (window + GO_BACK_TOKENS) * 3 // 2)
            capacity = max(capacity, stop - oldest)
            rows = slice(oldest - first, start - first)
            all_keys = _moved(all_keys, rows, capacity, like[0])
            all_values = _moved(all_values, rows, capacity, like[1])
            self._keys[layer], self._values[layer] = all_keys, all_values
            self._starts[layer] = oldest
        return all_keys, all_values


def _moved(buffer: Tensor | None, rows: slice, capacity: int, like: Tensor) -> Tensor:
    """A buffer with room for `capacity` rows that begins with `rows` of the old one."""
    n_heads, _, head_dim = like.shape
    moved = like.new_empty(n_heads, capacity, head_dim)
    if buffer is not None:
        moved[:, : rows.stop - rows.start] = buffer[:, rows]
    return moved


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

    def __init__(self, spans: tuple[Span, ...], *, in_blocks: bool = False) -> None:
        self.spans = spans
        self.heads: Heads | None = None
        """What the last layer to ask had."""
        self._in_blocks = in_blocks
        self._alone, self._shares = _shared_out(spans)

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

        shares = self._shares if query.device.type == "cpu" else ()
        for span in self._alone if shares else self.spans:
            attend(span)
        if shares:
            run_shares(attend, shares)
        return mixed.view(total, n_heads, -1)


def _shared_out(
    spans: Sequence[Span],
) -> tuple[tuple[Span, ...], tuple[tuple[Span, ...], ...]]:
    """The spans to go through one by one, and the single tokens of many streams, for threads.

    Spans of one stream follow each other, so theirs are not among the second.
    """
    seen = Counter(id(span.stream) for span in spans)
    singles = [s for s in spans if s.stop - s.start == 1 and seen[id(s.stream)] == 1]
    threads = torch.get_num_threads()
    if threads == 1 or len(singles) < WORTH_SHARING * threads:
        return tuple(spans), ()
    apart = set(singles)
    rest = tuple(span for span in spans if span not in apart)
    return rest, shares_of(singles, lambda span: span.past + 1)


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
