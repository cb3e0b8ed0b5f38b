"""Single tokens of many streams, shared among threads: the same numbers; errors come out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from sae_core.hook_points import HookPoint
from sae_core.language_model import packed
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import LanguageModel, Segment
from sae_core.language_model.packed import Span
from sae_core.language_model.span_attention import Terms
from sae_core.language_model.span_workers import run_ranges, run_shares, shares_of
from sae_core.language_model.token_streams import KVStream, TokenStream

LAST = HookPoint(2, "resid_post")


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def spans(n: int, *, past: int = 5) -> list[Span]:
    return [Span(KVStream(1), i, i + 1, past) for i in range(n)]


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama", "qwen3_moe"])
def test_shared_tokens_have_the_numbers_of_tokens_one_by_one(
    family: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_language_model(folder_of(family), [LAST])

    def scored() -> list[torch.Tensor]:
        streams = [model.open_stream() for _ in range(20)]
        texts = [list(range(10 + i, 30 + 2 * i)) for i in range(20)]
        model.step([Segment(s, text) for s, text in zip(streams, texts, strict=True)])
        prompt = Segment(model.open_stream(), [7, 8, 9])
        rounds = [
            model.step([prompt, *(Segment(s, [40 + r]) for s in streams)])[LAST] for r in range(3)
        ]
        assert all(s.length == len(t) + 3 for s, t in zip(streams, texts, strict=True))
        return rounds

    shared = scored()
    monkeypatch.setattr(packed, "WORTH_SHARING", 1000)
    for found, expected in zip(shared, scored(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_stream_with_two_tokens_keeps_their_order(
    folder_of: Callable[[str], Path],
) -> None:
    model = load_language_model(folder_of("llama"), [LAST])
    others = [model.open_stream() for _ in range(20)]
    stream, whole = model.open_stream(), model.open_stream()
    segments = [Segment(s, [3]) for s in others]
    step = model.step([Segment(stream, [5]), *segments, Segment(stream, [6])])[LAST]
    expected = model.step([Segment(whole, [5, 6])])[LAST]
    torch.testing.assert_close(step[[0, -1]], expected, rtol=1e-5, atol=1e-5)


def test_a_plan_shares_what_is_worth_it_and_loses_nothing() -> None:
    few, many = (tuple(spans(packed.WORTH_SHARING * 3 - n)) for n in (1, 0))
    plan = packed.PackedPlan(few)
    assert (plan._one_by_one, plan._shares) == (few, ())
    plan = packed.PackedPlan((Span(KVStream(1), 50, 60, 0), *many))
    assert [(span.start, span.stop) for span in plan._one_by_one] == [(50, 60)]
    assert [span for share in plan._shares for span in share] == list(many)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_only_rows_on_the_cpu_are_shared(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[Span] = []

    def share(work: Callable[[Span], None], shares: Sequence[Sequence[Span]]) -> None:
        shared.extend(span for part in shares for span in part)
        run_shares(work, shares)

    monkeypatch.setattr(packed, "run_shares", share)
    many = spans(packed.WORTH_SHARING * 3, past=0)
    rows = [torch.randn(2, len(many), 8, device=device) for _ in range(3)]
    packed.PackedPlan(tuple(many)).attend(0, *rows, Terms(1.0, None, None))
    assert shared == (many if device == "cpu" else [])
    assert all(span.stream.cache_bytes > 0 for span in many)


def test_ranges_run_all_and_raise_what_one_raised() -> None:
    done: list[tuple[int, int]] = []
    run_ranges(lambda start, stop: done.append((start, stop)), [0, 0, 4, 4, 7, 9])
    assert sorted(done) == [(0, 4), (4, 7), (7, 9)]
    run_ranges(lambda start, stop: done.append((start, stop)), [3, 3])
    assert len(done) == 3

    def fails_from(first: int) -> None:
        done.clear()

        def work(start: int, stop: int) -> None:
            done.append((start, stop))
            if start >= first:
                raise MemoryError("no room")

        with pytest.raises(MemoryError, match="no room"):
            run_ranges(work, [0, 4, 7])
        assert sorted(done) == [(0, 4), (4, 7)]

    fails_from(0)
    fails_from(4)


def test_shares_cost_alike() -> None:
    costs = [100, 1, 1, 1, 97, 50, 50]
    assert shares_of(costs, lambda c: c) == ((100,), (1, 1, 1, 97), (50, 50))
    assert shares_of([0, 0], lambda c: c) == ((0, 0),)


def test_an_error_ends_the_step_and_no_stream_grows(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_language_model(folder_of("llama"), [LAST])
    streams = [model.open_stream() for _ in range(30)]
    bad = streams[17]

    def write(*args: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(bad, "write", write, raising=False)
    with pytest.raises(MemoryError, match="no room"):
        step(model, streams)
    assert {s.length for s in streams} == {0}
    monkeypatch.undo()
    torch.set_num_threads(3)
    step(model, streams)
    assert {s.length for s in streams} == {1}


def step(model: LanguageModel, streams: list[TokenStream]) -> None:
    model.step([Segment(s, [4]) for s in streams])


def test_threads_to_come_keep_torchs_threads() -> None:
    run_shares(lambda item: None, [[1], [2], [3]])
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [3]
    assert torch.get_num_threads() == 3


def test_fewer_shares_take_the_same_threads() -> None:
    run_shares(lambda item: None, [[1], [2], [3]])
    before = threading.active_count()
    run_shares(lambda item: None, [[1], [2]])
    assert threading.active_count() == before


def test_work_runs_in_threads_of_one_torch_thread() -> None:
    found: list[int] = []
    run_shares(lambda item: found.append(torch.get_num_threads()), [[1], [2], [3]])
    assert found == [1, 1, 1]
