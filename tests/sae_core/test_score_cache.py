"""Streams that lose their memory to the budget against the same tokens scored at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from sae_core.heads import Cluster, ClusterHeads, LatentTerm
from sae_core.hook_points import HookPoint
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import Segment
from sae_core.language_model.tokenizer import load_tokenizer
from sae_core.score_cache import ScoreCache, ScoredStream
from sae_core.scorer import Scorer, SegmentScores
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


def make_cache(scorer: Scorer, max_tokens: int) -> ScoreCache:
    """With room for about so many tokens."""
    return ScoreCache(scorer.open_stream, max_tokens * row_bytes(scorer))


def row_bytes(scorer: Scorer) -> int:
    kv = scorer.open_stream()
    scorer.step([Segment(kv, [1])])
    return kv.row_bytes


def feed(
    cache: ScoreCache, scorer: Scorer, stream: ScoredStream, ids: Sequence[int]
) -> SegmentScores:
    continuation = cache.begin(stream, ids)
    while continuation.n_to_run:
        segment = continuation.segment(min(CHUNK, continuation.n_to_run))
        continuation.take(segment, scorer.step([segment]).segments[0])
        cache.settle([stream])
    cache.end(continuation)
    cache.settle([stream])
    return continuation.scores()


def at_once(scorer: Scorer, ids: Sequence[int]) -> SegmentScores:
    return scorer.step([Segment(scorer.open_stream(), ids)]).segments[0]


def assert_same(found: SegmentScores, expected: SegmentScores) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        # A logit is a sum of terms of either sign: its rounding is relative to the large ones.
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def random_ids(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, N_IDS, n).tolist()


@pytest.mark.parametrize("max_tokens", [0, 100, 200])
@pytest.mark.parametrize("family", FAMILIES)
def test_interleaved_streams_score_the_same_however_small_the_budget(
    scorers: dict[str, Scorer], family: str, max_tokens: int
) -> None:
    scorer, rng = scorers[family], np.random.default_rng(max_tokens)
    cache = make_cache(scorer, max_tokens)
    streams = [cache.open_stream() for _ in range(4)]
    texts: list[list[int]] = [[] for _ in streams]
    for turn in range(24):
        index, n = int(rng.integers(4)), int(rng.integers(1, 30))
        text = texts[index]
        del text[int(len(text) * rng.choice([1.0, 1.0, 0.9, 0.4])) :]
        streams[index].truncate(len(text))
        new = random_ids(n, turn)
        found = feed(cache, scorer, streams[index], new)
        text += new
        whole = at_once(scorer, text)
        assert_same(found, SegmentScores(whole.logits[-n:], whole.latent_acts[-n:]))
        assert streams[index].token_ids == text
        assert cache.counts().session_bytes <= cache.max_bytes
    assert cache.counts().evicted_for_memory > 0
    assert cache.counts().recomputed_tokens > 0


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
    continuation = cache.begin(busy, ids)
    segment = continuation.segment(10)
    continuation.take(segment, scorer.step([segment]).segments[0])
    cache.settle([busy])
    feed(cache, scorer, other, random_ids(30, 1))
    assert (busy.kv.length, other.kv.length) == (10, 0)
    segment = continuation.segment(20)
    continuation.take(segment, scorer.step([segment]).segments[0])
    assert (continuation.n_to_run, continuation.n_recomputed) == (0, 0)
    cache.end(continuation)
    cache.settle([busy])
    assert busy.kv.length == 0
    assert_same(continuation.scores(), at_once(scorer, ids))


def test_one_stream_is_admitted_alone_and_others_while_they_fit(scorer: Scorer) -> None:
    cache = make_cache(scorer, 100)
    streams = [cache.open_stream() for _ in range(3)]
    feed(cache, scorer, streams[0], [1])  # now the cache knows how large a token is
    assert cache.admits(streams[0], 10_000)
    begun = cache.begin(streams[0], random_ids(59))
    assert cache.admits(streams[1], 40)
    assert not cache.admits(streams[1], 41)
    cache.end(begun)
    assert cache.admits(streams[1], 41)


def test_closing_frees_at_once_or_when_the_tokens_have_ended(scorer: Scorer) -> None:
    cache = make_cache(scorer, 1000)
    idle, busy, empty = (cache.open_stream() for _ in range(3))
    feed(cache, scorer, idle, random_ids(20))
    continuation = cache.begin(busy, random_ids(20))
    segment = continuation.segment(10)
    scores = scorer.step([segment]).segments[0]
    for stream in (idle, busy, empty, idle):
        cache.close(stream)
    assert (idle.kv.cache_bytes, busy.kv.length) == (0, 10)
    continuation.take(segment, scores)
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
