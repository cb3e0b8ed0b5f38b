"""What the cache keeps, drops and reuses; `test_cache_properties` has the interleavings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from sae_core.heads import Cluster, ClusterHeads, LatentTerm
from sae_core.hook_points import HookPoint
from sae_core.language_model import token_streams
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import Segment
from sae_core.language_model.token_streams import KVRows, KVStream
from sae_core.language_model.tokenizer import load_tokenizer
from sae_core.prefix_blocks import BLOCK_TOKENS, PrefixBlocks, extend_chain
from sae_core.score_cache import OwnForward, ScoreCache, ScoredStream
from sae_core.scorer import Scorer, SegmentScores, StepScores
from sae_core.testing.models import D_MODEL, tiny_model_folder
from sae_core.testing.planted import planted_sae

LATE = HookPoint(2, "resid_post")
FAMILIES = ("gpt2", "llama", "mistral", "gemma2", "gemma3", "qwen3_moe")
CHUNK = 13
N_IDS = 300
"""Token ids that the tests use; every tiny vocabulary has more."""


def make_scorer(folder: Path) -> Scorer:
    sae = planted_sae(D_MODEL, 24, architecture="relu", seed=1)
    rng = np.random.default_rng(0)
    cluster = Cluster(
        id="x",
        latents=tuple(
            LatentTerm(sae="s", latent_id=i, weight=float(w), scale=1.0, label="")
            for i, w in enumerate(rng.normal(size=6))
        ),
        dense_weight=rng.normal(size=D_MODEL).astype(np.float32),
        dense_hook_point=str(LATE),
    )
    model = load_language_model(folder, [LATE])
    heads = ClusterHeads([cluster], ["s"])
    return Scorer(model, load_tokenizer(folder), {"s": (LATE, sae)}, heads)


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scorer]:
    return {
        family: make_scorer(tiny_model_folder(tmp_path_factory.mktemp(family) / "m", family))
        for family in FAMILIES
    }


@pytest.fixture
def scorer(scorers: dict[str, Scorer]) -> Scorer:
    return scorers["gemma3"]


def make_cache(
    scorer: Scorer, max_tokens: int, *, key: bytes | None = None, blocks: PrefixBlocks | None = None
) -> ScoreCache:
    """With room for about so many tokens."""
    return ScoreCache(scorer.open_stream, max_tokens * row_bytes(scorer), key=key, blocks=blocks)


def row_bytes(scorer: Scorer) -> int:
    kv = scorer.open_stream()
    Scorer.step(scorer, [Segment(kv, [1])])
    return kv.row_bytes


def feed(
    cache: ScoreCache, scorer: Scorer, stream: ScoredStream, ids: Sequence[int]
) -> SegmentScores:
    continuation = cache.begin(OwnForward(stream, ids))
    continuation.restore()
    while continuation.n_to_run:
        segment = continuation.part(min(CHUNK, continuation.n_to_run))
        cache.take(continuation, segment, scorer.step([segment]).segments[0])
        if continuation.n_to_run:
            cache.settle([stream])
    cache.end(continuation)
    cache.settle([stream])
    return continuation.scores()


def at_once(scorer: Scorer, ids: Sequence[int]) -> SegmentScores:
    return Scorer.step(scorer, [Segment(scorer.open_stream(), ids)]).segments[0]


def assert_same(found: SegmentScores, expected: SegmentScores) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        # A logit is a sum of terms of either sign: its rounding is relative to the large ones.
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def random_ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, N_IDS, n).tolist()


def test_the_stream_unused_for_longest_goes_first(scorer: Scorer) -> None:
    cache = make_cache(scorer, 3 * 64)  # a stream's first buffers have room for 64 tokens
    streams = [cache.open_stream() for _ in range(4)]
    for stream in streams[:3]:
        feed(cache, scorer, stream, random_ids(20))
    feed(cache, scorer, streams[0], [1])
    assert cache.counts().evicted_for_memory == 0
    feed(cache, scorer, streams[3], random_ids(20))
    assert [stream.kv.length for stream in streams] == [21, 0, 20, 20]
    assert [stream.length for stream in streams] == [21, 20, 20, 20]
    counts = cache.counts()
    assert (counts.sessions, counts.evicted_for_memory, counts.recomputed_tokens) == (4, 1, 0)
    feed(cache, scorer, streams[1], [5])
    assert (streams[1].kv.length, cache.counts().recomputed_tokens) == (21, 20)


def test_a_stream_with_tokens_on_their_way_is_not_evicted(scorer: Scorer) -> None:
    cache = make_cache(scorer, 0)
    busy, other = cache.open_stream(), cache.open_stream()
    ids = random_ids(30)
    continuation = cache.begin(OwnForward(busy, ids))
    segment = continuation.part(10)
    cache.take(continuation, segment, scorer.step([segment]).segments[0])
    cache.settle([busy])
    feed(cache, scorer, other, random_ids(30, 1))
    assert (busy.kv.length, other.kv.length) == (10, 0)
    segment = continuation.part(20)
    cache.take(continuation, segment, scorer.step([segment]).segments[0])
    assert (continuation.n_to_run, continuation.n_recomputed) == (0, 0)
    cache.end(continuation)
    cache.settle([busy])
    assert busy.kv.length == 0
    assert_same(continuation.scores(), at_once(scorer, ids))


def test_one_stream_is_admitted_alone_and_others_while_they_fit(scorer: Scorer) -> None:
    cache = make_cache(scorer, 100)
    streams = [cache.open_stream() for _ in range(3)]
    feed(cache, scorer, streams[0], [1])  # now the cache knows how large a token is
    assert cache.admits(OwnForward(streams[0], range(10_000)))
    begun = cache.begin(OwnForward(streams[0], random_ids(59)))
    assert cache.admits(OwnForward(streams[1], range(40)))
    assert not cache.admits(OwnForward(streams[1], range(41)))
    cache.end(begun)
    assert cache.admits(OwnForward(streams[1], range(41)))


def test_closing_frees_at_once_or_when_the_tokens_have_ended(scorer: Scorer) -> None:
    cache = make_cache(scorer, 1000)
    idle, busy, empty = (cache.open_stream() for _ in range(3))
    feed(cache, scorer, idle, random_ids(20))
    continuation = cache.begin(OwnForward(busy, random_ids(20)))
    segment = continuation.part(10)
    scores = scorer.step([segment]).segments[0]
    for stream in (idle, busy, empty, idle):
        cache.close(stream)
    assert (idle.kv.cache_bytes, busy.kv.length) == (0, 10)
    cache.take(continuation, segment, scores)
    cache.end(continuation)
    cache.settle([busy])
    assert busy.kv.cache_bytes == 0
    counts = cache.counts()
    assert (counts.sessions, counts.session_bytes, counts.evicted_at_close) == (0, 0, 1)


def test_a_stream_that_is_forgotten_is_not_counted(scorer: Scorer) -> None:
    cache = make_cache(scorer, 1000)
    stream = cache.open_stream()
    feed(cache, scorer, stream, random_ids(20))
    assert cache.counts().session_bytes == stream.kv.cache_bytes > 0
    del stream
    assert (cache.counts().sessions, cache.counts().session_bytes) == (0, 0)


def test_truncate_refuses_a_length_that_the_stream_does_not_have(scorer: Scorer) -> None:
    stream = make_cache(scorer, 10).open_stream()
    with pytest.raises(ValueError, match="found 1, expected 0 to the length 0"):
        stream.truncate(1)


class CountingScorer(Scorer):
    """Counts the tokens that a cache sends through the model."""

    def __init__(self, scorer: Scorer) -> None:
        self.__dict__.update(scorer.__dict__)
        self.n_run = 0

    def step(self, segments: Sequence[Segment]) -> StepScores:
        self.n_run += sum(len(segment.token_ids) for segment in segments)
        return super().step(segments)


@pytest.fixture
def counting(scorer: Scorer) -> CountingScorer:
    return CountingScorer(scorer)


def same_bits(a: SegmentScores, b: SegmentScores) -> bool:
    return np.array_equal(a.logits, b.logits) and np.array_equal(a.latent_acts, b.latent_acts)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_known_prefix_costs_no_forward_and_has_the_same_bits(
    scorers: dict[str, Scorer], family: str
) -> None:
    counting = CountingScorer(scorers[family])
    cache = make_cache(counting, 10_000, key=b"k")
    prefix, ends = random_ids(300), (random_ids(20, 1), random_ids(20, 2))
    first = feed(cache, counting, cache.open_stream(), prefix + ends[0])
    assert counting.n_run == 320
    second = feed(cache, counting, cache.open_stream(), prefix + ends[1])
    n_shared = 300 // BLOCK_TOKENS * BLOCK_TOKENS
    assert counting.n_run == 320 + 320 - n_shared
    assert cache.counts().reused_tokens == n_shared
    assert same_bits(
        SegmentScores(second.logits[:n_shared], second.latent_acts[:n_shared]),
        SegmentScores(first.logits[:n_shared], first.latent_acts[:n_shared]),
    )
    assert_same(second, at_once(counting, prefix + ends[1]))


def test_a_text_seen_whole_runs_not_a_token(counting: CountingScorer) -> None:
    cache = make_cache(counting, 10_000, key=b"k")
    ids = random_ids(3 * BLOCK_TOKENS)
    first = feed(cache, counting, cache.open_stream(), ids)
    stream = cache.open_stream()
    assert same_bits(feed(cache, counting, stream, ids), first)
    assert counting.n_run == len(ids)
    # What follows reads the rows that were taken over.
    more = feed(cache, counting, stream, [5, 6, 7])
    expected = at_once(counting, [*ids, 5, 6, 7])
    assert_same(more, SegmentScores(expected.logits[-3:], expected.latent_acts[-3:]))


def test_a_growing_text_sent_anew_each_time_costs_linear_forwards(
    counting: CountingScorer,
) -> None:
    cache = make_cache(counting, 10_000, key=b"k")
    text = random_ids(400)
    n_sent = 0
    for n in range(20, 401, 20):
        stream = cache.open_stream()
        found = feed(cache, counting, stream, text[:n])
        cache.close(stream)
        assert_same(found, at_once(counting, text[:n]))
        n_sent += n
    n_calls = 400 // 20
    assert counting.n_run <= 400 + n_calls * (BLOCK_TOKENS - 1) < n_sent / 3


def test_blocks_are_filled_by_streams_that_grow_a_token_at_a_time(
    counting: CountingScorer,
) -> None:
    cache = make_cache(counting, 10_000, key=b"k")
    ids, stream = random_ids(70), cache.open_stream()
    parts = [feed(cache, counting, stream, [token]) for token in ids]
    again = feed(cache, counting, cache.open_stream(), ids)
    assert counting.n_run == 70 + 70 - 64
    assert np.array_equal(again.logits[:64], np.concatenate([p.logits for p in parts])[:64])


def test_a_text_that_goes_back_is_found_as_it_ended(counting: CountingScorer) -> None:
    cache = make_cache(counting, 10_000, key=b"k")
    ids, stream = random_ids(100), cache.open_stream()
    feed(cache, counting, stream, [*ids[:66], 1, 2, 3, 4])
    stream.truncate(66)
    feed(cache, counting, stream, ids[66:])
    ran = counting.n_run
    found = feed(cache, counting, cache.open_stream(), ids)
    assert counting.n_run - ran == 100 - 96
    assert_same(found, at_once(counting, ids))


def test_an_evicted_stream_comes_back_from_its_blocks(counting: CountingScorer) -> None:
    cache = make_cache(counting, 360, key=b"k")
    ids, stream = random_ids(100), cache.open_stream()
    feed(cache, counting, stream, ids)
    feed(cache, counting, cache.open_stream(), random_ids(100, 1))
    assert stream.kv.length == 0
    ran = counting.n_run
    found = feed(cache, counting, stream, [7])
    assert counting.n_run - ran == 100 - 96 + 1
    expected = at_once(counting, [*ids, 7])
    assert_same(found, SegmentScores(expected.logits[-1:], expected.latent_acts[-1:]))
    assert cache.counts().recomputed_tokens == 4


def test_blocks_of_another_key_or_context_are_not_taken(counting: CountingScorer) -> None:
    blocks, ids = PrefixBlocks(), random_ids(96)
    old = make_cache(counting, 10_000, key=b"bundle 1", blocks=blocks)
    feed(old, counting, old.open_stream(), ids)
    new = make_cache(counting, 10_000, key=b"bundle 2", blocks=blocks)
    feed(new, counting, new.open_stream(), ids)
    assert (new.counts().reused_tokens, counting.n_run) == (0, 192)
    feed(new, counting, new.open_stream(), [ids[0] + 1, *ids[1:]])
    feed(new, counting, new.open_stream(), ids[32:])
    assert new.counts().reused_tokens == 0
    feed(new, counting, new.open_stream(), ids)
    assert new.counts().reused_tokens == 96


def test_the_end_of_a_chain_is_forgotten_before_its_beginning(counting: CountingScorer) -> None:
    cache = make_cache(counting, 300, key=b"k")
    ids = random_ids(128)
    stream = cache.open_stream()
    feed(cache, counting, stream, ids)
    cache.close(stream)
    other = cache.open_stream()
    feed(cache, counting, other, random_ids(90, 1))
    cache.close(other)
    ran = counting.n_run
    found = feed(cache, counting, cache.open_stream(), ids)
    assert 0 < counting.n_run - ran < 128
    assert_same(found, at_once(counting, ids))


def test_a_window_keeps_what_the_blocks_of_a_step_need() -> None:
    # A step files its own rows and those of up to two blocks, less one token, before it.
    assert token_streams.GO_BACK_TOKENS >= 2 * BLOCK_TOKENS - 1


def test_without_memory_for_blocks_the_scores_come_all_the_same(
    counting: CountingScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(self: KVStream, start: int, stop: int) -> KVRows:
        raise MemoryError

    monkeypatch.setattr(KVStream, "copy_rows", out_of_memory)
    cache, ids = make_cache(counting, 10_000, key=b"k"), random_ids(80)
    assert_same(feed(cache, counting, cache.open_stream(), ids), at_once(counting, ids))
    assert cache.counts().prefix_blocks == 0


def test_nothing_is_reused_without_a_key_or_a_budget(counting: CountingScorer) -> None:
    for cache in (make_cache(counting, 10_000), make_cache(counting, 0, key=b"k")):
        for _ in range(2):
            feed(cache, counting, cache.open_stream(), random_ids(64))
        assert (cache.counts().reused_tokens, cache.counts().prefix_blocks) == (0, 0)


def test_a_name_depends_on_key_context_and_tokens() -> None:
    def last(key: bytes, ids: list[int]) -> bytes:
        chain: list[bytes] = []
        extend_chain(chain, key, ids)
        assert len(chain) == len(ids) // BLOCK_TOKENS
        return chain[-1]

    ids = random_ids(70)
    changed = [[ids[0] + 1, *ids[1:]], [*ids[:63], ids[63] + 1, *ids[64:]], ids[32:]]
    names = [last(b"a", ids), last(b"b", ids), *(last(b"a", other) for other in changed)]
    assert len(set(names)) == 5
    assert last(b"a", ids) == last(b"a", [*ids[:64], 9])
    parts: list[bytes] = []
    extend_chain(parts, b"a", ids[:32])
    extend_chain(parts, b"a", ids[32:])
    assert parts[-1] == names[0]
