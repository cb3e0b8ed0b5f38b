"""Streams whose keys and values lie in shared pages, and attention over them.

For CUDA, where a kernel follows block tables; see `packed` for buffers and for what both keep to.
Every page lies where its tokens are in the text: row `p` of a stream is row `p % page_tokens` of
its page, so that texts that begin alike hold the same pages. A page that others rely on is copied
before it is written to. Of a window's layers a stream holds the pages that the window reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_core.language_model import token_streams
from sae_core.language_model.packed import PackedPlan, Span
from sae_core.language_model.pages import Page, PageGroup, PagePool
from sae_core.language_model.span_attention import Terms, attend_span
from sae_core.language_model.token_streams import TokenRows, TokenStream
from sae_core.language_model.varlen import Kernel, fits


@dataclass(frozen=True, slots=True)
class PagedRows(TokenRows):
    """Some tokens' keys and values, held in the pages that they were written to."""

    n_tokens: int
    pages: dict[int | None, dict[int, Page]]
    """By window, by the page's place in the text."""

    @property
    def n_bytes(self) -> int:
        """None of its own: the pool counts each page once."""
        return 0


@dataclass(slots=True)
class _Table:
    """The pages of one stream in one group, from place `first` of the text on."""

    first: int = 0
    pages: list[Page] = field(default_factory=list)


