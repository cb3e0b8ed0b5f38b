"""Goodfire's and qresearch's files against the formula in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sae_core.errors import SAEFormatError
from sae_core.formats import load_sae

D_IN, D_SAE = 6, 20
GOODFIRE = "Llama-3.3-70B-Instruct-SAE-l50.pt"
QRESEARCH = "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"
TOPK = "topk_sae_l15_exp16_k32.pt"


def write(
    file: Path, encoder: str = "encoder_linear", decoder: str = "decoder_linear", bias: bool = True
) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(7)
    shapes = {f"{encoder}.weight": (D_SAE, D_IN), f"{decoder}.weight": (D_IN, D_SAE)}
    if bias:
        shapes |= {f"{encoder}.bias": (D_SAE,), f"{decoder}.bias": (D_IN,)}
    tensors = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
    torch.save(tensors, file)
    We, Wd, *biases = (tensor.double().numpy() for tensor in tensors.values())
    return [We, Wd, *(biases or [np.zeros(D_SAE), np.zeros(D_IN)])]


@pytest.mark.parametrize(
    ("name", "encoder", "decoder", "bias", "k", "layer", "model"),
    [
        (GOODFIRE, "encoder_linear", "decoder_linear", True, None, 50, "Llama-3.3-70B-Instruct"),
        (QRESEARCH, "encoder", "decoder", True, None, 19, "DeepSeek-R1-Distill-Llama-8B"),
        (TOPK, "encoder_linear", "decoder", False, 5, 15, None),
        (TOPK, "encoder_linear", "decoder", True, 5, 15, None),
        ("mine.pth", "encoder_linear", "decoder_linear", True, None, None, None),
    ],
)
def test_activations_are_the_formulas(
    tmp_path: Path,
    name: str,
    encoder: str,
    decoder: str,
    bias: bool,
    k: int | None,
    layer: int | None,
    model: str | None,
) -> None:
    We, Wd, be, bd = write(tmp_path / name, encoder, decoder, bias)
    x = np.random.default_rng(3).normal(size=(60, D_IN)).astype(np.float32)
    acts = np.maximum(x @ We.T + be, 0)
    if k is not None:
        acts *= acts >= np.sort(acts, axis=1)[:, -k, None]
    hints = {} if k is None else {"k": k}
    sae = load_sae(tmp_path / name, **hints)
    found = sae.encode(torch.from_numpy(x))
    assert np.array_equal(found.numpy() > 0, acts > 0)
    assert 0.1 < (acts > 0).mean() < 0.9
    np.testing.assert_allclose(found.numpy(), acts, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae.decode(found).numpy(), acts @ Wd.T + bd, rtol=1e-4, atol=1e-4)
    ids = [17, 0, 4]
    for again in (load_sae(tmp_path, **hints), load_sae(tmp_path, weights_file=name, **hints)):
        assert torch.equal(again.slice(ids)(torch.from_numpy(x)), found[:, ids])
    hook_point = None if layer is None else f"blocks.{layer}.hook_resid_post"
    assert (sae.card.hook_point, sae.card.model_name) == (hook_point, model)


def test_topk_file_without_its_k_is_refused(tmp_path: Path) -> None:
    write(tmp_path / TOPK, "encoder_linear", "decoder")
    with pytest.raises(SAEFormatError, match="is a TopK SAE's: found no k, expected the hint k"):
        load_sae(tmp_path / TOPK)
    with pytest.raises(SAEFormatError, match="k: found the hint 0, expected a whole number"):
        load_sae(tmp_path / TOPK, k=0)
    with pytest.raises(SAEFormatError, match="k is 21, expected 1 to d_sae, which is 20"):
        load_sae(tmp_path / TOPK, k=21)


def test_k_of_a_relu_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / GOODFIRE)
    with pytest.raises(SAEFormatError, match="is a ReLU SAE's: expected no hint k"):
        load_sae(tmp_path / GOODFIRE, k=5)


@pytest.mark.parametrize("more", ["pre_bias", "decoder.weight", "threshold"])
def test_tensor_that_the_formula_has_not_is_refused(tmp_path: Path, more: str) -> None:
    write(tmp_path / GOODFIRE)
    content = torch.load(tmp_path / GOODFIRE, weights_only=True)
    torch.save(content | {more: torch.zeros(D_IN, D_SAE)}, tmp_path / GOODFIRE)
    with pytest.raises(SAEFormatError, match=f"tensors: found .*{more}"):
        load_sae(tmp_path / GOODFIRE)


def test_same_names_in_a_dictionary_learning_file_are_not_taken_for_qresearchs(
    tmp_path: Path,
) -> None:
    write(tmp_path / "ae.pt", "encoder", "decoder")
    for place in (tmp_path, tmp_path / "ae.pt"):
        with pytest.raises(SAEFormatError) as caught:
            load_sae(place)
        assert "reads as goodfire" not in str(caught.value)
