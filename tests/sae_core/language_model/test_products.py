"""Matrix products of another library: the same activations, and one copy of the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from sae_core.hook_points import HookPoint
from sae_core.language_model import products
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import LanguageModel, Segment
from sae_core.language_model.processing import DEFAULT_PROCESSING
from sae_core.language_model.products import OneDNNLinear, Products, choose_products
from sae_core.testing.models import FAMILIES

TEXT = list(range(10, 40))
LAST = HookPoint(2, "resid_post")

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"
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
    module = nn.Sequential(nn.Linear(8, 8)).bfloat16()
    assert choose_products(module, "onednn") == "torch"
