"""The exported graph against the torch backend, on a tiny model of every dense family.

The torch backend is held to an independent oracle by `test_scorer` one level up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from sae_core.activation_source import GivenActivations
from sae_core.errors import ScorerError, TokenError
from sae_core.hook_points import HookPoint
from sae_core.language_model.model import Segment
from sae_core.language_model.token_streams import KVStream
from sae_core.onnx.attention import QUERY_BLOCK
from sae_core.onnx.scorer import OnnxScorer
from sae_core.scorer import Scorer, SegmentScores
from sae_core.testing.models import FAMILIES

Pair = Callable[[str], tuple[Scorer, OnnxScorer]]

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
DENSE = tuple(family for family in FAMILIES if family not in MIXTURES)
RELATIVE = 1e-5
"""Of the largest number in sight; float32 sums in another order than torch's."""
UNDECIDED = 0.02
"""Share of tokens where rounding may take a latent to the other side of its gate."""


def check_close(found: Sequence[SegmentScores], expected: Sequence[SegmentScores]) -> None:
    logits, wanted = (np.concatenate([s.logits for s in some]) for some in (found, expected))
    acts, wanted_acts = (
        np.concatenate([s.latent_acts for s in some]) for some in (found, expected)
    )
    assert logits.shape == wanted.shape
    assert acts.shape == wanted_acts.shape
    same = ((acts > 0) == (wanted_acts > 0)).all(axis=1)
    assert (~same).mean() <= UNDECIDED
    assert np.abs(logits - wanted)[same].max() <= RELATIVE * np.abs(wanted).max()
    assert np.abs(acts - wanted_acts)[same].max() <= RELATIVE * np.abs(wanted_acts).max()


def ids(scorer: Scorer, n: int, seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(i) for i in rng.integers(0, scorer.language_model.config.vocab_size, n)]


@pytest.mark.parametrize("family", DENSE)
def test_scores_equal_torch_however_the_tokens_arrive(scorers: Pair, family: str) -> None:
    in_torch, on_graph = scorers(family)
    texts = [ids(in_torch, n, n) for n in (1, 9, 40, 23)]
    expected = in_torch.step([Segment(in_torch.open_stream(), text) for text in texts]).segments

    whole = on_graph.step([Segment(on_graph.open_stream(), text) for text in texts])
    check_close(whole.segments, expected)

    rng = np.random.default_rng(1)
    streams = [on_graph.open_stream() for _ in texts]
    parts: list[list[SegmentScores]] = [[] for _ in texts]
    while any(s.length < len(text) for s, text in zip(streams, texts, strict=True)):
        chosen = [i for i in range(len(texts)) if rng.random() < 0.7]
        segments = [
            Segment(streams[i], texts[i][streams[i].length :][: int(rng.choice([1, 1, 3, 12]))])
            for i in chosen
        ]
        for i, scores in zip(chosen, on_graph.step(segments).segments, strict=True):
            parts[i].append(scores)
    joined = [
        SegmentScores(*(np.concatenate(arrays) for arrays in zip(*some, strict=True)))
        for some in parts
    ]
    check_close(joined, expected)


@pytest.mark.parametrize("family", ["gemma3", "mistral", "llama"])
def test_long_texts_equal_torch_over_blocks_and_windows(scorers: Pair, family: str) -> None:
    in_torch, on_graph = scorers(family)
    text = ids(in_torch, QUERY_BLOCK + 150, 3)
    expected = in_torch.step([Segment(in_torch.open_stream(), text)]).segments
    stream = on_graph.open_stream()
    first, second = text[:130], text[130:]
    found = [on_graph.step([Segment(stream, part)]).segments[0] for part in (first, second)]
    check_close(found, expected)


def test_segments_of_one_stream_follow_each_other(scorers: Pair) -> None:
    in_torch, on_graph = scorers("gemma3")
    text, other = ids(in_torch, 30, 5), ids(in_torch, 4, 6)

    def step(scorer: Scorer) -> tuple[SegmentScores, ...]:
        stream, second = scorer.open_stream(), scorer.open_stream()
        parts = [(stream, text[:10]), (second, other), (stream, text[10:11]), (stream, text[11:])]
        return scorer.step([Segment(s, part) for s, part in parts]).segments

    check_close(step(on_graph), step(in_torch))


