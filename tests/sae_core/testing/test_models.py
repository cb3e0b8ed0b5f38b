"""The tiny models themselves: deterministic, and fit to tell a right answer from a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sae_core.language_model.checksums import digest_folder
from sae_core.testing.models import FAMILIES, tiny_model_folder, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_seed_decides_everything(family: str, tmp_path: Path) -> None:
    digests = [
        digest_folder(tiny_model_folder(tmp_path / name, family, seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_depend_on_the_text(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder(tmp_path, family)).eval()
    texts = ("the danger of an attack", "the poison of an attack")
    first, second = (tiny_tokenizer().encode(text).ids for text in texts)
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0, -1] for ids in (first, second)]
    assert logits[0].std() > 0.3
    assert (logits[0] - logits[1]).abs().max() > 0.1


def test_unknown_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found 'bert', expected one of gpt2"):
        tiny_model_folder(tmp_path, "bert")
