"""Pages of keys and values that many streams take from one store and may share.

A page has room for some consecutive tokens of one stream, in every layer that sees the same window;
page `i` of each of these layers belongs together. It goes back to the store when nobody holds it
any more. Knows no streams and no attention.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

KERNEL_PAGE_TOKENS = 256
"""What FlashAttention 2 asks of a page with its block tables; later ones take it too."""
PAGE_TOKENS = 32
"""Where no kernel reads the pages; what is left empty behind a stream's last token is small."""

_FIRST_PAGES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCounts:
    """Where the pages stand."""

    own: int
    """Held, and nobody else may hold them."""
    shared: int
    """Held by blocks of tokens seen before, and perhaps by several streams."""
    free: int
    """In memory, held by nobody."""


class Page:
    """One holder's claim or several holders' on a page; the last reference gives it back."""

    __slots__ = ("_group", "index", "sealed")

    def __init__(self, group: PageGroup, index: int) -> None:
        self._group = group
        self.index = index
        self.sealed = 0
        """Rows from the first that never change again, as others may read them."""

    def share(self, sealed: int) -> None:
        """From now on others rely on the first `sealed` rows."""
        self.sealed = max(self.sealed, sealed)
        self._group.shared.add(self.index)

    def __del__(self) -> None:
        self._group.take_back(self.index)


class PageGroup:
    """The pages of all layers that see the same window."""

    def __init__(self, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        """Keys and values of a layer, each `n_pages page_tokens n_kv_heads head_dim`."""
        self.shared: set[int] = set()
        self.n_pages = 0
        self._free: deque[int] = deque()  # pages come back from any thread

    @property
    def page_bytes(self) -> int:
        """Memory of one page in all layers."""
        return sum(t[0].nbytes for pair in self.layers.values() for t in pair)

    @property
    def n_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def add_layer(self, layer: int, like_keys: Tensor, like_values: Tensor) -> None:
        """Makes room for a layer seen for the first time; `like` are its rows, heads first."""
        if layer not in self.layers:
            n = self.n_pages = self.n_pages or _FIRST_PAGES
            if not self.layers:
                self._free.extend(range(n))
            keys, values = (
                like.new_empty(n, self.page_tokens, like.shape[0], like.shape[-1])
                for like in (like_keys, like_values)
            )
            self.layers[layer] = keys, values

    def take(self, n: int) -> list[Page]:
        """Pages whose rows mean nothing yet; grows the store by half where it has too few."""
        missing = n - len(self._free)
        if missing > 0:
            self._grow(max(self.n_pages + missing, self.n_pages * 3 // 2))
        return [Page(self, self._free.popleft()) for _ in range(n)]

    def copy(self, source: Page, n_rows: int) -> Page:
        """A page of one's own that begins with the first rows of another."""
        (page,) = self.take(1)
        for pair in self.layers.values():
            for tensor in pair:
                tensor[page.index, :n_rows] = tensor[source.index, :n_rows]
        return page

    def take_back(self, index: int) -> None:
        """A page that nobody holds any more; `Page` calls this."""
        self.shared.discard(index)
        self._free.append(index)

    def _grow(self, n_pages: int) -> None:
        # Layer by layer, so that at most one is in memory twice; if it fails, a retry goes on here.
        for layer, pair in self.layers.items():
            keys, values = (_grown(tensor, n_pages) for tensor in pair)
            self.layers[layer] = keys, values
        old, self.n_pages = self.n_pages, n_pages
        self._free.extend(range(old, n_pages))


def _grown(
    tensor: Float[Tensor, "old page_tokens n_kv_heads head_dim"], n_pages: int
) -> Float[Tensor, "n_pages page_tokens n_kv_heads head_dim"]:
    if len(tensor) >= n_pages:
        return tensor
    grown = tensor.new_empty(n_pages, *tensor.shape[1:])
    grown[: len(tensor)] = tensor
    return grown


class PagePool:
    """The pages of one model, a group for each window.

    Memory that was taken is kept for later pages; the cache bounds how many are held.
    """

    def __init__(self, page_tokens: int = PAGE_TOKENS) -> None:
        self.page_tokens = page_tokens
        self.groups: dict[int | None, PageGroup] = {}

    def group(self, window: int | None) -> PageGroup:
        """The group of a window, None for layers that see all."""
        return self.groups.setdefault(window, PageGroup(self.page_tokens))

    @property
    def n_bytes(self) -> int:
        """Memory of the pages that somebody holds, each once."""
        return sum((g.n_pages - g.n_free) * g.page_bytes for g in self.groups.values())

    @property
    def shared_bytes(self) -> int:
        """Of these, memory of pages that blocks may hold."""
        return sum(len(g.shared) * g.page_bytes for g in self.groups.values())

    @property
    def row_bytes(self) -> int:
        """Memory of one token in all layers; 0 before the first."""
        return sum(g.page_bytes // g.page_tokens for g in self.groups.values())

    def counts(self) -> PageCounts:
        """For metrics."""
        groups = self.groups.values()
        n_held = sum(g.n_pages - g.n_free for g in groups)
        n_shared = sum(len(g.shared) for g in groups)
        return PageCounts(
            own=n_held - n_shared, shared=n_shared, free=sum(g.n_free for g in groups)
        )


def pool_for(device: torch.device, dtype: torch.dtype) -> PagePool | None:
    """Pages on CUDA; None elsewhere, where streams do better with buffers of their own.

    A CPU's attention reads one tensor a stream, so that pages would be gathered in every layer of
    every step (benchmarks/LOG.md, 2026-11-24, has what that costs).
    """
    if device.type != "cuda":
        return None
    has_kernel = dtype in (torch.bfloat16, torch.float16)
    return PagePool(KERNEL_PAGE_TOKENS if has_kernel else PAGE_TOKENS)