class PagedStream(TokenStream):
    """The keys and values of one token stream, in pages of a pool."""

    def __init__(self, pool: PagePool) -> None:
        super().__init__()
        self._pool = pool
        self._tables: dict[int | None, _Table] = {}

    @property
    def pool(self) -> PagePool:
        """Where its pages are from."""
        return self._pool

    @property
    def cache_bytes(self) -> int:
        """Memory of its pages, those that others hold too included."""
        groups = self.pool.groups
        return sum(len(t.pages) * groups[w].page_bytes for w, t in self._tables.items())

    @property
    def row_bytes(self) -> int:
        """Memory of one token's keys and values in all layers; 0 before the first of any stream."""
        return self.pool.row_bytes

    def release(self) -> None:
        """Forgets every token and lets go of its pages."""
        self._length = 0
        self._tables = {}

    def copy_rows(self, start: int, stop: int) -> PagedRows:
        """Holds the rows of tokens `start` to `stop`; nothing is copied."""
        n = self.pool.page_tokens
        held: dict[int | None, dict[int, Page]] = {}
        for window, table in self._tables.items():
            assert start >= table.first * n, "rows that a sliding window has dropped"
            held[window] = {}
            for place in range(start // n, (stop - 1) // n + 1):
                page = held[window][place] = table.pages[place - table.first]
                page.share(min(stop - place * n, n))
        return PagedRows(stop - start, held)

    def paste_rows(self, start: int, rows: Sequence[TokenRows]) -> None:
        """Takes over the pages of rows that follow each other from `start`, and ends behind them.

        The page that holds a block's last row holds all before it, as whoever filed the block had
        read the same text.
        """
        n = self.pool.page_tokens
        for part in rows:
            assert isinstance(part, PagedRows)
            for window, pages in part.pages.items():
                table = self._tables.setdefault(window, _Table())
                for place, page in pages.items():
                    page.share(n)  # two who go on behind its last row must not meet there
                    del table.pages[place - table.first :]
                    table.pages.append(page)
        self._length = start + sum(part.n_tokens for part in rows)

    def reserve(self, group: PageGroup, window: int | None, start: int, stop: int) -> None:
        """Sees to pages of one's own for new rows; lets go of those before the window."""
        n = group.page_tokens
        table = self._tables.setdefault(window, _Table())
        if window is not None:
            # A step that fails goes back to `length`: its window counts, not that of `start`.
            oldest = max(0, self._length - window - token_streams.GO_BACK_TOKENS) // n
            del table.pages[: max(0, oldest - table.first)]
            table.first = max(table.first, oldest)
        place = start // n - table.first
        if place < len(table.pages) and table.pages[place].sealed > start % n:
            table.pages[place] = group.copy(table.pages[place], start % n)
        missing = (stop - 1) // n + 1 - table.first - len(table.pages)
        table.pages += group.take(max(0, missing))

    def table(self, window: int | None) -> tuple[int, list[int]]:
        """The token that its pages begin with, and where they are."""
        table = self._tables[window]
        return table.first * self.pool.page_tokens, [page.index for page in table.pages]

    def _truncate(self, n: int) -> bool:
        size = self.pool.page_tokens
        for window, table in self._tables.items():
            if window is not None and table.first * size > max(0, n - window + 1):
                return False
            del table.pages[max(0, -(-n // size) - table.first) :]
        return True


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where one step's rows lie in the pages of one group."""

    slots: Int[Tensor, " total_tokens"]
    """Row of each new token, with the pages one after the other."""
    block_table: Int[Tensor, "n_spans max_pages"]
    n_keys: list[int]
    """Per span, keys from its first page up to its last row."""
    used_k: Int[Tensor, " n_spans"]
    """`n_keys` on the device."""


class PagedPlan(PackedPlan):
    """One step over streams of a pool; a layer is one call of the kernel where it fits.

    Args:
        kernel: of the semantics of `torch.nn.attention.varlen.varlen_attn`; None where there is
            none.
    """

    def __init__(self, spans: Sequence[Span], pool: PagePool, kernel: Kernel | None) -> None:
        super().__init__(tuple(spans))
        self._pool = pool
        self._kernel = kernel
        self._layouts: dict[int | None, _Layout] = {}

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "n_heads total_tokens head_dim"],
        key: Float[Tensor, "n_kv_heads total_tokens head_dim"],
        value: Float[Tensor, "n_kv_heads total_tokens head_dim"],
        terms: Terms,
    ) -> Float[Tensor, "total_tokens n_heads head_dim"]:
        """As `PackedPlan.attend`."""
        group = self._pool.group(terms.window)
        group.add_layer(layer, key, value)
        layout = self._layouts.get(terms.window)
        if layout is None:
            layout = self._layouts[terms.window] = self._lay_out(group, terms.window, key.device)
        rows = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        pages = group.layers[layer]
        for page_rows, new in zip(pages, rows[1:], strict=True):
            page_rows.flatten(0, 1).index_copy_(0, layout.slots, new)
        if self._kernel is not None and terms.softcap is None:
            heads = len(query), len(key), query.shape[-1], value.shape[-1]
            size = group.page_tokens
            if self._is_fresh and fits(self._kernel, heads, None, query.dtype, query.device):
                return self._run(self._kernel, *rows, self._cu_seq_q, terms, max(self._n_rows))
            if fits(self._kernel, heads, size, query.dtype, query.device):
                paged = {"seqused_k": layout.used_k, "block_table": layout.block_table}
                longest = max(layout.n_keys)
                return self._run(self._kernel, rows[0], *pages, None, terms, longest, **paged)
        return self._gather(layout, query, pages, terms)

    @cached_property
    def _n_rows(self) -> list[int]:
        return [span.stop - span.start for span in self.spans]

    @cached_property
    def _is_fresh(self) -> bool:
        """Whether the step's own rows are all there is to see."""
        return all(span.past == 0 for span in self.spans)

    @cached_property
    def _cu_seq_q(self) -> Int[Tensor, " n_spans_and_one"]:
        stops = [0, *(span.stop for span in self.spans)]
        assert all(a < b for a, b in pairwise(stops))
        return torch.tensor(stops, dtype=torch.int32, device=self._device)

    def _lay_out(self, group: PageGroup, window: int | None, device: torch.device) -> _Layout:
        self._device = device
        size = group.page_tokens
        streams = [span.stream for span in self.spans]
        tables, n_keys, slots = [], [], []
        for span, stream in zip(self.spans, streams, strict=True):
            assert isinstance(stream, PagedStream)
            stream.reserve(group, window, span.past, span.past + span.stop - span.start)
        for span, stream in zip(self.spans, streams, strict=True):
            assert isinstance(stream, PagedStream)
            first, pages = stream.table(window)
            stop = span.past + span.stop - span.start - first
            tables.append(torch.tensor(pages[: -(-stop // size)], dtype=torch.int32))
            n_keys.append(stop)
            at = torch.arange(span.past - first, stop)
            slots.append(tables[-1].long()[at // size] * size + at % size)
        return _Layout(
            torch.cat(slots).to(device),
            torch.nn.utils.rnn.pad_sequence(tables, batch_first=True).to(device),
            n_keys,
            torch.tensor(n_keys, dtype=torch.int32, device=device),
        )

    def _run(
        self,
        kernel: Kernel,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        cu_seq_k: Tensor | None,
        terms: Terms,
        max_k: int,
        **paged: Tensor,
    ) -> Tensor:
        return kernel(
            query.contiguous(),
            keys if paged else keys.contiguous(),
            values if paged else values.contiguous(),
            self._cu_seq_q,
            cu_seq_k,
            max(self._n_rows),
            max_k,
            scale=terms.scaling,
            window_size=(-1 if terms.window is None else terms.window - 1, 0),
            enable_gqa=query.shape[1] != keys.shape[-2],
            **paged,
        )

    def _gather(
        self, layout: _Layout, query: Tensor, pages: tuple[Tensor, Tensor], terms: Terms
    ) -> Float[Tensor, "total_tokens n_heads head_dim"]:
        """Each span's pages side by side, then as for buffers; exact wherever the kernel is not."""
        n_heads, total, head_dim = query.shape
        n_kv_heads, size = pages[0].shape[2], pages[0].shape[1]
        grouped = query.reshape(n_kv_heads, n_heads // n_kv_heads, total, head_dim)
        mixed = query.new_empty(total, n_heads, pages[1].shape[-1])
        by_head = mixed.view(total, n_kv_heads, -1, mixed.shape[-1]).permute(1, 2, 0, 3)
        for index, (span, n_keys) in enumerate(zip(self.spans, layout.n_keys, strict=True)):
            here = layout.block_table[index, : -(-n_keys // size)]
            keys, values = (t[here].flatten(0, 1)[:n_keys].transpose(0, 1) for t in pages)
            rows = slice(span.start, span.stop)
            past = n_keys - (span.stop - span.start)
            by_head[:, :, rows] = attend_span(grouped[:, :, rows], keys, values, past, terms)
        return mixed
