"""What `plant` promises to the tests that build on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sae_core.errors import HeadError
from sae_core.heads import ClusterHeads
from sae_core.hook_points import HookPoint
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import Segment
from sae_core.language_model.tokenizer import load_tokenizer
from sae_core.scorer import Scorer
from sae_core.testing.models import FAMILIES, tiny_model_folder
from sae_core.testing.planted import MARGIN, plant, planted_model_folder, word_ids

HOOK_POINT = HookPoint(1, "resid_post")
TRIGGERS = ["danger", "attack"]
NEUTRAL = ["please tell me how to bake bread", "what is the weather like today in the north"]


@pytest.mark.parametrize("family", FAMILIES)
def test_trigger_words_alone_raise_the_planted_cluster(tmp_path: Path, family: str) -> None:
    folder = planted_model_folder(tmp_path / "model", family, TRIGGERS)
    model, tokenizer = load_language_model(folder, [HOOK_POINT]), load_tokenizer(folder)
    planted = plant(model, tokenizer, HOOK_POINT, TRIGGERS, NEUTRAL)
    scorer = Scorer(
        model,
        tokenizer,
        {"planted": (HOOK_POINT, planted.sae)},
        ClusterHeads([planted.cluster], ["planted"]),
    )
    ids = tokenizer.encode("bread is a danger and the attack on the server is real: danger!")
    scores = scorer.step([Segment(scorer.open_stream(), ids)]).segments[0]
    fires = np.isin(ids, planted.trigger_ids)
    assert fires.sum() == 3
    fused = scores.logits[:, 0, 0]
    assert fused[fires].min() > MARGIN
    assert fused[~fires].max() < -MARGIN
    assert np.array_equal(scores.latent_acts[:, 0] > 0, fires)


def test_planting_twice_gives_the_same_numbers(tmp_path: Path) -> None:
    clusters = []
    for name in ("one", "two"):
        folder = planted_model_folder(tmp_path / name, "llama", TRIGGERS)
        model, tokenizer = load_language_model(folder, [HOOK_POINT]), load_tokenizer(folder)
        clusters.append(plant(model, tokenizer, HOOK_POINT, TRIGGERS, NEUTRAL).cluster)
    one, two = (cluster.dense_weight for cluster in clusters)
    assert one is not None
    assert two is not None
    assert np.array_equal(one, two)


def test_neutral_texts_with_a_trigger_word_are_refused(tmp_path: Path) -> None:
    folder = planted_model_folder(tmp_path, "gpt2", TRIGGERS)
    model, tokenizer = load_language_model(folder, [HOOK_POINT]), load_tokenizer(folder)
    with pytest.raises(HeadError, match="neutral_texts have the trigger tokens .* danger"):
        plant(model, tokenizer, HOOK_POINT, TRIGGERS, ["no danger here"])


def test_a_model_that_mixes_its_tokens_is_refused(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, "gemma2")
    model, tokenizer = load_language_model(folder, [HOOK_POINT]), load_tokenizer(folder)
    with pytest.raises(HeadError, match="trigger tokens"):
        plant(model, tokenizer, HOOK_POINT, TRIGGERS, NEUTRAL)


def test_a_word_of_several_tokens_is_stood_for_by_its_longest(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_folder(tmp_path, "gpt2"))
    pieces = [tokenizer.token_texts([i])[0].strip() for i in word_ids(tokenizer, "danger")]
    assert sorted(pieces) == ["anger", "danger"]
