"""Encode, decode and slices against NumPy in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_core import ranking
from sae_core.errors import ShapeError
from sae_core.formats import load_sae
from sae_core.formats.saelens_writer import save_saelens
from sae_core.sae import SAE
from sae_core.sae_config import Architecture, SAEConfig
from sae_core.sae_weights import SAEWeights

ARCHITECTURES: tuple[Architecture, ...] = ("relu", "jumprelu", "topk", "batchtopk")


def random_sae(
    architecture: Architecture, *, d_in: int = 12, d_sae: int = 50, k: int = 6, b_dec: bool = True
) -> SAE:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    threshold = {"jumprelu": normal(d_sae), "batchtopk": torch.full((d_sae,), 1.5)}
    return SAE(
        SAEConfig(
            architecture=architecture,
            d_in=d_in,
            d_sae=d_sae,
            k=k if architecture == "topk" else None,
            apply_b_dec_to_input=b_dec,
        ),
        SAEWeights(
            normal(d_in, d_sae),
            normal(d_sae),
            normal(d_sae, d_in),
            normal(d_in),
            threshold.get(architecture),
        ),
    )


def oracle(sae: SAE, x: torch.Tensor) -> np.ndarray:
    """Every latent of every row, one at a time, in float64."""
    w = [None if t is None else t.double().numpy() for t in sae.weights]
    z = x.double().numpy() - (w[3] if sae.config.apply_b_dec_to_input else 0)
    acts = np.zeros((len(z), sae.config.d_sae))
    for t, row in enumerate(z):
        h = [float(row @ w[0][:, j] + w[1][j]) for j in range(sae.config.d_sae)]
        kept = set(range(len(h)))
        if sae.config.architecture == "topk":
            kept = set(sorted(kept, key=lambda j, h=h: (-h[j], j))[: sae.config.k])
        for j in kept:
            above = w[4] is None or h[j] > w[4][j]
            acts[t, j] = max(h[j], 0.0) if above else 0.0
    return acts


@pytest.mark.parametrize("b_dec", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encode_and_decode_equal_numpy(architecture: Architecture, b_dec: bool) -> None:
    sae = random_sae(architecture, b_dec=b_dec)
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    expected = oracle(sae, x)
    acts = sae.encode(x)
    assert np.array_equal(acts.numpy() > 0, expected > 0)
    assert 0 < (expected > 0).mean() < 1
    np.testing.assert_allclose(acts.numpy(), expected, rtol=1e-5, atol=1e-5)
    recons = expected @ sae.weights.W_dec.double().numpy() + sae.weights.b_dec.double().numpy()
    np.testing.assert_allclose(sae.decode(acts).numpy(), recons, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slice_gives_the_columns_asked_for_in_their_order(architecture: Architecture) -> None:
    sae = random_sae(architecture)
    x = torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(1))
    ids = [49, 3, 0, 17]
    expected = sae.encode(x)[..., ids]
    assert (expected > 0).any()
    for acts in (
        sae.slice(ids)(x),
        sae.to("cpu").slice(ids).to("cpu")(x),
        sae.encode(x, ids),
        sae.encode(x, torch.tensor(ids)),
    ):
        assert torch.equal(acts > 0, expected > 0)
        torch.testing.assert_close(acts, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("chunk", "block"), [(1, 3), (4, 9), (7, 1000), (50, 64), (64, 2**20)])
@pytest.mark.parametrize("k", [1, 6, 50])
def test_topk_slice_does_not_depend_on_its_chunks(
    chunk: int, block: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "CHUNK_LATENTS", chunk)
    monkeypatch.setattr(ranking, "BLOCK_NUMBERS", block)
    sae = random_sae("topk", k=k)
    x = torch.randn(33, 12, generator=torch.Generator().manual_seed(2))
    ids = list(range(0, 50, 3))
    expected = sae.encode(x)[:, ids]
    torch.testing.assert_close(sae.slice(ids)(x), expected, rtol=1e-5, atol=1e-6)


def test_topk_slice_keeps_the_lowest_ids_of_a_tie() -> None:
    """Small integers make every product exact, so equal columns give exactly equal values."""
    generator = torch.Generator().manual_seed(0)
    W_enc = torch.randint(-1, 2, (4, 60), generator=generator).float()
    config = SAEConfig(architecture="topk", d_in=4, d_sae=60, k=7)
    weights = SAEWeights(W_enc, torch.zeros(60), torch.zeros(60, 4), torch.zeros(4))
    sae = SAE(config, weights)
    x = torch.randint(-2, 3, (64, 4), generator=generator).float()
    expected = torch.from_numpy(oracle(sae, x)).float()
    assert torch.equal(sae.encode(x), expected)
    for ids in (list(range(60)), [5, 40, 41, 2], [59], [0]):
        assert torch.equal(sae.slice(ids)(x), expected[:, ids])


def test_topk_slice_of_many_tokens_never_holds_a_token_by_dictionary_array(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranking, "CHUNK_LATENTS", 64)
    monkeypatch.setattr(ranking, "BLOCK_NUMBERS", 64 * 8)
    sae = random_sae("topk", d_sae=6400)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                view = out.untyped_storage().data_ptr() in weights
                largest = max(largest, 0 if view else out.numel())
            return out

    weights = {w.untyped_storage().data_ptr() for w in sae.weights if w is not None}
    encoder = sae.slice([1, 2, 3])
    x = torch.randn(64, 12)
    with Watch():
        encoder(x)
    assert 0 < largest <= 64 * 64  # a tile; tokens x dictionary would be 409600


def test_half_precision_input_is_read_as_float32() -> None:
    sae = random_sae("relu")
    x = torch.randn(3, 12).bfloat16()
    assert torch.equal(sae.encode(x), sae.encode(x.float()))
    assert sae.slice([4])(x).dtype == torch.float32


def test_an_empty_slice_and_an_empty_input_are_fine() -> None:
    sae = random_sae("topk")
    assert sae.slice([])(torch.randn(3, 12)).shape == (3, 0)
    assert sae.slice([1, 2])(torch.randn(0, 12)).shape == (0, 2)


def test_stored_bfloat16_becomes_float32() -> None:
    sae = random_sae("jumprelu")
    halved = SAEWeights(*(None if w is None else w.bfloat16() for w in sae.weights))  # type: ignore[arg-type]
    assert {w.dtype for w in SAE(sae.config, halved).weights if w is not None} == {torch.float32}


def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    sae = random_sae("jumprelu")
    with pytest.raises(ShapeError, match=r"threshold has shape \(15,\), expected \(50,\)"):
        SAE(sae.config, sae.weights._replace(threshold=torch.zeros(15)))
    with pytest.raises(ShapeError, match=r"threshold has shape None, expected \(50,\)"):
        SAE(sae.config, sae.weights._replace(threshold=None))
    with pytest.raises(ShapeError, match=r"W_enc has shape \(50, 12\), expected \(12, 50\)"):
        SAE(sae.config, sae.weights._replace(W_enc=sae.weights.W_enc.T))
    relu = random_sae("relu")
    with pytest.raises(ShapeError, match="threshold has shape .*, expected none for relu"):
        SAE(relu.config, relu.weights._replace(threshold=torch.zeros(50)))


def test_input_of_another_width_is_refused() -> None:
    sae = random_sae("relu")
    for encode in (sae.encode, sae.slice([0])):
        with pytest.raises(ShapeError, match="x has width 11, the SAE's d_in is 12"):
            encode(torch.zeros(2, 11))


def test_latent_ids_outside_the_dictionary_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"latent_ids has \[-1, 50\], expected ids from 0 to 49"):
        random_sae("relu").slice([3, -1, 50])


def test_a_latent_asked_for_twice_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"latent_ids has \[3\] more than once"):
        random_sae("relu").slice([3, 1, 3])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "topk"}, "k is None, expected 1 to d_sae"),
        ({"architecture": "topk", "k": 9}, "k is 9, expected 1 to d_sae, which is 8"),
        ({"architecture": "relu", "k": 2}, "k is 2, expected none for relu"),
        ({"architecture": "relu", "d_in": 0}, "d_in is 0"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        SAEConfig(**{"d_in": 4, "d_sae": 8, **change})  # type: ignore[arg-type]


def test_an_encoder_alone_encodes_and_says_that_it_cannot_decode() -> None:
    sae = random_sae("topk")
    alone = SAE(sae.config, sae.weights._replace(W_dec=None))
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(alone.encode(x), sae.encode(x))
    with pytest.raises(ShapeError, match="W_dec: found none, expected a decoder"):
        alone.decode(alone.encode(x))


def test_a_gate_that_looks_at_decoder_rows_needs_them() -> None:
    sae = random_sae("topk")
    config = replace(sae.config, decoder_norms="acts")
    with pytest.raises(ShapeError, match=r"W_dec has shape None, expected \(50, 12\)"):
        SAE(config, sae.weights._replace(W_dec=None))


def test_latent_ids_that_are_no_list_of_whole_numbers_are_refused() -> None:
    sae = random_sae("relu")
    for ids, found in (
        (torch.tensor([1.7]), "1-d of float32"),
        (torch.tensor([True, False]), "1-d of bool"),
        (torch.tensor([[1, 2]]), "2-d of int64"),
    ):
        with pytest.raises(ShapeError, match=f"latent_ids is {found}, expected a list of whole"):
            sae.slice(ids)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_input_that_asks_for_gradients_is_encoded_all_the_same(architecture: Architecture) -> None:
    sae, x = random_sae(architecture), torch.randn(3, 12, requires_grad=True)
    assert not sae.encode(x).requires_grad
    assert torch.equal(sae.slice([4, 2])(x), sae.encode(x.detach())[:, [4, 2]])


def test_encoding_leaves_the_decoder_where_it_is(tmp_path: Path) -> None:
    save_saelens(random_sae("topk"), tmp_path)
    stored, x = load_sae(tmp_path), torch.randn(3, 12)
    assert torch.equal(stored.encode(x), random_sae("topk").encode(x))
    assert "weights" not in vars(stored)