def test_a_stream_that_went_back_equals_torch(scorers: Pair) -> None:
    in_torch, on_graph = scorers("gemma3")
    text, instead = ids(in_torch, 40, 7), ids(in_torch, 9, 8)

    def step(scorer: Scorer) -> SegmentScores:
        stream = scorer.open_stream()
        scorer.step([Segment(stream, text)])
        stream.truncate(25)
        return scorer.step([Segment(stream, instead)]).segments[0]

    check_close([step(on_graph)], [step(in_torch)])


def test_rows_taken_over_from_another_stream_give_the_same_scores(scorers: Pair) -> None:
    _, on_graph = scorers("gemma3")
    text, more = ids(on_graph, 32, 9), ids(on_graph, 6, 10)
    first = on_graph.open_stream()
    on_graph.step([Segment(first, text)])
    rows = first.copy_rows(0, 32)
    second = on_graph.open_stream()
    second.paste_rows(0, [rows])
    found = [on_graph.step([Segment(second, [token])]).segments[0] for token in more]
    check_close(found, on_graph.step([Segment(first, more)]).segments)


def test_given_activations_score_as_our_own_forward(scorers: Pair) -> None:
    _, on_graph = scorers("qwen3")
    text = ids(on_graph, 12, 11)
    resid = on_graph.language_model.step([Segment(on_graph.open_stream(), text)])
    given = GivenActivations(12, {h: x.numpy() for h, x in resid.items()})
    own = on_graph.step([Segment(on_graph.open_stream(), text), given.part(0, 12)])
    check_close(own.segments[1:], own.segments[:1])


def test_activations_equal_torch_at_every_hook_point(scorers: Pair) -> None:
    in_torch, on_graph = scorers("gemma2")
    text = ids(in_torch, 20, 12)
    expected = in_torch.language_model.step([Segment(in_torch.open_stream(), text)])
    found = on_graph.language_model.step([Segment(on_graph.open_stream(), text)])
    assert set(found) == set(expected)
    for hook_point, x in expected.items():
        gap = (found[hook_point] - x).abs().max()
        assert gap <= RELATIVE * x.abs().max(), hook_point
    assert on_graph.language_model.widths == in_torch.language_model.widths
    assert on_graph.language_model.can_read(HookPoint(1, "resid_mid"))


def test_a_step_without_tokens_gives_no_rows(scorers: Pair) -> None:
    _, on_graph = scorers("llama")
    (scores,) = on_graph.step([Segment(on_graph.open_stream(), [])]).segments
    assert scores.logits.shape == (0, len(on_graph.heads.clusters), 3)
    assert scores.latent_acts.shape == (0, on_graph.heads.n_latents)


def test_no_stream_grows_when_a_step_fails(scorers: Pair) -> None:
    in_torch, on_graph = scorers("llama")
    streams = [on_graph.open_stream(), on_graph.open_stream()]
    good = Segment(streams[0], ids(on_graph, 5, 13))
    for scorer in (in_torch, on_graph):
        with pytest.raises(TokenError, match=r"segment 1: found token id -1 at position 2"):
            scorer.step([good, Segment(streams[1], [1, 2, -1])])
    with pytest.raises(TokenError, match=r"segment 0: found 600 tokens in the stream"):
        on_graph.step([Segment(streams[0], [1] * 600)])
    assert [stream.length for stream in streams] == [0, 0]


def test_what_is_not_finite_is_named_and_takes_nothing_along(scorers: Pair) -> None:
    in_torch, on_graph = scorers("llama")
    text, poisoned = ids(in_torch, 6, 14), on_graph.open_stream()
    on_graph.step([Segment(poisoned, text)])
    keys, values = poisoned.read(0, 0, 6)
    with torch.inference_mode():
        values.fill_(float("nan"))
    healthy = on_graph.open_stream()
    segments = [Segment(healthy, text), Segment(poisoned, text[:2])]
    with pytest.raises(ScorerError, match=r"segment 1, position 6: residual stream at blocks.0"):
        on_graph.step(segments)
    assert [healthy.length, poisoned.length] == [0, 6]
    expected = in_torch.step([Segment(in_torch.open_stream(), text)]).segments
    check_close(on_graph.step(segments[:1]).segments, expected)


def test_a_stream_holds_what_it_holds_in_torch(scorers: Pair) -> None:
    in_torch, on_graph = scorers("gemma3")
    text = ids(in_torch, 300, 15)

    def held(scorer: Scorer) -> KVStream:
        stream = scorer.open_stream()
        for start in range(0, len(text), 50):
            scorer.step([Segment(stream, text[start : start + 50])])
        return stream

    assert held(on_graph).cache_bytes == held(in_torch).cache_bytes
    assert held(on_graph).row_bytes == held(in_torch).row_bytes
