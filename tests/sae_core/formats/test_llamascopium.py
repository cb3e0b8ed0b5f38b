"""llamascopium folders against the formula in float64, and the containers it writes."""

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
from sae_core.formats.llamascopium import (
    CFG,
    SHARDED_WEIGHTS,
    THRESHOLD,
    TORCH_WEIGHTS,
    WEIGHTS,
)
from sae_core.formats.openmoss import NORMS

D_IN, D_SAE = 6, 20
READ, PREDICTED = "blocks.5.ln2.hook_normalized", "blocks.5.hook_mlp_out"
CONFIG: dict[str, Any] = {
    "sae_type": "sae",
    "d_model": D_IN,
    "expansion_factor": 3.4,  # 20.4, cut to 20
    "act_fn": "jumprelu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "top_k": 5,
    "use_decoder_bias": True,
    "use_glu_encoder": False,
    "hook_point_in": READ,
    "hook_point_out": READ,
}
MEAN_LENGTHS = {READ: 4.5, PREDICTED: 0.7}


def write(folder: Path, *, as_torch: bool = False, **changes: object) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    cfg = CONFIG | changes
    shapes = {"W_E": (D_IN, D_SAE), "b_E": (D_SAE,), "W_D": (D_SAE, D_IN)}
    if cfg["use_decoder_bias"]:
        shapes["b_D"] = (D_IN,)
    if cfg["use_glu_encoder"]:
        shapes |= {"W_E_glu": (D_IN, D_SAE), "b_E_glu": (D_SAE,)}
    tensors = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    if cfg["act_fn"] == "jumprelu":
        tensors[THRESHOLD] = torch.randn(D_SAE, generator=generator)
        tensors[THRESHOLD][3] = -torch.inf  # a converted SAE's threshold of 0
    for hook_point in {cfg["hook_point_in"], cfg["hook_point_out"]}:
        tensors[f"{NORMS}.{hook_point}"] = torch.tensor(MEAN_LENGTHS[hook_point])
    if as_torch:
        torch.save({"sae": tensors, "version": "2.0.0"}, folder / TORCH_WEIGHTS)
    else:
        save_file(tensors, folder / WEIGHTS)
    (folder / CFG).write_text(json.dumps(cfg))
    return tensors


@pytest.mark.parametrize("as_torch", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"act_fn": "relu"},
        {"act_fn": "topk"},
        {"act_fn": "topk", "sparsity_include_decoder_norm": False},
        {"sparsity_include_decoder_norm": False},
        {"use_decoder_bias": False},
        {"use_glu_encoder": True},
        {"norm_activation": "inference"},
        {"norm_activation": "token-wise"},
        {"hook_point_out": PREDICTED},
        {"hook_point_out": PREDICTED, "norm_activation": "token-wise"},
    ],
)
def test_activations_are_the_formulas(
    tmp_path: Path, changes: dict[str, Any], as_torch: bool
) -> None:
    w = {n: t.double().numpy() for n, t in write(tmp_path, as_torch=as_torch, **changes).items()}
    cfg = CONFIG | changes
    is_sae = cfg["hook_point_in"] == cfg["hook_point_out"]
    x = np.random.default_rng(3).normal(size=(60, D_IN)).astype(np.float32) * 2
    s_in: Any = 1.0
    s_out: Any = 1.0
    if cfg["norm_activation"] == "dataset-wise":
        s_in, s_out = (D_IN**0.5 / MEAN_LENGTHS[cfg[f"hook_point_{s}"]] for s in ("in", "out"))
    elif cfg["norm_activation"] == "token-wise":
        s_in = D_IN**0.5 / np.linalg.norm(x, axis=1, keepdims=True)
        s_out = s_in if is_sae else 1.0  # a transcoder's target is not there to be measured
    h = x * s_in @ w["W_E"] + w["b_E"]
    if cfg["use_glu_encoder"]:
        h /= 1 + np.exp(-(x * s_in @ w["W_E_glu"] + w["b_E_glu"]))
    norms = np.linalg.norm(w["W_D"], axis=1) if cfg["sparsity_include_decoder_norm"] else 1.0
    judged = h * norms
    if cfg["act_fn"] == "jumprelu":
        acts = judged * (judged > np.exp(w[THRESHOLD])) / norms
    else:
        acts = np.maximum(judged, 0)
        if cfg["act_fn"] == "topk":
            acts *= acts >= np.sort(acts, axis=1)[:, -5, None]
        acts /= norms
    recons = (acts @ w["W_D"] + w.get("b_D", 0)) / s_out
    sae = load_sae(tmp_path)
    found = sae.encode(torch.from_numpy(x))
    assert np.array_equal(found.numpy() > 0, acts > 0)
    assert 0.1 < (acts > 0).mean() < 0.9
    np.testing.assert_allclose(found.numpy(), acts, rtol=1e-5, atol=1e-5)
    decoded = sae.decode(found, torch.from_numpy(x))
    np.testing.assert_allclose(decoded.numpy(), recons, rtol=1e-4, atol=1e-4)
    ids = [17, 0, 3]
    assert torch.equal(load_sae(tmp_path).slice(ids)(torch.from_numpy(x)), found[:, ids])
    assert sae.card.hook_point_out == (None if is_sae else PREDICTED)


