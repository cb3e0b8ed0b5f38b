"""Sparsify folders written here, against the formula in float64; the library's are in published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_core import stored
from sae_core.errors import SAEFormatError, ShapeError
from sae_core.formats import load_sae
from sae_core.formats.sparsify import CFG, RUN_CONFIG, WEIGHTS

D_IN, D_SAE, K = 6, 24, 4
NEW = {
    "activation": "topk",
    "expansion_factor": 4,
    "num_latents": 0,
    "k": K,
    "skip_connection": False,
    "transcode": False,
    "d_in": D_IN,
}
OLD = {"expansion_factor": 4, "normalize_decoder": True, "num_latents": 0, "k": K, "d_in": D_IN}


def numbers(d_out: int = D_IN) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    shapes = {
        "encoder.weight": (D_SAE, D_IN),
        "encoder.bias": (D_SAE,),
        "W_dec": (D_SAE, d_out),
        "b_dec": (d_out,),
        "W_skip": (d_out, D_IN),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder: Path, cfg: dict[str, Any], without: tuple[str, ...] = (), d_out: int = D_IN):
    w = numbers(d_out)
    folder.mkdir(parents=True)
    (folder / CFG).write_text(json.dumps({k: v for k, v in cfg.items() if v is not ...}))
    left_out = without if cfg.get("skip_connection") else (*without, "W_skip")
    tensors = {n: torch.from_numpy(t) for n, t in w.items() if n not in left_out}
    save_file(tensors, folder / WEIGHTS)
    return {name: tensor.astype(np.float64) for name, tensor in w.items()}


X = np.random.default_rng(1).normal(size=(30, D_IN)).astype(np.float32)


def pre_acts(w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) @ w["encoder.weight"].T + w["encoder.bias"]


def top(keys: np.ndarray, k: int) -> np.ndarray:
    return keys >= np.sort(keys, axis=1)[:, -k][:, None]


@pytest.mark.parametrize("cfg", [NEW, OLD, OLD | {"signed": False}])
def test_topk_subtracts_b_dec(
    tmp_path: Path, cfg: dict[str, Any], assert_computes: Callable[..., None]
) -> None:
    w = write(tmp_path / "layers.3", cfg)
    h = pre_acts(w, X - w["b_dec"])
    acts = np.maximum(h, 0) * top(h, K)
    path = tmp_path / "layers.3"
    assert_computes(lambda: load_sae(path), X, acts, acts @ w["W_dec"] + w["b_dec"])
    assert load_sae(path).config.architecture == "topk"


def test_signed_keeps_the_largest_magnitudes_with_their_sign(
    tmp_path: Path, assert_computes: Callable[..., None]
) -> None:
    w = write(tmp_path / "layers.3", OLD | {"signed": True})
    h = pre_acts(w, X - w["b_dec"])
    acts = h * top(np.abs(h), K)
    assert (acts < 0).any()
    path = tmp_path / "layers.3"
    assert_computes(lambda: load_sae(path), X, acts, acts @ w["W_dec"] + w["b_dec"])
    assert load_sae(path).config.architecture == "abstopk"


def test_num_latents_wins_and_groupmax_keeps_one_latent_a_group(
    tmp_path: Path, assert_computes: Callable[..., None]
) -> None:
    cfg = NEW | {"activation": "groupmax", "num_latents": D_SAE, "expansion_factor": 99}
    w = write(tmp_path / "h.0.mlp", cfg)
    h = pre_acts(w, X - w["b_dec"]).reshape(len(X), K, D_SAE // K)
    acts = (np.maximum(h, 0) * (h == h.max(axis=2, keepdims=True))).reshape(len(X), D_SAE)
    path = tmp_path / "h.0.mlp"
    assert_computes(lambda: load_sae(path), X, acts, acts @ w["W_dec"] + w["b_dec"])
    assert load_sae(path).card.hook_point == "h.0.mlp.output"


@pytest.mark.parametrize("window_bytes", [50, stored.WINDOW_BYTES])
def test_only_the_groups_asked_for_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window_bytes: int
) -> None:
    monkeypatch.setattr(stored, "WINDOW_BYTES", window_bytes)
    path, x = tmp_path / "layers.3", torch.from_numpy(X)
    write(path, NEW | {"activation": "groupmax"})
    whole = load_sae(path).encode(x)
    tensors = load_file(path / WEIGHTS)
    tensors["encoder.weight"][D_SAE // K :] = torch.nan
    save_file(tensors, path / WEIGHTS)
    damaged = load_sae(path)
    assert torch.equal(damaged.slice([4, 0])(x), whole[:, [4, 0]])
    with pytest.raises(SAEFormatError, match="encoder.weight: found 36 numbers not finite"):
        damaged.slice([6])


def test_skip_transcoder_reads_its_module_and_adds_the_raw_input(
    tmp_path: Path, assert_computes: Callable[..., None]
) -> None:
    path = tmp_path / "layers.2.mlp"
    w = write(path, NEW | {"transcode": True, "skip_connection": True}, d_out=5)
    h = pre_acts(w, X)
    acts = np.maximum(h, 0) * top(h, K)
    recons = acts @ w["W_dec"] + w["b_dec"] + X.astype(np.float64) @ w["W_skip"].T
    assert_computes(lambda: load_sae(path), X, acts, recons)
    sae = load_sae(path)
    assert sae.config.predicts_another_place
    assert sae.card.hook_point == "layers.2.mlp.input"
    assert sae.card.hook_point_out == "layers.2.mlp.output"


def test_old_transcoder_subtracts_b_dec_and_is_told_by_a_hint(
    tmp_path: Path, assert_computes: Callable[..., None]
) -> None:
    path = tmp_path / "layers.2.mlp"
    w = write(path, OLD)
    h = pre_acts(w, X - w["b_dec"])
    acts = np.maximum(h, 0) * top(h, K)
    recons = acts @ w["W_dec"] + w["b_dec"]
    assert_computes(lambda: load_sae(path, transcode=True), X, acts, recons)
    told = load_sae(path, transcode=True).card
    assert (told.hook_point, told.hook_point_out) == ("layers.2.mlp.input", "layers.2.mlp.output")
    assert told.notes == ()
    untold = load_sae(path).card
    assert (untold.hook_point, untold.hook_point_out) == ("layers.2.mlp.output", None)
    assert "the hint transcode" in untold.notes[0]


def test_encoder_without_decoder_encodes_and_says_why_it_cannot_decode(tmp_path: Path) -> None:
    write(tmp_path / "whole" / "layers.3", NEW)
    write(tmp_path / "half" / "layers.3", NEW, without=("W_dec",))
    whole, half = (load_sae(tmp_path / name / "layers.3") for name in ("whole", "half"))
    x = torch.from_numpy(X)
    assert torch.equal(half.slice([2, 9])(x), whole.slice([2, 9])(x))
    assert torch.equal(half.encode(x), whole.encode(x))
    assert "no W_dec" in half.card.notes[0]
    with pytest.raises(ShapeError, match=r"W_dec: found none in .*layers\.3, expected a decoder"):
        half.decode(half.encode(x))


@pytest.mark.parametrize(
    ("inner", "hook_point"),
    [
        ("layers.10", "layers.10.output"),
        ("layers.10/seed1", "layers.10.output"),
        ("embed_tokens", "embed_tokens.output"),
        ("my-sae", None),
        ("v1.0", None),
    ],
)
def test_folder_name_is_the_module(tmp_path: Path, inner: str, hook_point: str | None) -> None:
    write(tmp_path / inner, NEW)
    assert load_sae(tmp_path, subfolder=inner).card.hook_point == hook_point


def test_model_is_the_one_of_the_run(tmp_path: Path) -> None:
    write(tmp_path / "layers.3", NEW)
    (tmp_path / RUN_CONFIG).write_text(json.dumps({"model": "EleutherAI/pythia-70m"}))
    assert load_sae(tmp_path / "layers.3").card.model_name == "EleutherAI/pythia-70m"


def test_a_run_is_not_an_sae_but_lists_them(tmp_path: Path) -> None:
    write(tmp_path / "layers.3", NEW)
    write(tmp_path / "layers.4/seed0", NEW)
    (tmp_path / RUN_CONFIG).write_text("{}")
    said = r"each hold an SAE: layers\.3, layers\.4/seed0; .* the hint `subfolder`"
    with pytest.raises(SAEFormatError, match=said):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"activation": "relu"}, "activation: found 'relu', expected one of topk, groupmax"),
        ({"activation": "groupmax", "signed": True}, "signed: found True, expected false"),
        ({"k": ...}, "k: found no such key, expected a whole number from 1"),
        ({"k": 25}, "k is 25, expected 1 to d_sae, which is 24"),
        ({"num_latents": 23}, r"W_enc has shape \(6, 24\), expected \(6, 23\)"),
        ({"expansion_factor": ...}, "expansion_factor: found no such key"),
        ({"skip_connection": True}, "tensors: found .*, expected .*W_skip"),
        ({"transcode": 1}, "transcode: found 1, expected true or false"),
    ],
)
def test_cfg_that_contradicts_is_refused_by_key(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    write(tmp_path / "layers.3", NEW | changes, without=("W_skip",))
    with pytest.raises(SAEFormatError, match=said) as caught:
        load_sae(tmp_path / "layers.3")
    assert "layers.3" in str(caught.value)


def test_hint_against_the_files_own_word_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "layers.3", NEW)
    with pytest.raises(SAEFormatError, match="transcode: found False, expected no such key, or"):
        load_sae(tmp_path / "layers.3", transcode=True)


def test_an_sae_of_another_width_than_it_reads_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "layers.3", NEW, d_out=5)
    with pytest.raises(SAEFormatError, match="d_out is 5, expected d_in, which is 6"):
        load_sae(tmp_path / "layers.3")
