"""Llama Scope folders against lm-saes' own order of folding, in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae_core.errors import SAEFormatError
from sae_core.formats import load_sae
from sae_core.formats.llama_scope import CFG, WEIGHTS

D_IN, D_SAE = 6, 20
HYPERPARAMETERS: dict[str, Any] = {
    "hook_point_in": "blocks.3.hook_resid_post",
    "hook_point_out": "blocks.3.hook_resid_post",
    "d_model": D_IN,
    "d_sae": D_SAE,
    "act_fn": "jumprelu",
    "jump_relu_threshold": 0.4,
    "top_k": 5,
    "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 4.5, "out": 4.5},
    "sparsity_include_decoder_norm": True,
    "use_decoder_bias": True,
    "apply_decoder_bias_to_pre_encoder": False,
    "use_glu_encoder": False,
    "dtype": "torch.bfloat16",
}
TRANSCODER = {
    "hook_point_in": "blocks.3.ln2.hook_normalized",
    "hook_point_out": "blocks.3.hook_mlp_out",
    "dataset_average_activation_norm": {"in": 4.5, "out": 0.7},
}


def write(folder: Path, **changes: object) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    cfg = HYPERPARAMETERS | changes
    cfg = {key: value for key, value in cfg.items() if value is not ...}
    shapes = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,)}
    shapes["decoder.weight"] = (D_IN, D_SAE)
    if cfg["use_decoder_bias"]:
        shapes["decoder.bias"] = (D_IN,)
    if cfg["use_glu_encoder"]:
        shapes |= {"encoder_glu.weight": (D_SAE, D_IN), "encoder_glu.bias": (D_SAE,)}
    tensors = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
    (folder / "checkpoints").mkdir()
    (folder / CFG).write_text(json.dumps(cfg))
    save_file(tensors, folder / WEIGHTS)
    return cfg, tensors


def gated(h: np.ndarray, cfg: dict[str, Any]) -> np.ndarray:
    if cfg["act_fn"] == "jumprelu":
        return np.where(h > cfg["jump_relu_threshold"], h, 0)
    acts = np.maximum(h, 0)
    if cfg["act_fn"] == "topk":
        kth = np.sort(acts, axis=1)[:, -cfg["top_k"], None]
        acts = np.where(acts >= kth, acts, 0)
    return acts


def folded(
    x: np.ndarray, cfg: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """What lm-saes does on loading, and then with raw activations."""
    w = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    We, be, Wd = w["encoder.weight"].T, w["encoder.bias"], w["decoder.weight"].T
    bd = w.get("decoder.bias", np.zeros(D_IN))
    lengths = np.ones((len(x), 1))
    if cfg["norm_activation"] == "dataset-wise":
        s_in, s_out = (D_IN**0.5 / cfg["dataset_average_activation_norm"][s] for s in ("in", "out"))
        be, bd, Wd = be / s_in, bd / s_out, Wd * s_in / s_out
    elif cfg["norm_activation"] == "token-wise":
        lengths = np.linalg.norm(x, axis=1, keepdims=True) / D_IN**0.5
    if cfg["sparsity_include_decoder_norm"]:
        norms = np.linalg.norm(Wd, axis=1)
        We, be, Wd = We * norms, be * norms, Wd / norms[:, None]
    z = x / lengths - (bd if cfg["apply_decoder_bias_to_pre_encoder"] else 0)
    acts = gated(z @ We + be, cfg)
    is_sae = cfg["hook_point_in"] == cfg["hook_point_out"]
    return acts, (acts @ Wd + bd) * (lengths if is_sae else 1)


def inputs() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(60, D_IN)).astype(np.float32) * 2


CASES: tuple[dict[str, Any], ...] = (
    {},
    {"act_fn": "relu"},
    {"act_fn": "topk"},
    {"act_fn": "topk", "sparsity_include_decoder_norm": False},
    {"sparsity_include_decoder_norm": False},
    {"apply_decoder_bias_to_pre_encoder": True},
    {"use_decoder_bias": False},
    {"norm_activation": "inference", "dataset_average_activation_norm": None},
    {"norm_activation": "token-wise", "dataset_average_activation_norm": None},
    {"norm_activation": "token-wise", "apply_decoder_bias_to_pre_encoder": True},
    TRANSCODER,
    TRANSCODER | {"act_fn": "topk"},
    TRANSCODER | {"sparsity_include_decoder_norm": False},
    TRANSCODER | {"norm_activation": "token-wise"},
)


@pytest.mark.parametrize("changes", CASES)
def test_raw_scale_is_the_librarys_fold(tmp_path: Path, changes: dict[str, Any]) -> None:
    cfg, tensors = write(tmp_path, **changes)
    x = inputs()
    acts, recons = folded(x, cfg, tensors)
    sae = load_sae(tmp_path)
    found = sae.encode(torch.from_numpy(x))
    assert np.array_equal(found.numpy() > 0, acts > 0)
    assert 0.1 < (acts > 0).mean() < 0.9
    np.testing.assert_allclose(found.numpy(), acts, rtol=1e-5, atol=1e-5)
    decoded = sae.decode(found, torch.from_numpy(x))
    np.testing.assert_allclose(decoded.numpy(), recons, rtol=1e-4, atol=1e-4)
    assert torch.equal(
        load_sae(tmp_path).slice([17, 0, 4])(torch.from_numpy(x)), found[:, [17, 0, 4]]
    )


@pytest.mark.parametrize("changes", [c for c in CASES if "norm_activation" not in c])
def test_training_scale_differs_by_the_scale_of_the_inputs(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    cfg, tensors = write(tmp_path, **changes)
    x = inputs()
    acts, recons = folded(x, cfg, tensors)
    s_in = D_IN**0.5 / 4.5
    sae = load_sae(tmp_path, training_scale=True)
    found = sae.encode(torch.from_numpy(x))
    assert np.array_equal(found.numpy() > 0, acts > 0)
    np.testing.assert_allclose(found.numpy(), acts * s_in, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae.decode(found).numpy(), recons, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training_scale", [True, False])
@pytest.mark.parametrize("changes", [{}, TRANSCODER])
def test_glu_sees_the_input_it_was_trained_on(
    tmp_path: Path, changes: dict[str, Any], training_scale: bool
) -> None:
    """lm-saes' fold leaves the GLU's weights behind; training's formula has no such gap."""
    cfg, tensors = write(tmp_path, use_glu_encoder=True, **changes)
    w = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    s_in, s_out = (D_IN**0.5 / cfg["dataset_average_activation_norm"][s] for s in ("in", "out"))
    x = inputs()
    z = x * s_in
    h = z @ w["encoder.weight"].T + w["encoder.bias"]
    h /= 1 + np.exp(-(z @ w["encoder_glu.weight"].T + w["encoder_glu.bias"]))
    norms = np.linalg.norm(w["decoder.weight"], axis=0) * s_in / s_out
    raw = gated(h * norms / s_in, cfg)
    recons = (raw * s_in / norms @ w["decoder.weight"].T + w["decoder.bias"]) / s_out
    sae = load_sae(tmp_path, training_scale=training_scale)
    found = sae.encode(torch.from_numpy(x))
    expected = raw * (s_in if training_scale else 1)
    assert np.array_equal(found.numpy() > 0, expected > 0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae.decode(found).numpy(), recons, rtol=1e-4, atol=1e-4)


