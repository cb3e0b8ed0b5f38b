"""Qwen-Scope's files against the formula in float64; k, which only their repository names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sae_core.errors import SAEFormatError
from sae_core.formats import load_sae

D_IN, D_SAE = 6, 20
REPOSITORY = "models--Qwen--SAE-Res-Qwen3-8B-Base-W64K-L0_5"


def write(file: Path) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(7)
    shapes = {"W_enc": (D_SAE, D_IN), "W_dec": (D_IN, D_SAE), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    tensors = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, file)
    return [tensor.double().numpy() for tensor in tensors.values()]


@pytest.mark.parametrize("has_name", [True, False])
def test_activations_are_the_formulas(tmp_path: Path, has_name: bool) -> None:
    folder = tmp_path / (REPOSITORY if has_name else "mine") / "snapshots" / "0123"
    We, Wd, be, bd = write(folder / "layer12.sae.pt")
    x = np.random.default_rng(3).normal(size=(60, D_IN)).astype(np.float32)
    acts = np.maximum(x @ We.T + be, 0)
    acts *= acts >= np.sort(acts, axis=1)[:, -5, None]
    hints = {} if has_name else {"k": 5}
    sae = load_sae(folder / "layer12.sae.pt", **hints)
    found = sae.encode(torch.from_numpy(x))
    assert np.array_equal(found.numpy() > 0, acts > 0)
    np.testing.assert_allclose(found.numpy(), acts, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae.decode(found).numpy(), acts @ Wd.T + bd, rtol=1e-4, atol=1e-4)
    ids = [17, 0, 4]
    assert torch.equal(load_sae(folder, **hints).slice(ids)(torch.from_numpy(x)), found[:, ids])
    assert sae.card.hook_point == "blocks.12.hook_resid_post"
    assert sae.card.model_name == ("Qwen3-8B-Base" if has_name else None)


def test_square_dictionary_is_told_by_its_format_not_by_its_shape(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    W_enc, W_dec = (torch.randn(8, 8, generator=generator) for _ in range(2))
    content = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": torch.zeros(8), "b_dec": torch.zeros(8)}
    torch.save(content, tmp_path / "layer0.sae.pt")
    weights = load_sae(tmp_path, k=2).weights
    assert torch.equal(weights.W_enc, W_enc.T) and torch.equal(weights.W_dec, W_dec.T)


def test_k_that_nothing_says_or_two_say_differently_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "layer12.sae.pt")
    with pytest.raises(SAEFormatError, match="k: found none, expected the hint k, or a path"):
        load_sae(tmp_path)
    with pytest.raises(SAEFormatError, match="k: found the hint 0, expected a whole number"):
        load_sae(tmp_path, k=0)
    write(tmp_path / REPOSITORY / "layer12.sae.pt")
    assert load_sae(tmp_path / REPOSITORY, k=5).config.k == 5
    with pytest.raises(SAEFormatError, match="k: found the hint 6, expected 5 as in its path"):
        load_sae(tmp_path / REPOSITORY, k=6)


def test_other_file_name_is_read_only_when_the_format_is_said(tmp_path: Path) -> None:
    """SAELens-like files of other releases have these names in the other orientation."""
    write(tmp_path / "blocks.8.pt")
    with pytest.raises(SAEFormatError, match="not a known SAE format"):
        load_sae(tmp_path, k=5)
    sae = load_sae(tmp_path, format="qwen_scope", k=5)
    assert (sae.config.d_in, sae.card.hook_point) == (D_IN, None)
