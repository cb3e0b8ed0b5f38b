from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sae_core.errors import HookPointError, ModelLoadError
from sae_core.hook_points import parse_hook_point
from sae_core.language_model.splicing import WholeModel
from sae_core.testing.models import FAMILIES, tiny_model_folder

CONTEXTS = [[1, *range(5, 30)], [1, 40, 41, 42], [1, 7]]
POST = parse_hook_point("blocks.1.hook_resid_post")


def _plain_loss(folder: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, n = 0.0, 0
    for context in CONTEXTS[:2]:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([context])).logits[0]
        log_probs = logits.log_softmax(-1)
        for position in range(1, len(context) - 1):
            total -= float(log_probs[position, context[position + 1]])
            n += 1
    return total / n


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_that_of_the_plain_model(family: str, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, family)
    model = WholeModel(folder)
    expected = _plain_loss(folder)
    assert model.loss(CONTEXTS) == pytest.approx(expected, rel=1e-5)
    assert model.loss(CONTEXTS, POST, lambda rows: rows) == pytest.approx(expected, rel=1e-5)
    assert model.loss(CONTEXTS, POST, torch.zeros_like) != pytest.approx(expected, rel=1e-3)
    assert model.loss(CONTEXTS) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "name",
    ["blocks.1.hook_resid_pre", "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z", "hook_embed"],
)
def test_input_and_output_sites_are_replaced(name: str, tmp_path: Path) -> None:
    model = WholeModel(tiny_model_folder(tmp_path, "gemma3"))
    hook_point, plain = parse_hook_point(name), model.loss(CONTEXTS)
    seen: list[torch.Size] = []

    def double(rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows.shape)
        return 2 * rows + 1

    assert model.loss(CONTEXTS, hook_point, double) != pytest.approx(plain, rel=1e-4)
    assert [shape[0] for shape in seen] == [len(CONTEXTS[0]) - 1, len(CONTEXTS[1]) - 1]


def test_stream_beside_a_norm_is_refused(tmp_path: Path) -> None:
    model = WholeModel(tiny_model_folder(tmp_path, "llama"))
    for name in ("blocks.1.hook_resid_mid", "blocks.1.ln2.hook_normalized"):
        with pytest.raises(HookPointError, match="also passes beside it"):
            model.loss(CONTEXTS, parse_hook_point(name), torch.zeros_like)


def test_checkpoint_without_head_is_refused(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, "llama", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match="found no lm_head.weight"):
        WholeModel(folder)
