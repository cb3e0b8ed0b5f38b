"""Matrix products of another library: the same activations, and one copy of the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from sae_core.hook_points import HookPoint, parse_hook_point
from sae_core.language_model import products
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import LanguageModel, Segment
from sae_core.language_model.processing import DEFAULT_PROCESSING
from sae_core.language_model.products import (
    OneDNNLinear,
    Products,
    choose_products,
    fuse_gates,
    has_bfloat16,
    has_onednn,
)
from sae_core.testing.models import FAMILIES

TEXT = list(range(10, 40))
LAST = HookPoint(2, "resid_post")

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="this torch was built without oneDNN")
needs_bfloat16 = pytest.mark.skipif(
    not (has_onednn() and has_bfloat16()), reason="this processor packs no bfloat16"
)


def resid(model: LanguageModel) -> torch.Tensor:
    stream = model.open_stream()
    rows = [model.step([Segment(stream, piece)])[LAST] for piece in (TEXT[:20], TEXT[20:])]
    return torch.cat(rows)


@needs_onednn
@pytest.mark.parametrize("family", FAMILIES)
def test_onednn_gives_the_activations_of_torch(
    family: str, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of(family)
    expected = load_language_model(folder, [LAST], products="torch")
    found = load_language_model(folder, [LAST], products="onednn")
    assert expected.config.products == "torch"
    # GPT-2 has no `nn.Linear`, but a class of its own.
    assert found.config.products == ("torch" if family == "gpt2" else "onednn")
    torch.testing.assert_close(resid(found), resid(expected), rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("family", ["gpt_neox", "opt", "phi", "qwen2"])
def test_onednn_changes_nothing_of_what_an_sae_is_given(
    family: str, folder_of: Callable[[str], Path]
) -> None:
    point = HookPoint(2, "z")
    shifts = []
    libraries: tuple[Products, ...] = ("torch", "onednn")
    for library in libraries:
        model = load_language_model(folder_of(family), [point], products=library)
        shifts.append(model.processed_shift(point, DEFAULT_PROCESSING).shift)
    expected, found = shifts
    assert expected is not None
    assert found is not None
    torch.testing.assert_close(found, expected)


@needs_onednn
def test_the_weights_are_kept_once_and_can_be_read() -> None:
    layer = nn.Linear(24, 40).requires_grad_(False)
    packed = OneDNNLinear(layer)
    assert torch.equal(packed.weight, layer.weight)
    assert [name for name, _ in packed.named_parameters()] == ["bias"]


@needs_onednn
@pytest.mark.parametrize(
    ("torch_seconds", "chosen"), [(1.0, "torch"), (1.24, "torch"), (1.25, "onednn")]
)
def test_only_a_clear_gain_changes_the_library(
    torch_seconds: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "WORTH_TIMING", 0)
    monkeypatch.setattr(products, "_seconds", lambda layers: (torch_seconds, 1.0))
    module = nn.Sequential(nn.Linear(8, 8))
    assert choose_products(module) == chosen
    assert isinstance(module[0], OneDNNLinear) == (chosen == "onednn")


def test_a_small_model_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(layers: object) -> tuple[float, float]:
        raise AssertionError("timed")

    monkeypatch.setattr(products, "_seconds", fail)
    assert choose_products(nn.Sequential(nn.Linear(8, 8))) == "torch"


@needs_onednn
def test_both_are_timed_on_every_shape() -> None:
    layers = [nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(32, 64, bias=False)]
    assert all(seconds > 0 for seconds in products._seconds(layers))


def test_other_types_are_left_to_torch() -> None:
    module = nn.Sequential(nn.Linear(8, 8)).double()
    assert choose_products(module, "onednn") == "torch"


@needs_bfloat16
def test_bfloat16_is_packed_without_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "WORTH_TIMING", 0)
    monkeypatch.setattr(products, "_seconds", lambda layers: (0.0, 1.0))
    layer = nn.Linear(24, 40).bfloat16().requires_grad_(False)
    module = nn.Sequential(layer)
    x = torch.randn(5, 24).bfloat16()
    expected = layer(x)
    assert choose_products(module) == "onednn"
    assert torch.equal(module[0].weight, layer.weight)
    torch.testing.assert_close(module(x), expected, rtol=2e-2, atol=2e-2)


@needs_bfloat16
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_gives_the_activations_of_torch(
    family: str, folder_of: Callable[[str], Path]
) -> None:
    """Either is a rounding error or two away from float32."""
    folder = folder_of(family)
    exact = resid(load_language_model(folder, [LAST], products="torch"))
    errors = []
    for library in get_args(Products)[1:]:
        model = load_language_model(folder, [LAST], products=library, dtype=torch.bfloat16)
        errors.append(float((resid(model).float() - exact).norm() / exact.norm()))
    assert errors[1] < max(2 * errors[0], 0.01), errors


class GatedMLP(nn.Module):
    """As most families have it."""

    def __init__(self, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(a, b, bias=False) for a, b in ((16, 48), (16, 48), (48, 16))
        )
        self.act_fn = act_fn
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class GateTwice(GatedMLP):
    """Looks like one, and uses what the gate gives before its function, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.down_proj(self.gate_proj(x))


@needs_onednn
@pytest.mark.parametrize(
    "act_fn", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ReLU()], ids=lambda act: str(act)
)
def test_a_gate_takes_its_function_along(act_fn: nn.Module) -> None:
    mlp, x = GatedMLP(act_fn), torch.randn(7, 16)
    expected = mlp(x)
    assert choose_products(mlp, "onednn") == "onednn"
    assert fuse_gates(mlp) == 1
    assert isinstance(mlp.act_fn, nn.Identity)
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("mlp", [GatedMLP(nn.Mish()), GateTwice(nn.SiLU())], ids=["mish", "twice"])
def test_what_is_no_usual_gate_stays_as_it_is(mlp: GatedMLP) -> None:
    x = torch.randn(7, 16)
    expected, act_fn = mlp(x), mlp.act_fn
    choose_products(mlp, "onednn")
    assert fuse_gates(mlp) == 0
    assert mlp.act_fn is act_fn
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("side", ["gate_proj", "act_fn"])
def test_a_gate_that_is_read_is_as_it_was(side: str, folder_of: Callable[[str], Path]) -> None:
    point = parse_hook_point(f"model.layers.1.mlp.{side}")
    libraries: tuple[Products, ...] = ("torch", "onednn")
    models = [
        load_language_model(folder_of("llama"), [point], products=library) for library in libraries
    ]
    rows = [model.step([Segment(model.open_stream(), TEXT)])[point] for model in models]
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2", "mistral"])
def test_the_gates_of_a_model_are_fused(family: str, folder_of: Callable[[str], Path]) -> None:
    model = load_language_model(folder_of(family), [LAST], products="onednn")
    gates = [m for m in model.module.modules() if hasattr(m, "gate_proj")]
    assert len(gates) == model.config.n_layers
    assert all(isinstance(mlp.act_fn, nn.Identity) for mlp in gates)
