"""Streams in pages: who holds which page, when one is copied, and which kernel reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_core.hook_points import HookPoint
from sae_core.language_model import token_streams
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import LanguageModel, Segment
from sae_core.language_model.paged import PagedStream
from sae_core.language_model.pages import PageCounts, PageGroup, PagePool, pool_for
from sae_core.language_model.token_streams import KVStream
from sae_core.language_model.varlen import fits, installed_kernel
from sae_core.testing.attention import reference_kernel

HOOK_POINT = HookPoint(2, "resid_post")
PAGE_TOKENS = 16
CPU = torch.device("cpu")
FolderOf = Callable[[str], Path]


class CountingKernel:
    """The reference, and whether each call had a block table."""

    def __init__(self) -> None:
        self.calls: list[bool] = []

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        self.calls.append("block_table" in options)
        return reference_kernel(*args, **options)


def paged_model(folder: Path, kernel: Any = None) -> LanguageModel:
    model = load_language_model(folder, [HOOK_POINT])
    model.pool, model.kernel = PagePool(PAGE_TOKENS), kernel
    return model


def ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 300, n).tolist()


def feed(model: LanguageModel, stream: Any, token_ids: Sequence[int]) -> Tensor:
    return model.step([Segment(stream, token_ids)])[HOOK_POINT]


def whole(folder: Path, token_ids: Sequence[int]) -> Tensor:
    """In buffers of a stream's own, at once."""
    model = load_language_model(folder, [HOOK_POINT])
    return feed(model, model.open_stream(), token_ids)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def held(model: LanguageModel) -> int:
    assert model.pool is not None
    counts = model.pool.counts()
    return counts.own + counts.shared


def test_pages_are_for_cuda_and_as_large_as_its_kernel_wants() -> None:
    assert pool_for(CPU, torch.bfloat16) is None
    sizes = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pool = pool_for(torch.device("cuda"), dtype)
        assert pool is not None
        sizes[dtype] = pool.page_tokens
    assert sizes == {torch.float32: 32, torch.bfloat16: 256, torch.float16: 256}


def test_a_model_on_the_cpu_has_buffers(folder_of: FolderOf) -> None:
    model = load_language_model(folder_of("llama"), [HOOK_POINT])
    assert isinstance(model.open_stream(), KVStream)