def test_card_names_both_places_of_a_transcoder_and_the_scale(tmp_path: Path) -> None:
    write(tmp_path, **TRANSCODER)
    card = load_sae(tmp_path).card
    assert card.hook_point == "blocks.3.ln2.hook_normalized"
    assert card.hook_point_out == "blocks.3.hook_mlp_out"
    assert "the raw scale" in card.notes[0]
    assert "training's scale" in load_sae(tmp_path, training_scale=True).card.notes[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm_activation": "batch-wise"}, "norm_activation: found 'batch-wise', .*neighbours"),
        ({"norm_activation": ...}, "norm_activation: found no such key, expected one of"),
        ({"dataset_average_activation_norm": None}, "norm: found None, expected an object"),
        ({"dataset_average_activation_norm": {"in": 3.0}}, "norm.out: found no such key"),
        *(
            (
                {"dataset_average_activation_norm": {"in": bad, "out": 3.0}},
                "dataset_average_activation_norm.in: found .*, expected",
            )
            for bad in (0, -3.0, 1e-40, 1e30, float("nan"), float("inf"), "3")
        ),
        ({"act_fn": "batchtopk"}, "act_fn: found 'batchtopk', expected one of jumprelu"),
        ({"jump_relu_threshold": -0.1}, "jump_relu_threshold: found -0.1, expected a number from"),
        ({"sparsity_include_decoder_norm": ...}, "sparsity_include_decoder_norm: found no such"),
        ({"use_glu_encoder": "no"}, "use_glu_encoder: found 'no', expected true or false"),
        ({"d_sae": 21}, r"W_enc has shape \(6, 20\), expected \(6, 21\)"),
        ({"hook_point_in": None}, "hook_point_in: found None, expected the name of a hook point"),
    ],
)
def test_what_cannot_be_right_is_refused_by_key(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    write(tmp_path, **changes)
    with pytest.raises(SAEFormatError, match=said) as caught:
        load_sae(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_training_scale_needs_a_scale(tmp_path: Path) -> None:
    write(tmp_path, norm_activation="inference")
    with pytest.raises(SAEFormatError, match="expected dataset-wise with the hint training_scale"):
        load_sae(tmp_path, training_scale=True)
    assert load_sae(tmp_path, training_scale=False).config.input_scale == 1


def test_tensors_that_the_config_does_not_speak_of_are_refused(tmp_path: Path) -> None:
    cfg, _ = write(tmp_path, use_glu_encoder=True)
    (tmp_path / CFG).write_text(json.dumps(cfg | {"use_glu_encoder": False}))
    with pytest.raises(SAEFormatError, match="tensors: found .*encoder_glu"):
        load_sae(tmp_path)
