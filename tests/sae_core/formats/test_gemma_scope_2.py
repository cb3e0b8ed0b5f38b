"""Gemma Scope 2 folders written here: the formula in float64, configs, and paths without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae_core.errors import SAEFormatError
from sae_core.formats import load_sae
from sae_core.formats.gemma_scope_2 import CFG, SKIP, WEIGHTS

D_IN, D_SAE, D_OUT = 9, 40, 7
X = np.random.default_rng(1).normal(size=(30, D_IN)).astype(np.float32)
BASE = {
    "hf_hook_point_in": "model.layers.17.output",
    "hf_hook_point_out": "model.layers.17.output",
    "width": D_SAE,
    "model_name": "google/gemma-3-1b-pt",
    "architecture": "jump_relu",
    "affine_connection": False,
    "type": "sae",
}
TRANSCODER = BASE | {
    "hf_hook_point_in": "model.layers.17.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.17.post_feedforward_layernorm.output",
    "type": "transcoder",
}


def write(
    folder: Path,
    cfg: dict[str, Any] | None,
    *,
    d_out: int = D_IN,
    affine: bool = False,
    file: str = WEIGHTS,
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = {
        "w_enc": (D_IN, D_SAE),
        "w_dec": (D_SAE, d_out),
        "b_enc": (D_SAE,),
        "b_dec": (d_out,),
        "threshold": (D_SAE,),
    }
    if affine:
        shapes[SKIP] = (D_IN, d_out)
    w = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.from_numpy(t) for name, t in w.items()}, folder / file)
    if cfg is not None:
        (folder / CFG).write_text(json.dumps(cfg))
    return {name: tensor.astype(np.float64) for name, tensor in w.items()}


def expected(w: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    x = X.astype(np.float64)
    h = x @ w["w_enc"] + w["b_enc"]
    acts = np.maximum(h, 0) * (h > w["threshold"])
    recons = acts @ w["w_dec"] + w["b_dec"]
    return acts, recons + x @ w[SKIP] if SKIP in w else recons


@pytest.mark.parametrize("cfg", [BASE, None])
def test_sae_computes_jumprelu_without_an_input_bias(
    tmp_path: Path, cfg: dict[str, Any] | None, assert_computes: Callable[..., None]
) -> None:
    w = write(tmp_path, cfg)
    assert_computes(lambda: load_sae(tmp_path), X, *expected(w))
    assert_computes(lambda: load_sae(tmp_path / WEIGHTS), X, *expected(w))


@pytest.mark.parametrize("affine", [False, True])
def test_transcoder_adds_its_affine_connection(
    tmp_path: Path, affine: bool, assert_computes: Callable[..., None]
) -> None:
    w = write(tmp_path, TRANSCODER | {"affine_connection": affine}, d_out=D_OUT, affine=affine)
    assert_computes(lambda: load_sae(tmp_path), X, *expected(w))
    card = load_sae(tmp_path).card
    assert card.hook_point == "model.layers.17.pre_feedforward_layernorm.output"
    assert card.hook_point_out == "model.layers.17.post_feedforward_layernorm.output"


AFTER_MLP = "model.layers.5.post_feedforward_layernorm.output"


@pytest.mark.parametrize(
    ("inner", "reads", "predicts"),
    [
        ("resid_post/layer_5_width_16k_l0_small", "model.layers.5.output", None),
        ("resid_post_all/layer_5_width_1m_l0_big", "model.layers.5.output", None),
        (
            "attn_out/layer_5_width_16k_l0_medium",
            "model.layers.5.self_attn.o_proj.input",
            None,
        ),
        ("mlp_out/layer_5_width_16k_l0_medium", AFTER_MLP, None),
        (
            "transcoder_all/layer_5_width_16k_l0_small_affine",
            "model.layers.5.pre_feedforward_layernorm.output",
            AFTER_MLP,
        ),
        ("renamed", None, None),
    ],
)
def test_folder_without_config_is_read_by_its_path(
    tmp_path: Path, inner: str, reads: str | None, predicts: str | None
) -> None:
    repo = tmp_path / "models--google--gemma-scope-2-4b-it/snapshots/0a1"
    write(repo / inner, None, affine="affine" in inner)
    for card in (
        load_sae(repo, subfolder=inner).card,
        load_sae(repo, subfolder=inner, weights_file=WEIGHTS).card,
    ):
        assert (card.hook_point, card.hook_point_out) == (reads, predicts)
        assert card.model_name == "google/gemma-3-4b-it"


@pytest.mark.parametrize(
    ("found", "hub_name"),
    [
        ("google/gemma-3-1b-pt", "google/gemma-3-1b-pt"),
        ("gemma-v3-1b-it", "google/gemma-3-1b-it"),
        ("gemma-3-270m-pt", "google/gemma-3-270m"),
    ],
)
def test_model_is_named_as_the_hub_has_it(tmp_path: Path, found: str, hub_name: str) -> None:
    write(tmp_path, BASE | {"model_name": found})
    assert load_sae(tmp_path).card.model_name == hub_name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"type": "crosscoder"}, "type: found 'crosscoder', .*it reads several layers at once"),
        ({"type": "clt"}, "type: found 'clt', .*its latents write to several layers"),
        ({"architecture": "relu"}, "architecture: found 'relu', expected one of jump_relu"),
        ({"width": 41}, "width: found 41, expected 40, the width of w_enc"),
        (
            {"affine_connection": True},
            "affine_connection: found True, expected to fit params.safetensors, which has no aff",
        ),
    ],
)
def test_config_that_contradicts_is_refused_by_key(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    write(tmp_path, BASE | changes)
    with pytest.raises(SAEFormatError, match=said):
        load_sae(tmp_path)


def test_cross_layer_transcoder_is_refused_with_the_reason(tmp_path: Path) -> None:
    name = "layer_5_width_262k_l0_big_affine.safetensors"
    write(tmp_path / "clt", None, affine=True, file=name)
    with pytest.raises(SAEFormatError, match="found a clt, .*its latents write to several layers"):
        load_sae(tmp_path / "clt" / name)
