"""SAELens folders: the round trip, training checkpoints, and what is refused in which words.

Folders that the library wrote are in test_published.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_core.errors import SAEFormatError
from sae_core.formats import load_sae
from sae_core.formats.saelens import CFG, SCALER, WEIGHTS, read_saelens
from sae_core.formats.saelens_writer import save_saelens
from sae_core.sae import SAE
from sae_core.sae_config import Architecture, SAECard, SAEConfig
from sae_core.sae_weights import SAEWeights
from sae_core.testing.planted import planted_sae


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "topk", "batchtopk"])
def test_saved_and_read_again_is_the_same_sae(tmp_path: Path, architecture: Architecture) -> None:
    sae = planted_sae(8, 32, architecture=architecture, seed=1)
    save_saelens(sae, tmp_path / "sae")
    again = load_sae(tmp_path / "sae")
    expected = "jumprelu" if architecture == "batchtopk" else architecture
    assert again.config.architecture == expected
    assert (again.config.k, again.card.hook_point) == (sae.config.k, sae.card.hook_point)
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.encode(x), sae.encode(x))
    assert torch.equal(again.decode(again.encode(x)), sae.decode(sae.encode(x)))
    assert sorted(p.name for p in (tmp_path / "sae").iterdir()) == [CFG, WEIGHTS]


def test_bfloat16_halves_the_matrices_and_nothing_else(tmp_path: Path) -> None:
    sae = planted_sae(8, 32, architecture="jumprelu", seed=1)
    save_saelens(sae, tmp_path, dtype="bfloat16")
    stored = {name: tensor.dtype for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    assert stored == {
        "W_enc": torch.bfloat16,
        "W_dec": torch.bfloat16,
        "b_enc": torch.float32,
        "b_dec": torch.float32,
        "threshold": torch.float32,
    }
    assert json.loads((tmp_path / CFG).read_text())["dtype"] == "bfloat16"
    weights = read_saelens(tmp_path).weights
    assert torch.equal(weights.W_enc, sae.weights.W_enc.bfloat16().float())
    assert weights.threshold is not None and sae.weights.threshold is not None
    assert torch.equal(weights.threshold, sae.weights.threshold)


def test_metadata_survives_the_round_trip(tmp_path: Path) -> None:
    sae = planted_sae(8, 32, architecture="relu", seed=1)
    card = SAECard(
        hook_point="blocks.8.hook_resid_post",
        model_name="some/model",
        facts={"fvu": 0.25, "prepend_bos": True},
    )
    save_saelens(sae.replaced(card=card), tmp_path)
    again = load_sae(tmp_path).card
    assert (again.hook_point, again.model_name) == ("blocks.8.hook_resid_post", "some/model")
    assert again.facts["fvu"] == 0.25
    assert load_sae(tmp_path).config.apply_b_dec_to_input is True
    assert again.facts["sae_lens_version"] == "6.0.0"  # or SAELens drops the rest


def test_metadata_that_is_not_json_is_refused(tmp_path: Path) -> None:
    sae = planted_sae(8, 32, architecture="relu", seed=1)
    card = SAECard(facts={"where": Path()})
    with pytest.raises(SAEFormatError, match="the card's facts are not JSON"):
        save_saelens(sae.replaced(card=card), tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_an_encoder_without_its_decoder_is_not_written(tmp_path: Path) -> None:
    sae = planted_sae(8, 32, architecture="relu", seed=1)
    alone = SAE(sae.config, sae.weights._replace(W_dec=None))
    with pytest.raises(SAEFormatError, match="found no decoder, which is not written"):
        save_saelens(alone, tmp_path / "sae")


def write_training_checkpoint(folder: Path, *, rescale: bool, threshold: float = 0.5) -> SAEWeights:
    """A folder as training leaves it: decoder norms unfolded, one float64 threshold."""
    generator = torch.Generator().manual_seed(5)
    W_dec = torch.randn(20, 6, generator=generator)
    W_dec[3] = 0
    weights = SAEWeights(
        torch.randn(6, 20, generator=generator),
        torch.randn(20, generator=generator),
        W_dec,
        torch.randn(6, generator=generator),
    )
    save_saelens(SAE(SAEConfig(architecture="relu", d_in=6, d_sae=20), weights), folder)
    change_cfg(folder, architecture="batchtopk", rescale_acts_by_decoder_norm=rescale, k=4)
    scalar = torch.tensor(threshold, dtype=torch.float64)
    save_file(load_file(folder / WEIGHTS) | {"topk_threshold": scalar}, folder / WEIGHTS)
    return weights


def change_cfg(folder: Path, **changes: object) -> None:
    cfg = json.loads((folder / CFG).read_text())
    cfg |= changes
    cfg = {key: value for key, value in cfg.items() if value is not ...}
    (folder / CFG).write_text(json.dumps(cfg))


@pytest.mark.parametrize("rescale", [True, False])
def test_training_checkpoint_uses_its_stored_threshold(tmp_path: Path, rescale: bool) -> None:
    weights = write_training_checkpoint(tmp_path, rescale=rescale)
    assert weights.b_enc is not None
    W_enc, b_enc, W_dec, b_dec = (w.double().numpy() for w in weights[:4] if w is not None)
    norms = np.linalg.norm(W_dec, axis=1) if rescale else np.ones(20)
    x = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)
    scaled = (x @ W_enc + b_enc) * norms
    acts = np.where(scaled > 0.5, scaled, 0.0)
    recons = acts / np.where(norms > 0, norms, 1) @ W_dec + b_dec
    sae = load_sae(tmp_path)
    assert sae.config.architecture == "batchtopk"
    found = sae.encode(torch.from_numpy(x))
    assert np.array_equal(found.numpy() > 0, acts > 0)
    np.testing.assert_allclose(found.numpy(), acts, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae.decode(found).numpy(), recons, rtol=1e-4, atol=1e-4)


def write_scaler(folder: Path) -> None:
    (folder / SCALER).write_text(json.dumps({"scaling_factor": 2.5}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (write_scaler, f"{SCALER}: scaling_factor: found 2.5, expected null"),
        (
            lambda f: change_cfg(f, rescale_acts_by_decoder_norm=...),
            "rescale_acts_by_decoder_norm: found no such key, expected true or false",
        ),
    ],
)
def test_ambiguous_training_checkpoint_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    write_training_checkpoint(tmp_path, rescale=True)
    damage(tmp_path)
    with pytest.raises(SAEFormatError, match=said):
        load_sae(tmp_path).slice([3])


def test_training_checkpoint_without_an_estimated_threshold_is_refused(tmp_path: Path) -> None:
    write_training_checkpoint(tmp_path, rescale=False, threshold=0.0)
    with pytest.raises(SAEFormatError, match=r"topk_threshold: found 0\.0, expected the positive"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"d_in": 9}, r"W_enc has shape \(8, 32\), expected \(9, 32\)"),
        ({"d_sae": "32"}, "d_sae: found '32', expected a whole number from 1"),
        ({"d_in": ...}, "d_in: found no such key, expected a whole number from 1"),
        ({"dtype": "int8"}, "dtype: found 'int8', expected one of float32, bfloat16"),
        ({"architecture": "crosscoder"}, "architecture: found 'crosscoder', expected one of"),
        ({"architecture": "jumprelu"}, "tensors: found .*, expected .*, threshold"),
        ({"architecture": "topk"}, "k: found no such key, expected a whole number from 1"),
        ({"architecture": "topk", "k": 33}, "k is 33, expected 1 to d_sae, which is 32"),
        ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input: found 'yes', expected true"),
        (
            {"normalize_activations": "expected_average_only_in"},
            "normalize_activations: found 'expected_average_only_in', .* does not have the factor",
        ),
        (
            {"metadata": {"hook_head_index": "3"}},
            "metadata.hook_head_index: found '3', expected a whole number from 0, or null",
        ),
        ({"architecture": "temporal"}, "temporal is not read: a latent's activation depends on"),
        ({"reshape_activations": "heads"}, "reshape_activations: found 'heads', expected none or"),
    ],
)
def test_cfg_that_contradicts_is_refused_by_key(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    save_saelens(planted_sae(8, 32, architecture="relu", seed=1), tmp_path)
    change_cfg(tmp_path, **changes)
    with pytest.raises(SAEFormatError, match=said) as caught:
        load_sae(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def poison(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["b_enc"][3] = torch.nan
    save_file(tensors, folder / WEIGHTS)


def make_integer(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"b_dec": torch.zeros(8, dtype=torch.int32)}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / CFG).write_text("{"), "cfg.json: cannot be read as JSON"),
        (lambda f: (f / CFG).write_text("[]"), "cfg.json: found list, expected a JSON object"),
        (lambda f: (f / WEIGHTS).write_bytes(b"x" * 99), "cannot be read as safetensors"),
        (poison, "b_enc: found 1 numbers not finite, expected none"),
        (make_integer, "b_dec: found I32, expected floating point"),
    ],
)
def test_damaged_files_are_refused_by_name(
    tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    save_saelens(planted_sae(8, 32, architecture="relu", seed=1), tmp_path)
    damage(tmp_path)
    with pytest.raises(SAEFormatError, match=said):
        load_sae(tmp_path).slice([3])
