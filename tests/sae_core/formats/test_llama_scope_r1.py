"""Llama-Scope-R1-Distill folders against the formula in float64."""

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
from sae_core.formats.llama_scope_r1 import CFG, WEIGHTS
from sae_core.formats.openmoss import NORMS

D_IN, D_SAE = 6, 20
HOOK = "blocks.15.hook_resid_post"
CONFIG: dict[str, Any] = {
    "sae_type": "sae",
    "d_model": D_IN,
    "expansion_factor": 3.4,  # 20.4, cut to 20
    "act_fn": "jumprelu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "use_decoder_bias": True,
    "use_glu_encoder": False,
    "hook_point_in": HOOK,
    "hook_point_out": HOOK,
}


def write(folder: Path, norm: float | None = 4.5, **changes: object) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    cfg = CONFIG | changes
    shapes = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,)}
    shapes["decoder.weight"] = (D_IN, D_SAE)
    if cfg["use_decoder_bias"]:
        shapes["decoder.bias"] = (D_IN,)
    if cfg["use_glu_encoder"]:
        shapes |= {"encoder_glu.weight": (D_SAE, D_IN), "encoder_glu.bias": (D_SAE,)}
    tensors = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    if cfg["act_fn"] in ("jumprelu", ...):
        tensors["log_jumprelu_threshold"] = torch.randn(D_SAE, generator=generator)
    if norm is not None:
        tensors[f"{NORMS}.{cfg['hook_point_in']}"] = torch.tensor(norm)
        tensors[f"{NORMS}.{cfg['hook_point_out']}"] = torch.tensor(norm)
    save_file(tensors, folder / WEIGHTS)
    (folder / CFG).write_text(json.dumps({k: v for k, v in cfg.items() if v is not ...}))
    return tensors


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"act_fn": "relu"},
        {"act_fn": ...},
        {"sparsity_include_decoder_norm": False},
        {"use_decoder_bias": False},
        {"use_glu_encoder": True},
        {"apply_decoder_bias_to_pre_encoder": True},
        {"norm_activation": "inference"},
        {"norm_activation": "token-wise"},
    ],
)
def test_activations_are_the_formulas(tmp_path: Path, changes: dict[str, Any]) -> None:
    w = {name: t.double().numpy() for name, t in write(tmp_path, **changes).items()}
    cfg = CONFIG | changes
    x = np.random.default_rng(3).normal(size=(60, D_IN)).astype(np.float32) * 2
    s: Any = {"dataset-wise": D_IN**0.5 / 4.5, "inference": 1.0}.get(cfg["norm_activation"])
    if s is None:
        s = D_IN**0.5 / np.linalg.norm(x, axis=1, keepdims=True)
    bias = w.get("decoder.bias", np.zeros(D_IN))
    z = x * s - (bias if cfg.get("apply_decoder_bias_to_pre_encoder") else 0)
    h = z @ w["encoder.weight"].T + w["encoder.bias"]
    if cfg["use_glu_encoder"]:
        h /= 1 + np.exp(-(z @ w["encoder_glu.weight"].T + w["encoder_glu.bias"]))
    norms = np.linalg.norm(w["decoder.weight"], axis=0)
    judged = h * (norms if cfg["sparsity_include_decoder_norm"] else 1)
    logarithms = w.get("log_jumprelu_threshold")
    acts = h * (judged > (0 if logarithms is None else np.exp(logarithms)))
    recons = (acts @ w["decoder.weight"].T + bias) / s
    sae = load_sae(tmp_path)
    found = sae.encode(torch.from_numpy(x))
    assert np.array_equal(found.numpy() > 0, acts > 0)
    assert 0.1 < (acts > 0).mean() < 0.9
    np.testing.assert_allclose(found.numpy(), acts, rtol=1e-5, atol=1e-5)
    decoded = sae.decode(found, torch.from_numpy(x))
    np.testing.assert_allclose(decoded.numpy(), recons, rtol=1e-4, atol=1e-4)
    ids = [17, 0, 4]
    assert torch.equal(load_sae(tmp_path).slice(ids)(torch.from_numpy(x)), found[:, ids])
    assert (sae.card.hook_point, sae.card.hook_point_out) == (HOOK, None)


@pytest.mark.parametrize("norm", [None, 0.0, -4.5, 1e-42, 3e33, float("nan")])
def test_mean_length_that_was_never_measured_is_refused(tmp_path: Path, norm: float | None) -> None:
    write(tmp_path, norm=norm)
    with pytest.raises(SAEFormatError, match=f"{NORMS}.{HOOK}"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"act_fn": "topk"}, "act_fn: found 'topk', .*lets negative pre-activations through"),
        ({"act_fn": "gelu"}, "act_fn: found 'gelu', expected one of jumprelu, relu"),
        ({"norm_activation": "batch-wise"}, "norm_activation: found 'batch-wise', .*neighbours"),
        ({"expansion_factor": 4}, r"W_enc has shape \(6, 20\), expected \(6, 24\)"),
        ({"expansion_factor": "4"}, "expansion_factor: found '4', expected a finite number"),
        ({"use_decoder_bias": None}, "use_decoder_bias: found None, expected true or false"),
    ],
)
def test_what_cannot_be_right_is_refused_by_key(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    write(tmp_path, **changes)
    with pytest.raises(SAEFormatError, match=said):
        load_sae(tmp_path)
