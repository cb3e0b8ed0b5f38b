"""The keys and values of token streams: what every kind offers, and the kind with own buffers."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from sae_core.language_model.pages import PagePool

GO_BACK_TOKENS = 128
"""How far a stream can go back over a sliding window without being computed anew: far more than
tokens change where a text grows, a quarter of Gemma 3's window."""

PLACE_FIELDS = 6
"""Of one stream's buffers in one layer: addresses of keys and values, numbers from one head's to
the next one's of both, the position that the first row has, and the window (0 for none)."""

_FIRST_CAPACITY = 64

_SPARE = 32
"""Rows behind the first text that a buffer has room for: most streams go on, token by token."""


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
        self._unwritten = set(range(n_layers))
        """Layers whose window is not known: rows that are pasted do not tell it."""
        self._starts = [0] * n_layers
        self._places: NDArray[np.int64] | None = None
        self._places_until = 0
        """Position of the first row that some layer's buffer has no room for."""
        self._sizes: tuple[int, int] | None = None

    @property
    def cache_bytes(self) -> int:
        """Memory held by the buffers, unused capacity included."""
        return self._measured()[0]

    @property
    def row_bytes(self) -> int:
        """Memory of one token's keys and values in all layers; 0 before the first."""
        return self._measured()[1]

    def _measured(self) -> tuple[int, int]:
        if self._sizes is None:  # asked for in every step, changed in few
            buffers = [t for t in (*self._keys, *self._values) if t is not None]
            row_bytes = sum(t.nbytes // t.shape[1] for t in buffers)
            self._sizes = sum(t.nbytes for t in buffers), row_bytes
        return self._sizes

    def release(self) -> None:
        """Forgets every token and gives the memory back."""
        self._length = 0
        self._keys = [None] * len(self._keys)
        self._values = [None] * len(self._values)
        self._starts = [0] * len(self._starts)
        self._places = self._sizes = None

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
            keys, values = self._room(layer, start, stop, kept[0], self._windows[layer])
            place = slice(start - self._starts[layer], stop - self._starts[layer])
            # Not joined first: glibc cannot use again what an aligned tensor of one size left.
            torch.cat([pair[0] for pair in kept], dim=1, out=keys[:, place])
            torch.cat([pair[1] for pair in kept], dim=1, out=values[:, place])
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
        self._unwritten.discard(layer)
        all_keys, all_values = self._room(layer, start, stop, (keys, values), window)
        rows = slice(start - self._starts[layer], stop - self._starts[layer])
        all_keys[:, rows], all_values[:, rows] = keys, values
        return all_keys[:, : rows.stop], all_values[:, : rows.stop]

    @property
    def has_places(self) -> bool:
        """Whether `places` can say where single rows go, and what they see."""
        return self._length > 0 and not self._unwritten

    def places(self, position: int) -> NDArray[np.int64]:
        """Where each layer's rows up to `position` are: [n_layers, PLACE_FIELDS].

        There is room for that one, whoever writes it. Layers that keep nothing have zeros.
        """
        if self._places is None or position >= self._places_until:
            self._places_until = sys.maxsize
            places = np.zeros((len(self._keys), PLACE_FIELDS), np.int64)
            for layer, pair in enumerate(zip(self._keys, self._values, strict=True)):
                if pair[0] is None or pair[1] is None:
                    continue
                window = self._windows[layer]
                keys, values = self._room(layer, position, position + 1, (pair[0], pair[1]), window)
                first = self._starts[layer]
                strides = keys.stride(0), values.stride(0)
                places[layer] = keys.data_ptr(), values.data_ptr(), *strides, first, window or 0
                self._places_until = min(self._places_until, first + keys.shape[1])
            self._places = places
        return self._places

    def _room(
        self, layer: int, start: int, stop: int, like: tuple[Tensor, Tensor], window: int | None
    ) -> tuple[Tensor, Tensor]:
        """One layer's buffers, with room for the rows from `start` to before `stop`."""
        first = self._starts[layer]
        all_keys, all_values = self._keys[layer], self._values[layer]
        self._windows[layer] = window
        if all_keys is None or all_values is None or stop - first > all_keys.shape[1]:
            capacity = max(_FIRST_CAPACITY, stop + _SPARE)
            if all_keys is not None:
                capacity = all_keys.shape[1] * 3 // 2
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
            self._places = self._sizes = None
        return all_keys, all_values


def _moved(buffer: Tensor | None, rows: slice, capacity: int, like: Tensor) -> Tensor:
    """A buffer with room for `capacity` rows that begins with `rows` of the old one."""
    n_heads, _, head_dim = like.shape
    moved = like.new_empty(n_heads, capacity, head_dim)
    if buffer is not None:
        moved[:, : rows.stop - rows.start] = buffer[:, rows]
    return moved
