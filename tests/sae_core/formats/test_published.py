"""SAEs that the peers' own libraries wrote, against the outputs that those libraries gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_core.formats import load_sae

PYTHIA_8 = ("blocks.8.hook_resid_post", "EleutherAI/pythia-160m-deduped")
FIXTURES: dict[str, tuple[str | None, str | None]] = {
    "dictionary_learning-AutoEncoder": PYTHIA_8,
    "dictionary_learning-AutoEncoderTopK": PYTHIA_8,
    "dictionary_learning-BatchTopKSAE": PYTHIA_8,
    "dictionary_learning-GatedAutoEncoder": PYTHIA_8,
    "dictionary_learning-JumpReluAutoEncoder": PYTHIA_8,
    "gemma_scope-res": (None, None),
    "gemma_scope_2-resid_post": ("model.layers.17.output", "google/gemma-3-1b-pt"),
    "goodfire-llama-3.1-8b": ("blocks.19.hook_resid_post", "Llama-3.1-8B-Instruct"),
    "llama_scope-jumprelu": ("blocks.15.hook_resid_post", None),
    "llamascopium-jumprelu-dataset_wise": ("blocks.5.hook_resid_post", None),
    "openai-topk-layernorm": (None, None),
    "qwen_scope-topk": ("blocks.12.hook_resid_post", None),
    "saelens6-standard": ("blocks.6.hook_resid_post", "gpt2"),
    "saelens6-standard-layer_norm": ("blocks.6.hook_resid_post", "gpt2"),
    "saelens6-standard-hook_z": ("blocks.6.attn.hook_z", "gpt2"),
    "saelens6-gated": ("blocks.6.hook_resid_post", "gpt2"),
    "saelens6-jumprelu": ("blocks.6.hook_resid_post", "gpt2"),
    "saelens6-topk": ("blocks.6.hook_resid_post", "gpt2"),
    "saelens6-topk-rescale": ("blocks.6.hook_resid_post", "gpt2"),
    "saelens6-abstopk": ("blocks.6.hook_resid_post", "gpt2"),
    "saelens6-batchtopk": ("blocks.6.hook_resid_post", "gpt2"),
    "saelens6-matryoshka_batchtopk": ("blocks.6.hook_resid_post", "gpt2"),
    "saelens6-transcoder": ("blocks.6.ln2.hook_normalized", "gpt2"),
    "saelens6-jumprelu_skip_transcoder": ("blocks.6.ln2.hook_normalized", "gpt2"),
    "saelens5-standard-res_jb_style": ("blocks.8.hook_resid_pre", "gpt2-small"),
    "saelens5-topk": ("blocks.8.hook_resid_pre", "gpt2-small"),
    "saelens5-standard-constant_norm_rescale": ("blocks.8.hook_resid_pre", "gpt2-small"),
    "sparsify-groupmax": ("layers.1.output", None),
    "sparsify-topk": ("layers.3.output", None),
    "sparsify-transcoder-skip": ("layers.2.mlp.input", None),
}
"""Each fixture, and the hook point and model that its files name; None where they do not."""

HINTED = {
    "acts_folded": ("dictionary_learning-AutoEncoder", {"fold_decoder_norms": True}),
    "acts_use_threshold": ("dictionary_learning-AutoEncoderTopK", {"use_threshold": True}),
}
"""Other activations that the libraries give, each with its fixture and the hints for it."""


@pytest.fixture(params=FIXTURES)
def fixture_folder(request: pytest.FixtureRequest, shared_folder: Path) -> Path:
    return folder_of(request.param, shared_folder)


def folder_of(name: str, shared_folder: Path) -> Path:
    folder = shared_folder / "fixtures" / "sae" / name
    if not folder.is_dir():
        pytest.skip(f"the shared fixture {name} is not beside this checkout")
    return folder


def facts_of(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return json.loads((folder / "case.json").read_text()), dict(np.load(folder / "expected.npz"))


def assert_within(found: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(found.numpy(), expected, rtol=tolerance, atol=tolerance)


def test_latents_and_reconstruction_are_the_librarys(fixture_folder: Path) -> None:
    case, expected = facts_of(fixture_folder)
    sae = load_sae(fixture_folder, **case["loader_kwargs"])
    assert (sae.config.d_in, sae.config.d_sae) == (case["d_in"], case["d_sae"])
    assert sae.config.d_out == case["d_out"]
    x = torch.from_numpy(expected["x"])
    acts = sae.encode(x)
    assert np.array_equal(acts.numpy() != 0, expected["acts"] != 0)
    assert 0 < (acts != 0).float().mean() < 1
    assert_within(acts, expected["acts"], case["tolerance"])
    decoded = expected.get("decode_only", expected["recon"])
    assert_within(sae.decode(acts, x), decoded, case["tolerance"])
    assert_within(sae.forward(x), expected["recon"], case["tolerance"])


def test_registered_latents_alone_have_the_bits_of_the_whole_encoder(fixture_folder: Path) -> None:
    case, expected = facts_of(fixture_folder)
    x = torch.from_numpy(expected["x"])
    whole = load_sae(fixture_folder, **case["loader_kwargs"]).encode(x)
    for ids in (case["registered"], case["registered"][::-1], case["registered"][:1]):
        sliced = load_sae(fixture_folder, **case["loader_kwargs"]).slice(ids)
        assert torch.equal(sliced(x), whole[:, ids])
        assert torch.equal(sliced(x[5:6]), whole[5:6, ids])
    assert (whole[:, case["registered"]] != 0).any()


def test_card_says_where_it_reads(fixture_folder: Path) -> None:
    case, _ = facts_of(fixture_folder)
    card = load_sae(fixture_folder, **case["loader_kwargs"]).card
    assert (card.hook_point, card.model_name) == FIXTURES[fixture_folder.name]
    assert str(fixture_folder) in card.source


@pytest.mark.parametrize("output", HINTED)
def test_hints_give_the_librarys_other_activations(output: str, shared_folder: Path) -> None:
    name, hints = HINTED[output]
    folder = folder_of(name, shared_folder)
    case, expected = facts_of(folder)
    sae = load_sae(folder, **hints)
    acts = sae.encode(torch.from_numpy(expected["x"]))
    assert np.array_equal(acts.numpy() != 0, expected[output] != 0)
    assert not np.allclose(expected[output], expected["acts"])
    assert_within(acts, expected[output], case["tolerance"])
    if output == "acts_folded":
        assert_within(sae.decode(acts), expected["recon"], case["tolerance"])
    ids = case["registered"]
    sliced = load_sae(folder, **hints).slice(ids)
    assert torch.equal(sliced(torch.from_numpy(expected["x"])), acts[:, ids])


def test_llama_scope_in_training_scale_is_as_saelens_reads_it(shared_folder: Path) -> None:
    folder = shared_folder / "fixtures" / "sae" / "llama_scope-jumprelu"
    if not folder.is_dir():
        pytest.skip("the shared fixture llama_scope-jumprelu is not beside this checkout")
    case, expected = facts_of(folder)
    sae = load_sae(folder, training_scale=True)
    acts = sae.encode(torch.from_numpy(expected["x"]))
    assert np.array_equal(acts.numpy() != 0, expected["acts_training_scale"] != 0)
    assert_within(acts, expected["acts_training_scale"], case["tolerance"])
    assert_within(sae.decode(acts), expected["recon"], case["tolerance"])
