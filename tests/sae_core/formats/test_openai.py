"""OpenAI's files against the formula in float64, and what their path says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_core.errors import SAEFormatError
from sae_core.formats import load_sae

D_IN, D_SAE, K = 6, 20, 5
TOPK = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
IDENTITY = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "Identity"}}


def write(file: Path, **more: object) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(7)
    shapes = {
        "pre_bias": (D_IN,),
        "latent_bias": (D_SAE,),
        "encoder.weight": (D_SAE, D_IN),
        "decoder.weight": (D_IN, D_SAE),
    }
    tensors = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    statistics = {
        "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long),
        "latents_activation_frequency": torch.zeros(D_SAE),
        "latents_mean_square": torch.zeros(D_SAE),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors | statistics | more, file)
    return {name: tensor.double().numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("latent_shift", [0.0, -9.0])
@pytest.mark.parametrize("more", [TOPK, IDENTITY, {}, {"activation": "ReLU"}])
def test_activations_are_the_formulas(
    tmp_path: Path, more: dict[str, Any], latent_shift: float
) -> None:
    """With biases far below 0 fewer than k are positive: rectified they are fewer, signed they
    stay k, negative."""
    file = tmp_path / "8.pt"
    bias = torch.randn(D_SAE, generator=torch.Generator().manual_seed(2)) + latent_shift
    w = write(file, latent_bias=bias, **more)
    x = np.random.default_rng(3).normal(size=(60, D_IN)).astype(np.float32) * 2 + 1
    mean, std = np.zeros((60, 1)), np.ones((60, 1))
    z = x.astype(np.float64)
    if more.get("activation") == "TopK":
        mean, std = x.mean(axis=1, keepdims=True), x.std(axis=1, ddof=1, keepdims=True)
        z = (x.astype(np.float64) - mean) / (std + 1e-5)
    h = (z - w["pre_bias"]) @ w["encoder.weight"].T + bias.double().numpy()
    acts = h
    if more.get("activation") == "TopK":
        acts = h * (h >= np.sort(h, axis=1)[:, -K, None])
    if more is not IDENTITY:
        acts = np.maximum(acts, 0)
    recons = (acts @ w["decoder.weight"].T + w["pre_bias"]) * std + mean
    sae = load_sae(file)
    found = sae.encode(torch.from_numpy(x))
    assert np.array_equal(found.numpy() != 0, acts != 0)
    assert (acts < 0).any() == (more is IDENTITY and latent_shift < 0)
    np.testing.assert_allclose(found.numpy(), acts, rtol=1e-4, atol=1e-4)
    decoded = sae.decode(found, torch.from_numpy(x))
    np.testing.assert_allclose(decoded.numpy(), recons, rtol=1e-4, atol=1e-3)
    ids = [17, 0, 4]
    assert torch.equal(load_sae(file).slice(ids)(torch.from_numpy(x)), found[:, ids])


@pytest.mark.parametrize(
    ("path", "hook_point", "model"),
    [
        ("gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt", "8.hook_resid_post", "gpt2"),
        ("gpt2-small/resid_post_attn_v5_128k/autoencoders/0.pt", "0.hook_resid_mid", "gpt2"),
        ("gpt2-small/resid_delta_mlp_v4/autoencoders/11.pt", "11.hook_mlp_out", "gpt2"),
        ("resid_delta_attn/autoencoders/3.pt", "3.hook_attn_out", None),
        ("mlp_post_act/3.pt", "3.mlp.hook_post", None),
        ("resid_post_mlp/autoencoders/best.pt", None, None),
        ("resid_pre_mlp/autoencoders/3.pt", None, None),
    ],
)
def test_place_is_in_the_path(
    tmp_path: Path, path: str, hook_point: str | None, model: str | None
) -> None:
    write(tmp_path / path, **TOPK)
    card = load_sae(tmp_path / path).card
    assert card.hook_point == (None if hook_point is None else f"blocks.{hook_point}")
    assert card.model_name == model
    assert load_sae((tmp_path / path).parent).card == card


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"activation": "JumpReLU"}, "activation: found 'JumpReLU', expected one of TopK, ReLU"),
        ({"activation": "TopK"}, "activation_state_dict: found no such key, expected an object"),
        ({"activation_state_dict": {"k": 3}}, "activation: found no such key, expected TopK"),
        ({"activation.k": 3}, "activation: found no such key, expected TopK, as the file has"),
        (
            {"activation": "TopK", "activation_state_dict": {"k": 0, "postact_fn": "ReLU"}},
            "activation_state_dict.k: found 0, expected a whole number from 1",
        ),
        (
            {"activation": "TopK", "activation_state_dict": {"k": 3, "postact_fn": "GELU"}},
            "activation_state_dict.postact_fn: found 'GELU', expected one of ReLU, Identity",
        ),
        (
            {"activation": "TopK", "activation_state_dict": {"k": 21, "postact_fn": "ReLU"}},
            "k is 21, expected 1 to d_sae, which is 20",
        ),
        ({"encoder.bias": torch.zeros(D_SAE)}, "tensors: found .*encoder.bias"),
        ({"encoder.weight": torch.zeros(D_SAE)}, r"encoder.weight: found shape \[20\], expected 2"),
        ({"pre_bias": torch.zeros(7)}, r"b_dec has shape \(7,\), expected \(6,\)"),
        ({"latent_bias": torch.zeros(20, dtype=torch.int32)}, "tensors: found .*expected .*latent"),
    ],
)
def test_what_cannot_be_right_is_refused_by_key(
    tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    write(tmp_path / "8.pt", **more)
    with pytest.raises(SAEFormatError, match=said) as caught:
        load_sae(tmp_path / "8.pt")
    assert "8.pt: " in str(caught.value)