@pytest.mark.parametrize("page_tokens", [None, 32, 256])
@pytest.mark.parametrize("heads", [(4, 2, 8, 8), (3, 3, 16, 16), (8, 1, 32, 32)])
def test_a_kernel_that_does_what_it_should_fits(
    heads: tuple[int, int, int, int], page_tokens: int | None
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert fits(reference_kernel, heads, page_tokens, dtype, CPU)


def test_a_kernel_is_not_used_where_it_refuses_or_is_wrong() -> None:
    def refuses(*args: Any, **options: Any) -> Tensor:
        raise RuntimeError("no kernel image is available")

    def sees_no_window(*args: Any, **options: Any) -> Tensor:
        return reference_kernel(*args, **options | {"window_size": (-1, 0)})

    def sees_one_more(*args: Any, **options: Any) -> Tensor:
        left, right = options["window_size"]
        return reference_kernel(*args, **options | {"window_size": (left, right + 1)})

    def takes_pages_in_order(*args: Any, **options: Any) -> Tensor:
        table = options["block_table"]
        in_order = torch.arange(table.numel(), dtype=table.dtype).view_as(table)
        in_order %= len(args[1])
        return reference_kernel(*args, **options | {"block_table": in_order})

    kernels: list[Any] = [refuses, sees_no_window, sees_one_more, takes_pages_in_order]
    for kernel in kernels:
        assert not fits(kernel, (4, 2, 8, 8), 32, torch.float32, CPU)
    assert not fits(reference_kernel, (4, 2, 8, 16), 32, torch.float32, CPU)


def test_torchs_kernel_is_found_and_not_used_on_the_cpu() -> None:
    kernel = installed_kernel()
    if kernel is None:
        pytest.skip("this torch has no varlen_attn with block tables")
    assert not fits(kernel, (4, 2, 8, 8), 256, torch.bfloat16, CPU)


def test_a_layer_is_one_call_with_block_tables_where_there_is_a_past(folder_of: FolderOf) -> None:
    kernel = CountingKernel()
    model = paged_model(folder_of("gemma3"), kernel)
    first, second = model.open_stream(), model.open_stream()
    feed(model, first, [1])
    kernel.calls.clear()
    model.step([Segment(first, ids(30)), Segment(second, ids(40))])
    assert kernel.calls[-3:] == [True] * 3
    kernel.calls.clear()
    model.step([Segment(model.open_stream(), ids(30)), Segment(model.open_stream(), ids(40))])
    model.step([Segment(first, [7]), Segment(second, [8])])
    assert kernel.calls == [False] * 3 + [True] * 3


def test_a_soft_cap_is_left_to_what_knows_it(folder_of: FolderOf) -> None:
    kernel = CountingKernel()
    model = paged_model(folder_of("gemma2"), kernel)
    assert_same(feed(model, model.open_stream(), ids(50)), whole(folder_of("gemma2"), ids(50)))
    assert kernel.calls == []


@pytest.mark.parametrize("kernel", [None, reference_kernel])
def test_one_stream_may_have_several_segments_in_a_step(folder_of: FolderOf, kernel: Any) -> None:
    model, text = paged_model(folder_of("gemma3"), kernel), ids(60)
    stream, other = model.open_stream(), model.open_stream()
    found = model.step(
        [Segment(stream, text[:21]), Segment(other, text), Segment(stream, text[21:])]
    )[HOOK_POINT]
    expected = whole(folder_of("gemma3"), text)
    assert_same(torch.cat([found[:21], found[-39:]]), expected)
    assert_same(found[21:81], expected)


def test_texts_that_begin_alike_hold_the_same_pages(folder_of: FolderOf) -> None:
    model, text = paged_model(folder_of("llama")), ids(40)
    first, second = model.open_stream(), model.open_stream()
    feed(model, first, text)
    rows = [first.copy_rows(0, 32), first.copy_rows(32, 40)]
    assert (held(model), rows[0].n_bytes) == (3, 0)
    second.paste_rows(0, rows)
    assert (held(model), second.length) == (3, 40)
    assert second.cache_bytes == first.cache_bytes
    # Both go on: each needs its own end of the page that they share.
    ends = ids(20, 1), ids(20, 2)
    for stream, end in zip((first, second), ends, strict=True):
        feed(model, stream, end[:10])
    assert held(model) == 2 + 1 + 2 * 2
    for stream, end in zip((first, second), ends, strict=True):
        expected = whole(folder_of("llama"), text + end)
        assert_same(feed(model, stream, end[10:]), expected[-10:])
    third = model.open_stream()
    third.paste_rows(0, rows)
    assert_same(feed(model, third, [5]), whole(folder_of("llama"), [*text, 5])[-1:])


def test_a_text_that_goes_back_leaves_what_others_hold_as_it_was(folder_of: FolderOf) -> None:
    model, text = paged_model(folder_of("llama")), ids(45)
    first, second = model.open_stream(), model.open_stream()
    feed(model, first, text)
    rows = first.copy_rows(0, 32)
    first.truncate(20)
    feed(model, first, ids(30, 1))
    second.paste_rows(0, [rows])
    assert_same(feed(model, second, text[32:]), whole(folder_of("llama"), text)[32:])


def test_pages_go_back_with_the_last_who_holds_them(folder_of: FolderOf) -> None:
    model = paged_model(folder_of("gemma3"))
    stream = model.open_stream()
    feed(model, stream, ids(64))
    rows = stream.copy_rows(32, 64)
    assert model.pool is not None
    before = model.pool.counts()
    assert before == PageCounts(own=2 + 2, shared=2 + 2, free=before.free)
    stream.release()
    assert model.pool.counts() == PageCounts(own=0, shared=4, free=before.free + 4)
    assert model.pool.shared_bytes == model.pool.n_bytes > 0
    del rows
    assert model.pool.counts() == PageCounts(own=0, shared=0, free=before.free + 8)
    assert model.pool.n_bytes == 0


def test_many_streams_leave_no_page_behind(folder_of: FolderOf) -> None:
    model = paged_model(folder_of("gemma3"))
    for turn in range(16):
        segments = [Segment(model.open_stream(), ids(3 + i, turn)) for i in range(25)]
        model.step(segments)
        if turn % 2:
            for segment in segments:
                segment.stream.release()
    del segments
    assert model.pool is not None
    counts = model.pool.counts()
    assert (counts.own, counts.shared) == (0, 0)
    # Two turns at most were in memory at a time.
    assert counts.free <= 2 * 2 * sum(-(-(3 + i) // PAGE_TOKENS) for i in range(25)) * 3 // 2


def test_a_window_bounds_the_pages_of_a_long_stream(
    folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_streams, "GO_BACK_TOKENS", 16)
    model, text = paged_model(folder_of("gemma3")), ids(300)
    stream = model.open_stream()
    found = [feed(model, stream, text[i : i + 10]) for i in range(0, 300, 10)]
    assert_same(torch.cat(found), whole(folder_of("gemma3"), text))
    assert isinstance(stream, PagedStream)
    first, pages = stream.table(8)
    assert len(pages) <= 4
    assert first <= 300 - 10 - 8 - 16 < first + PAGE_TOKENS
    assert len(stream.table(None)[1]) == -(-300 // PAGE_TOKENS)
    stream.truncate(280)
    assert_same(feed(model, stream, text[280:]), torch.cat(found)[280:])
    stream.truncate(200)
    assert (stream.length, stream.cache_bytes) == (0, 0)


def test_a_store_that_cannot_grow_stays_as_it_was_and_can_be_tried_again(
    folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = paged_model(folder_of("llama")), ids(400)
    stream = model.open_stream()
    feed(model, stream, text[:20])
    assert model.pool is not None
    before, grow = model.pool.counts(), PageGroup._grow

    def grows_one_layer(self: PageGroup, n_pages: int) -> None:
        layers = dict(self.layers)
        last = max(self.layers)
        self.layers = {i: pair for i, pair in layers.items() if i != last}
        old, free = self.n_pages, list(self._free)
        grow(self, n_pages)
        self.layers = {**self.layers, last: layers[last]}
        self.n_pages = old
        self._free.clear()
        self._free.extend(free)
        raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(PageGroup, "_grow", grows_one_layer)
        with pytest.raises(torch.OutOfMemoryError):
            feed(model, stream, text[20:])
    assert (stream.length, model.pool.counts()) == (20, before)
    assert_same(feed(model, stream, text[20:]), whole(folder_of("llama"), text)[20:])
