"""Attention SAEs written here, against the formula in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_core.errors import SAEFormatError
from sae_core.formats import load_sae

D_IN, D_SAE = 8, 40
NAME = "gpt2-small_L5_Hcat_z_lr1.20e-03"
"""A dot in it, as in the published ones."""


def write(folder: Path, **cfg: object) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    w = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    torch.save({name: torch.from_numpy(t) for name, t in w.items()}, folder / f"{NAME}.pt")
    said = {"act_size": D_IN, "dict_size": D_SAE, "act_name": "blocks.5.attn.hook_z"}
    (folder / f"{NAME}_cfg.json").write_text(json.dumps(said | cfg))
    return {name: tensor.astype(np.float64) for name, tensor in w.items()}


def test_relu_of_the_input_minus_b_dec(
    tmp_path: Path, assert_computes: Callable[..., None]
) -> None:
    w = write(tmp_path, model_name="gpt2-small")
    x = np.random.default_rng(1).normal(size=(30, D_IN)).astype(np.float32)
    acts = np.maximum((x.astype(np.float64) - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 0)
    path = tmp_path / f"{NAME}.pt"
    assert_computes(lambda: load_sae(path), x, acts, acts @ w["W_dec"] + w["b_dec"])
    card = load_sae(path).card
    assert (card.hook_point, card.model_name) == ("blocks.5.attn.hook_z", "gpt2-small")


def test_config_that_contradicts_is_refused(tmp_path: Path) -> None:
    write(tmp_path, dict_size=41)
    with pytest.raises(SAEFormatError, match=r"W_enc has shape \(8, 40\), expected \(8, 41\)"):
        load_sae(tmp_path / f"{NAME}.pt")


def test_file_without_its_config_is_no_known_format(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / f"{NAME}_cfg.json").unlink()
    with pytest.raises(SAEFormatError, match=r"not a known SAE format: found the file gpt2-small"):
        load_sae(tmp_path / f"{NAME}.pt")
