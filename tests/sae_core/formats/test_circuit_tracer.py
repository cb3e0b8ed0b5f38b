"""circuit-tracer layers written here, against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae_core.errors import SAEFormatError
from sae_core.formats import load_sae
from sae_core.formats.circuit_tracer import CFG, THRESHOLD

D_IN, D_SAE, D_OUT = 9, 40, 7
X = np.random.default_rng(1).normal(size=(30, D_IN)).astype(np.float32)
CONFIG = """
model_name: Qwen/Qwen3-0.6B
feature_input_hook: mlp.hook_in
feature_output_hook: mlp.hook_out
"""


def write(folder: Path, *more: str, layer: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = {
        "W_enc": (D_SAE, D_IN),
        "W_dec": (D_SAE, D_OUT),
        "b_enc": (D_SAE,),
        "b_dec": (D_OUT,),
        THRESHOLD: (D_SAE,),
        "W_skip": (D_OUT, D_IN),
    }
    w = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    w = {name: w[name] for name in (*list(w)[:4], *more)}
    tensors = {name: torch.from_numpy(tensor) for name, tensor in w.items()}
    save_file(tensors, folder / f"layer_{layer}.safetensors")
    return {name: tensor.astype(np.float64) for name, tensor in w.items()}


@pytest.mark.parametrize("more", [(), (THRESHOLD,), ("W_skip",), (THRESHOLD, "W_skip")])
def test_layer_is_relu_or_jumprelu_with_its_skip(
    tmp_path: Path, more: tuple[str, ...], assert_computes: Callable[..., None]
) -> None:
    w = write(tmp_path, *more)
    x = X.astype(np.float64)
    h = x @ w["W_enc"].T + w["b_enc"]
    acts = np.maximum(h, 0) * (h > w.get(THRESHOLD, 0))
    recons = acts @ w["W_dec"] + w["b_dec"]
    if "W_skip" in w:
        recons = recons + x @ w["W_skip"].T
    path = tmp_path / "layer_3.safetensors"
    assert_computes(lambda: load_sae(path), X, acts, recons)


def test_config_beside_it_names_model_and_hooks(tmp_path: Path) -> None:
    write(tmp_path)
    card = load_sae(tmp_path, weights_file="layer_3.safetensors").card
    assert (card.model_name, card.hook_point, card.hook_point_out) == (None, None, None)
    (tmp_path / CFG).write_text(CONFIG)
    card = load_sae(tmp_path, weights_file="layer_3.safetensors").card
    assert card.model_name == "Qwen/Qwen3-0.6B"
    assert (card.hook_point, card.hook_point_out) == (
        "blocks.3.mlp.hook_in",
        "blocks.3.mlp.hook_out",
    )


def test_a_folder_of_layers_asks_for_one(tmp_path: Path) -> None:
    write(tmp_path, layer=0)
    write(tmp_path, layer=1)
    with pytest.raises(SAEFormatError, match="found 2 layers, expected one, or the hint `weights"):
        load_sae(tmp_path)


def test_cross_layer_transcoders_are_refused_with_the_reason(tmp_path: Path) -> None:
    write(tmp_path)
    file = (tmp_path / "layer_3.safetensors").rename(tmp_path / "W_enc_3.safetensors")
    for path in (file, tmp_path):
        with pytest.raises(SAEFormatError, match="found a cross-layer transcoder, .*write to sev"):
            load_sae(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "config.yaml: cannot be read as YAML: while parsing"),
        ("- a", "config.yaml: found list, expected a mapping"),
        ("feature_input_hook: 3", "feature_input_hook: found 3, expected a string"),
    ],
)
def test_damaged_config_is_refused(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path)
    (tmp_path / CFG).write_text(text)
    with pytest.raises(SAEFormatError, match=said) as caught:
        load_sae(tmp_path / "layer_3.safetensors")
    assert "\n" not in str(caught.value)
