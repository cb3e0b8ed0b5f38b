"""dictionary_learning runs written here, class by class, against the formula in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_core.errors import SAEFormatError
from sae_core.formats import load_sae
from sae_core.formats.dictionary_learning import CFG, KINDS, WEIGHTS

D_IN, D_SAE, K = 6, 24, 4
GROUPS = [4, 8, 12]
X = np.random.default_rng(1).normal(size=(30, D_IN)).astype(np.float32)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


LINEAR = {
    "encoder.weight": normal(1, D_SAE, D_IN),
    "encoder.bias": normal(2, D_SAE),
    "decoder.weight": normal(3, D_IN, D_SAE),
}
PLAIN = {
    "W_enc": normal(1, D_SAE, D_IN).T.contiguous(),
    "b_enc": normal(2, D_SAE),
    "W_dec": normal(3, D_IN, D_SAE).T.contiguous(),
    "b_dec": normal(4, D_IN),
}
B_DEC = normal(4, D_IN)
SCALAR = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.7)}
GATED = {
    "decoder_bias": B_DEC,
    "r_mag": normal(5, D_SAE),
    "gate_bias": normal(6, D_SAE),
    "mag_bias": normal(7, D_SAE),
} | {name: LINEAR[name] for name in ("encoder.weight", "decoder.weight")}
STATES: dict[str, dict[str, torch.Tensor]] = {
    "AutoEncoder": LINEAR | {"bias": B_DEC},
    "AutoEncoderNew": LINEAR | {"decoder.bias": B_DEC},
    "GatedAutoEncoder": GATED,
    "JumpReluAutoEncoder": PLAIN | {"threshold": normal(8, D_SAE)},
    "AutoEncoderTopK": LINEAR | {"b_dec": B_DEC} | SCALAR,
    "BatchTopKSAE": LINEAR | {"b_dec": B_DEC} | SCALAR,
    "MatryoshkaBatchTopKSAE": PLAIN | SCALAR | {"group_sizes": torch.tensor(GROUPS)},
}

We, Wd = LINEAR["encoder.weight"].double().numpy().T, LINEAR["decoder.weight"].double().numpy().T
be, bd = LINEAR["encoder.bias"].double().numpy(), B_DEC.double().numpy()
NORMS = np.linalg.norm(Wd, axis=1)
T = STATES["JumpReluAutoEncoder"]["threshold"].double().numpy()


def relu(h: np.ndarray) -> np.ndarray:
    return np.maximum(h, 0)


def top(h: np.ndarray) -> np.ndarray:
    return h >= np.sort(h, axis=1)[:, -K][:, None]


def gated(z: np.ndarray) -> np.ndarray:
    r_mag, b_gate, b_mag = (
        GATED[name].double().numpy() for name in ("r_mag", "gate_bias", "mag_bias")
    )
    return relu(z @ We * np.exp(r_mag) + b_mag) * (z @ We + b_gate > 0)


def above(h: np.ndarray) -> np.ndarray:
    return relu(h) * (relu(h) > np.float32(0.7))


x64 = X.astype(np.float64)
h_raw, h_less = x64 @ We + be, (x64 - bd) @ We + be
FORMULAS: dict[str, np.ndarray] = {
    "AutoEncoder": relu(h_less),
    "AutoEncoderNew": relu(h_raw),
    "GatedAutoEncoder": gated(x64 - bd),
    "JumpReluAutoEncoder": relu(h_raw) * (h_raw > T),
    "AutoEncoderTopK": relu(h_less) * top(h_less),
    "BatchTopKSAE": above(h_less),
    "MatryoshkaBatchTopKSAE": above(h_less),
}


def write(
    folder: Path, dict_class: str, changes: dict[str, Any] | None = None, **trainer: object
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    said = {"dict_class": dict_class, "activation_dim": D_IN, "dict_size": D_SAE, "k": K}
    said |= {"layer": 8, "lm_name": "org/model", "submodule_name": "resid_post_layer_8"}
    cfg = {"trainer": {k: v for k, v in (said | trainer).items() if v is not ...}}
    cfg["buffer"] = {"io": "out", "ctx_len": 128}
    (folder / CFG).write_text(json.dumps(cfg))
    state = STATES[dict_class] | (changes or {})
    torch.save({k: v for k, v in state.items() if v is not ...}, folder / WEIGHTS)
    return folder


def test_every_class_is_tried() -> None:
    assert set(FORMULAS) == set(STATES) == set(KINDS)


@pytest.mark.parametrize("dict_class", FORMULAS)
def test_each_class_computes_its_own_formula(
    tmp_path: Path, dict_class: str, assert_computes: Callable[..., None]
) -> None:
    write(tmp_path, dict_class)
    acts = FORMULAS[dict_class]
    assert_computes(lambda: load_sae(tmp_path), X, acts, acts @ Wd + bd)
    card = load_sae(tmp_path).card
    assert (card.hook_point, card.model_name) == ("blocks.8.hook_resid_post", "org/model")


def test_folded_activations_are_in_units_of_unit_decoder_rows(
    tmp_path: Path, assert_computes: Callable[..., None]
) -> None:
    write(tmp_path, "AutoEncoder")
    acts = relu(h_less)
    assert_computes(
        lambda: load_sae(tmp_path, fold_decoder_norms=True), X, acts * NORMS, acts @ Wd + bd
    )
    assert "the hint fold_decoder_norms" in load_sae(tmp_path).card.notes[0]
    assert load_sae(tmp_path, fold_decoder_norms=False).card.notes == ()


def test_use_threshold_replaces_the_rank(
    tmp_path: Path, assert_computes: Callable[..., None]
) -> None:
    write(tmp_path, "AutoEncoderTopK")
    acts = above(h_less)
    assert_computes(lambda: load_sae(tmp_path, use_threshold=True), X, acts, acts @ Wd + bd)
    assert load_sae(tmp_path, use_threshold=False).config.architecture == "topk"


def test_active_groups_turn_the_later_latents_off(
    tmp_path: Path, assert_computes: Callable[..., None]
) -> None:
    write(tmp_path, "MatryoshkaBatchTopKSAE")
    acts = above(h_less)
    acts[:, sum(GROUPS[:2]) :] = 0
    assert_computes(lambda: load_sae(tmp_path, active_groups=2), X, acts, acts @ Wd + bd)


def test_threshold_that_was_never_estimated_is_plain_relu_and_noted(
    tmp_path: Path, assert_computes: Callable[..., None]
) -> None:
    write(tmp_path, "BatchTopKSAE", {"threshold": torch.tensor(-1.0)})
    acts = relu(h_less)
    assert_computes(lambda: load_sae(tmp_path), X, acts, acts @ Wd + bd)
    assert "Its threshold is -1: training ended before" in load_sae(tmp_path).card.notes[0]


def test_k_may_stand_in_the_config_alone(tmp_path: Path) -> None:
    write(tmp_path, "AutoEncoderTopK", {"k": ..., "threshold": ...})
    assert load_sae(tmp_path).config.k == K


def test_checkpoint_of_a_run_finds_its_config(tmp_path: Path) -> None:
    write(tmp_path, "BatchTopKSAE")
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    torch.save(STATES["BatchTopKSAE"], checkpoints / "ae_4000.pt")
    x = torch.from_numpy(X)
    found = load_sae(checkpoints, weights_file="ae_4000.pt").encode(x)
    assert torch.equal(found, load_sae(tmp_path).encode(x))


def backup(folder: Path, norm_factor: object) -> None:
    content = {"step": 5, "ae": STATES["BatchTopKSAE"], "optimizer": {}, "config": {}}
    torch.save(content | {"norm_factor": norm_factor}, folder / WEIGHTS)


def test_backup_of_an_unscaled_run_is_read(
    tmp_path: Path, assert_computes: Callable[..., None]
) -> None:
    write(tmp_path, "BatchTopKSAE")
    backup(tmp_path, None)
    acts = above(h_less)
    assert_computes(lambda: load_sae(tmp_path), X, acts, acts @ Wd + bd)


def test_backup_of_a_scaled_run_is_refused_with_the_reason(tmp_path: Path) -> None:
    write(tmp_path, "BatchTopKSAE")
    backup(tmp_path, 12.5)
    said = r"ae\.pt: norm_factor: found 12\.5, expected none: .* whether its biases and threshold"
    with pytest.raises(SAEFormatError, match=said):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("name", "layer", "io", "hook_point"),
    [
        ("resid_post_layer_3", 3, "out", "blocks.3.hook_resid_post"),
        ("resid_out_layer3", 3, "out", "blocks.3.hook_resid_post"),
        ("mlp_out_layer3", 3, "out", "blocks.3.hook_mlp_out"),
        ("resid_pre_layer_3", 3, "in", "blocks.3.hook_resid_pre"),
        ("layers.3.mlp", 3, "in", "layers.3.mlp.input"),
        ("resid_post_layer_3", 4, "out", None),
        ("resid_post_layer_3", 3, "in", None),
        ("somewhere", 3, "out", None),
        (None, 3, "out", None),
    ],
)
def test_hook_point_follows_layer_submodule_and_side(
    tmp_path: Path, name: str | None, layer: int, io: str, hook_point: str | None
) -> None:
    write(tmp_path, "BatchTopKSAE", submodule_name=name, layer=layer)
    cfg = json.loads((tmp_path / CFG).read_text())
    cfg["buffer"]["io"] = io
    (tmp_path / CFG).write_text(json.dumps(cfg))
    card = load_sae(tmp_path).card
    assert card.hook_point == hook_point
    assert any("give it as hook_point" in note for note in card.notes) == (hook_point is None)


Write = Callable[[Path], Path]


@pytest.mark.parametrize(
    ("make", "hints", "said"),
    [
        (
            lambda f: write(f, "AutoEncoder"),
            {"use_threshold": True},
            "trainer.dict_class: found 'AutoEncoder', expected AutoEncoderTopK, as the hint use_",
        ),
        (
            lambda f: write(f, "BatchTopKSAE"),
            {"fold_decoder_norms": True},
            "found 'BatchTopKSAE', expected AutoEncoder, as the hint fold_decoder_norms",
        ),
        (
            lambda f: write(f, "MatryoshkaBatchTopKSAE"),
            {"active_groups": 4},
            "group_sizes: found 3 groups, expected at least the hint active_groups, which is 4",
        ),
        (
            lambda f: write(f, "AutoEncoderTopK", k=5),
            {},
            "k: found 4, expected 5 as in config.json",
        ),
        (
            lambda f: write(f, "AutoEncoderTopK", {"threshold": ...}),
            {"use_threshold": True},
            "tensors: found .*, expected .*threshold",
        ),
        (
            lambda f: write(f, "AutoEncoder", {"W_glu": B_DEC}),
            {},
            "tensors: found .*W_glu.*, expected",
        ),
        (
            lambda f: write(f, "AutoEncoder", dict_size=25),
            {},
            r"W_enc has shape \(6, 24\), expected \(6, 25\)",
        ),
    ],
)
def test_run_that_contradicts_is_refused(
    tmp_path: Path, make: Write, hints: dict[str, object], said: str
) -> None:
    make(tmp_path)
    with pytest.raises(SAEFormatError, match=said):
        load_sae(tmp_path, **hints)


def test_unknown_class_and_missing_config_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "AutoEncoder")
    cfg = json.loads((tmp_path / CFG).read_text())
    cfg["trainer"]["dict_class"] = "CrossCoder"
    (tmp_path / CFG).write_text(json.dumps(cfg))
    with pytest.raises(SAEFormatError, match="trainer.dict_class: found 'CrossCoder', expected"):
        load_sae(tmp_path)
    (tmp_path / CFG).unlink()
    with pytest.raises(SAEFormatError, match=r"config\.json: cannot be read as JSON"):
        load_sae(tmp_path)