@pytest.mark.parametrize("norm", [0.0, -4.5, 1e-42, 3e33, float("nan")])
def test_mean_length_that_was_never_measured_is_refused(tmp_path: Path, norm: float) -> None:
    tensors = write(tmp_path)
    save_file(tensors | {f"{NORMS}.{READ}": torch.tensor(norm)}, tmp_path / WEIGHTS)
    with pytest.raises(SAEFormatError, match=f"{NORMS}.{READ}: found"):
        load_sae(tmp_path)


def test_mean_length_that_is_not_used_may_be_anything(tmp_path: Path) -> None:
    tensors = write(tmp_path, norm_activation="inference")
    save_file(tensors | {f"{NORMS}.{READ}": torch.tensor(torch.nan)}, tmp_path / WEIGHTS)
    assert load_sae(tmp_path).config.input_scale == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sae_type": "clt"}, "sae_type: found 'clt', expected sae"),
        ({"act_fn": "batchtopk"}, "act_fn: found 'batchtopk', .*neighbours"),
        ({"act_fn": "layertopk"}, "act_fn: found 'layertopk', expected one of"),
        ({"act_fn": "topk", "top_k": 21}, "k is 21, expected 1 to d_sae, which is 20"),
        ({"norm_activation": "batch-wise"}, "norm_activation: found 'batch-wise', .*neighbours"),
        ({"expansion_factor": 4}, r"W_enc has shape \(6, 20\), expected \(6, 24\)"),
    ],
)
def test_what_cannot_be_right_is_refused_by_key(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    write(tmp_path, **changes)
    with pytest.raises(SAEFormatError, match=said) as caught:
        load_sae(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_distributed_checkpoint_is_refused_with_the_reason(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / SHARDED_WEIGHTS).mkdir()
    with pytest.raises(SAEFormatError, match=r"found sae_weights\.dcp, expected .*pickle"):
        load_sae(tmp_path)


def test_torch_file_of_another_layout_is_refused(tmp_path: Path) -> None:
    tensors = write(tmp_path, as_torch=True)
    torch.save(tensors, tmp_path / TORCH_WEIGHTS)
    with pytest.raises(SAEFormatError, match=r"sae_weights\.pt: sae: found no such key, expected"):
        load_sae(tmp_path)


def test_damaged_weights_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"x" * 99)
    with pytest.raises(SAEFormatError, match=r"sae_weights\.safetensors: cannot be read as safe"):
        load_sae(tmp_path)
