"""Gemma Scope files written here: the formula in float64, and what their paths say."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_core import stored
from sae_core.errors import SAEFormatError
from sae_core.formats import load_sae
from sae_core.formats.gemma_scope import TENSORS, WEIGHTS

D_IN, D_SAE = 9, 40
X = np.random.default_rng(1).normal(size=(30, D_IN)).astype(np.float32)


def numbers(d_out: int = D_IN) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = ((D_IN, D_SAE), (D_SAE, d_out), (D_SAE,), (d_out,), (D_SAE,))
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in zip(TENSORS, shapes, strict=True)
    }


def write(folder: Path, *, compressed: bool = False, d_out: int = D_IN) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    w = numbers(d_out)
    (np.savez_compressed if compressed else np.savez)(folder / WEIGHTS, **w)
    return {name: tensor.astype(np.float64) for name, tensor in w.items()}


def encoded(w: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    h = x @ w["W_enc"] + w["b_enc"]
    return np.maximum(h, 0) * (h > w["threshold"])


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("window_bytes", [100, stored.WINDOW_BYTES])
def test_stored_and_compressed_archives_compute_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compressed: bool,
    window_bytes: int,
    assert_computes: Callable[..., None],
) -> None:
    monkeypatch.setattr(stored, "WINDOW_BYTES", window_bytes)
    w = write(tmp_path, compressed=compressed)
    info = zipfile.ZipFile(tmp_path / WEIGHTS).getinfo("W_enc.npy")
    assert (info.compress_type == zipfile.ZIP_DEFLATED) == compressed
    acts = encoded(w, X.astype(np.float64))
    assert_computes(lambda: load_sae(tmp_path), X, acts, acts @ w["W_dec"] + w["b_dec"])
    file = tmp_path / WEIGHTS
    assert_computes(lambda: load_sae(file), X, acts, acts @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("compressed", [False, True])
def test_only_the_columns_asked_for_matter(tmp_path: Path, compressed: bool) -> None:
    write(tmp_path, compressed=compressed)
    x = torch.from_numpy(X)
    before = load_sae(tmp_path).slice([7, 3])(x)
    w = numbers()
    w["W_enc"][:, 5] = w["W_dec"][:] = w["b_dec"][:] = np.nan
    (np.savez_compressed if compressed else np.savez)(tmp_path / WEIGHTS, **w)
    damaged = load_sae(tmp_path)
    assert torch.equal(damaged.slice([7, 3])(x), before)
    with pytest.raises(SAEFormatError, match="W_enc: found 9 numbers not finite"):
        damaged.slice([5])


RES = "blocks.12.hook_resid_post"
AFTER_MLP = "layers.12.post_feedforward_layernorm.output"


@pytest.mark.parametrize(
    ("repo", "model", "reads", "predicts"),
    [
        ("gemma-scope-2b-pt-res", "google/gemma-2-2b", RES, None),
        ("models--google--gemma-scope-2b-pt-res/snapshots/0a1", "google/gemma-2-2b", RES, None),
        ("gemma-scope-2b-pt-res-canonical", "google/gemma-2-2b", RES, None),
        ("gemma-scope-9b-it-res", "google/gemma-2-9b-it", RES, None),
        ("gemma-scope-27b-pt-mlp", "google/gemma-2-27b", AFTER_MLP, None),
        ("gemma-scope-2b-pt-att", "google/gemma-2-2b", "layers.12.self_attn.o_proj.input", None),
        (
            "gemma-scope-2b-pt-transcoders",
            "google/gemma-2-2b",
            "blocks.12.ln2.hook_normalized",
            AFTER_MLP,
        ),
        ("my-saes", None, None, None),
    ],
)
def test_path_names_model_layer_and_site(
    tmp_path: Path, repo: str, model: str | None, reads: str | None, predicts: str | None
) -> None:
    inner = "layer_12/width_16k/average_l0_82"
    write(tmp_path / repo / inner)
    for card in (
        load_sae(tmp_path / repo, subfolder=inner).card,
        load_sae(tmp_path / repo, subfolder=inner, weights_file=WEIGHTS).card,
    ):
        assert (card.model_name, card.hook_point, card.hook_point_out) == (model, reads, predicts)


def test_transcoder_predicts_another_width_and_reads_before_the_gain(
    tmp_path: Path, assert_computes: Callable[..., None]
) -> None:
    path = tmp_path / "gemma-scope-2b-pt-transcoders/layer_0/width_16k/average_l0_8"
    w = write(path, d_out=5)
    acts = encoded(w, X.astype(np.float64))
    assert_computes(lambda: load_sae(path), X, acts, acts @ w["W_dec"] + w["b_dec"])
    assert "divided by (1 + weight)" in load_sae(path).card.notes[0]


@pytest.mark.parametrize(
    ("inner", "hints", "scale"),
    [
        ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", {}, D_IN**0.5),
        ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", {"embedding_scale": 60.0}, 60.0),
        ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", {"embedding_scale": 1.0}, 1.0),
        ("renamed", {"embedding_scale": 60.0}, 60.0),
    ],
)
def test_embedding_sae_takes_what_the_model_multiplied(
    tmp_path: Path,
    inner: str,
    hints: dict[str, float],
    scale: float,
    assert_computes: Callable[..., None],
) -> None:
    path = tmp_path / inner
    w = write(path)
    table = X.astype(np.float64)
    acts = encoded(w, table)
    recons = (acts @ w["W_dec"] + w["b_dec"]) * scale
    assert_computes(lambda: load_sae(path, **hints), table * scale, acts, recons)
    card = load_sae(path, **hints).card
    assert card.hook_point == ("blocks.0.hook_resid_pre" if scale != 1 else None)
    assert f"multiplied by {scale:g};" in card.notes[0]


@pytest.mark.parametrize(("inner", "scale"), [("layer_0", 60.0), ("embedding", 0.0)])
def test_embedding_scale_that_cannot_be_is_refused(
    tmp_path: Path, inner: str, scale: float
) -> None:
    path = tmp_path / inner / "width_4k/average_l0_6"
    write(path)
    with pytest.raises(SAEFormatError, match=f"embedding_scale: found {scale}, expected a positi"):
        load_sae(path, embedding_scale=scale)


def test_embedding_elsewhere_in_the_path_means_nothing(tmp_path: Path) -> None:
    path = tmp_path / "embedding/layer_1/width_4k/average_l0_6"
    write(path)
    assert load_sae(path).config.input_scale == 1


def test_other_tensors_and_damaged_files_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / WEIGHTS, **(numbers() | {"scaling_factor": np.ones(D_SAE)}))
    with pytest.raises(SAEFormatError, match=r"params\.npz: tensors: found .*scaling_factor"):
        load_sae(tmp_path)
    np.savez(tmp_path / WEIGHTS, **(numbers() | {"b_enc": np.zeros(D_SAE - 1)}))
    with pytest.raises(SAEFormatError, match=r"b_enc has shape \(39,\), expected \(40,\)"):
        load_sae(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"x" * 99)
    with pytest.raises(SAEFormatError, match=r"params\.npz: cannot be read as npz"):
        load_sae(tmp_path)
