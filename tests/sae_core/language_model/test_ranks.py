"""A model split over two processes against the same model in one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from sae_core.heads import Cluster, ClusterHeads, LatentTerm
from sae_core.hook_points import SITES_IN_BLOCK, HookPoint
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import LanguageModel, Segment
from sae_core.language_model.ranks import load_tensor_parallel
from sae_core.language_model.tokenizer import load_tokenizer
from sae_core.score_cache import OwnForward, ScoreCache
from sae_core.scorer import Scorer
from sae_core.testing.models import D_MODEL, N_PIECES, tiny_model_folder
from sae_core.testing.planted import planted_sae

TOLERANCE = 1e-5
"""Relative to the largest value; ranks add partial sums in another order."""

END = HookPoint(2, "resid_post")
MODELS: dict[str, dict[str, object]] = {
    "gemma3": {"intermediate_size": 63},  # one rank has a neuron more than the other
    "gpt_neox": {},
    "phi3": {},
    "qwen2_moe": {},
}


def whole_places(family: str) -> list[HookPoint]:
    places = [HookPoint(0, "embed")]
    for site in SITES_IN_BLOCK:
        if site not in ("z", "mlp_post") and not (site == "resid_mid" and family == "gpt_neox"):
            places += [HookPoint(layer, site) for layer in range(3)]
    return places


@pytest.fixture(scope="module", params=MODELS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LanguageModel, LanguageModel]]:
    """The same model, split and not; one after the other, as a process has one group."""
    family = request.param
    folder = tiny_model_folder(tmp_path_factory.mktemp(family), family, **MODELS[family])
    places = whole_places(family)
    with closing(load_tensor_parallel(folder, places, n_ranks=2)) as model:
        yield model, load_language_model(folder, places)


def random_ids(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(N_PIECES) for _ in range(n)]


def test_streams_in_any_order_equal_one_process(
    pair: tuple[LanguageModel, LanguageModel],
) -> None:
    model, alone = pair
    assert (model.widths, model.config.n_ranks) == (alone.widths, 2)
    rng = random.Random(0)
    streams = [(model.open_stream(), alone.open_stream()) for _ in range(4)]
    for _ in range(30):
        used = rng.sample(streams, 2)
        new = [random_ids(rng, rng.randint(1, 9)) for _ in used]
        found, expected = (
            whole.step([Segment(pair[side], ids) for pair, ids in zip(used, new, strict=True)])
            for side, whole in enumerate((model, alone))
        )
        assert found.keys() == expected.keys()
        for hook_point, acts in expected.items():
            error = (found[hook_point] - acts).abs().max() / acts.abs().max()
            assert error < TOLERANCE, f"{hook_point}: {error:.1e}"
        change = rng.choice(["truncate", "release", "none", "none"])
        n = rng.randint(0, used[0][1].length)
        for stream in used[0]:
            if change == "truncate":
                stream.truncate(n)
            elif change == "release":
                stream.release()
    assert all(stream.length == plain.length for stream, plain in streams)


def make_scorer(model: LanguageModel) -> Scorer:
    rng = np.random.default_rng(0)
    terms = [LatentTerm(sae="s", latent_id=i, weight=1.0, scale=1.0, label="") for i in range(6)]
    cluster = Cluster(
        id="x",
        latents=tuple(terms),
        dense_weight=rng.normal(size=D_MODEL).astype(np.float32),
        dense_hook_point=str(END),
    )
    sae = planted_sae(D_MODEL, 24, architecture="relu", seed=1)
    tokenizer = load_tokenizer(model.config.folder)
    return Scorer(model, tokenizer, {"s": (END, sae)}, ClusterHeads([cluster], ["s"]))


def test_evicted_and_reused_streams_score_as_in_one_process(
    pair: tuple[LanguageModel, LanguageModel],
) -> None:
    split_scorer, plain_scorer = map(make_scorer, pair)
    rng = random.Random(1)
    texts = [random_ids(rng, 70) for _ in range(3)]
    stream = split_scorer.open_stream()
    split_scorer.step([Segment(stream, [1])])
    cache = ScoreCache(split_scorer.open_stream, 300 * stream.row_bytes, key=b"k")
    for _ in range(12):
        text = rng.choice(texts)[: rng.randint(40, 70)] + random_ids(rng, rng.randint(1, 30))
        scored = cache.open_stream()
        continuation = cache.begin(OwnForward(scored, text))
        continuation.restore()
        while continuation.n_to_run:
            segment = continuation.part(min(13, continuation.n_to_run))
            cache.take(continuation, segment, split_scorer.step([segment]).segments[0])
        cache.end(continuation)
        cache.settle([scored])
        [expected] = plain_scorer.step([Segment(plain_scorer.open_stream(), text)]).segments
        for a, b in zip(continuation.scores(), expected, strict=True):
            assert np.abs(a - b).max() <= TOLERANCE * np.abs(b).max()
        if rng.random() < 0.3:
            cache.close(scored)
    counts = cache.counts()
    assert counts.reused_tokens and (counts.prefix_evictions or counts.evicted_for_memory)


def test_a_rank_holds_the_keys_and_values_of_its_own_heads(
    pair: tuple[LanguageModel, LanguageModel],
) -> None:
    row_bytes = []
    for model in pair:
        stream = model.open_stream()
        model.step([Segment(stream, [1, 2, 3])])
        row_bytes.append(stream.row_bytes)
    # Phi 3's plan gathers the heads before they attend.
    share = 1 if pair[0].config.model_type == "phi3" else 2
    assert row_bytes[0] * share == row_bytes[1]
