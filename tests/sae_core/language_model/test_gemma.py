"""The real default model, Gemma 3 270M: numbers against transformers, and how much is loaded."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sae_core.hook_points import HookPoint
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import LanguageModel, Segment
from sae_core.language_model.products import OneDNNLinear
from sae_core.language_model.tokenizer import Tokenizer, load_tokenizer

HOOK_POINTS = (HookPoint(3, "resid_mid"), HookPoint(8, "resid_post"))
TOLERANCE, TYPICAL = 2e-4, 2e-6
"""Of the worst token and of the median one, relative to each token's largest value, as the first
token's are some hundred times the others'. Against float64, plain float32 is off by 4e-7 at the
median and, after some hundred tokens, by 4e-5 at worst; another order of summation moves that."""

TEXTS = (
    "The history of the lighthouse begins with a fire on a hill. " * 60,  # beyond the 512 window
    "Wie backt man Brot? Mit Mehl, Wasser und Salz.",
    "def main():\n    print('hello')\n",
)


@pytest.fixture(scope="module")
def model(gemma_folder: Path) -> LanguageModel:
    return load_language_model(gemma_folder, HOOK_POINTS)


@pytest.fixture(scope="module")
def tokenizer(gemma_folder: Path) -> Tokenizer:
    return load_tokenizer(gemma_folder)


@pytest.fixture(scope="module")
def texts(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.fixture(scope="module")
def expected(gemma_folder: Path, texts: list[list[int]]) -> list[dict[HookPoint, Tensor]]:
    """From the whole model with dense eager attention; resid_mid off the block's own norm."""
    whole = AutoModelForCausalLM.from_pretrained(
        gemma_folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found: list[dict[HookPoint, Tensor]] = []
    for ids in texts:
        mid: list[Tensor] = []
        norm = whole.model.layers[3].pre_feedforward_layernorm
        handle = norm.register_forward_pre_hook(lambda _m, args, mid=mid: mid.append(args[0][0]))
        with torch.no_grad():
            hidden = whole.model(
                torch.tensor([ids]), output_hidden_states=True, use_cache=False
            ).hidden_states
        handle.remove()
        found.append({HOOK_POINTS[0]: mid[0], HOOK_POINTS[1]: hidden[9][0]})
    return found


def assert_same(found: Tensor, want: Tensor) -> None:
    error = (found - want).abs().amax(dim=-1) / want.abs().amax(dim=-1)
    assert error.max() < TOLERANCE, f"{error.max():.1e}"
    assert error.median() < TYPICAL, f"{error.median():.1e}"


def test_half_of_the_model_is_loaded(model: LanguageModel) -> None:
    assert (model.config.n_layers, model.config.n_layers_total) == (9, 18)
    assert (model.config.model_type, model.config.d_model) == ("gemma3_text", 640)
    # The weights of oneDNN's layers are no parameters of the module.
    packed = [m for m in model._module.modules() if isinstance(m, OneDNNLinear)]
    parameters = sum(p.numel() for p in model._module.parameters())
    parameters += sum(m.weight.numel() for m in packed)
    embedding = 262_144 * 640
    block = 2 * 640 * 1024 + 2 * 640 * 256 + 3 * 640 * 2048 + 4 * 640 + 2 * 256
    assert parameters == embedding + 9 * block


def test_packed_texts_equal_the_plain_model(
    model: LanguageModel, texts: list[list[int]], expected: list[dict[HookPoint, Tensor]]
) -> None:
    resid = model.step([Segment(model.open_stream(), ids) for ids in texts])
    for hook_point in HOOK_POINTS:
        parts = resid[hook_point].split([len(ids) for ids in texts])
        for part, want in zip(parts, expected, strict=True):
            assert_same(part, want[hook_point])


def test_streamed_chunks_equal_the_plain_model(
    model: LanguageModel, texts: list[list[int]], expected: list[dict[HookPoint, Tensor]]
) -> None:
    rng = random.Random(0)
    streams = [model.open_stream() for _ in texts]
    while todo := [i for i, ids in enumerate(texts) if streams[i].length < len(ids)]:
        starts = [streams[i].length for i in todo]
        segments = [
            Segment(streams[i], texts[i][start : start + rng.choice([1, 7, 90])])
            for i, start in zip(todo, starts, strict=True)
        ]
        resid = model.step(segments)
        for hook_point in HOOK_POINTS:
            parts = resid[hook_point].split([len(s.token_ids) for s in segments])
            for i, start, part in zip(todo, starts, parts, strict=True):
                assert_same(part, expected[i][hook_point][start : start + len(part)])


def test_control_tokens_and_words_have_gemmas_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("Hello world") == [2, 9259, 1902]
    assert tokenizer.encode("<start_of_turn>model\n", add_bos=False) == [105, 4368, 107]
    assert {0, 1, 2, 105, 106} <= tokenizer.special_ids
    assert tokenizer.vocab_size == 262_144


def test_token_texts_join_to_the_text(tokenizer: Tokenizer) -> None:
    text = "Hello <start_of_turn>model\n  ünï 👩‍🚀 \t 𒀀"
    assert "".join(tokenizer.token_texts(tokenizer.encode(text))) == "<bos>" + text
