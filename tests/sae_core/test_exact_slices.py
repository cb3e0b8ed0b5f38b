"""A slice is the whole encoder, bit for bit: hypothesis over formulas, shapes, ids and storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from sae_core import ranking
from sae_core.exact_product import TILE_COLUMNS, exact_product, padded_to_tiles
from sae_core.formats.files import open_npz, open_safetensors
from sae_core.sae import SAE
from sae_core.sae_config import RANKED, SAEConfig
from sae_core.sae_weights import SAEStore, SAEWeights
from sae_core.stored import InMemory, Stored

ELEMENTWISE = ("relu", "tanh_relu", "jumprelu", "gated", "batchtopk")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BOUNDED = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Plan(NamedTuple):
    """What an SAE and an input are made from; drawn apart, as building calls checked code."""

    config: dict[str, Any]
    has_glu: bool
    is_whole: bool
    """Whole numbers make exact ties."""
    storage: str
    dtype: str
    rows: int
    n_ids: int
    seed: int


class Case(NamedTuple):
    """An SAE in some storage, the ids to slice and an input."""

    sae: SAE
    ids: list[int]
    x: Tensor


@st.composite
def plans(draw: st.DrawFn, architectures: tuple[str, ...]) -> Plan:
    """Everything that a formula allows, at sizes on both sides of tiles and chunks."""
    architecture = draw(st.sampled_from(architectures))
    d_in, k = draw(st.integers(1, 300)), draw(st.integers(1, 80))
    if architecture == "groupmax":
        d_sae = k * draw(st.integers(1, 700 // k))
    else:
        d_sae = draw(st.integers(1, 700))
    counts = architecture in (*RANKED, "groupmax")
    has_norms = architecture not in ("gated", "groupmax")
    config = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "k": min(k, d_sae) if counts else None,
        "signed": architecture == "topk" and draw(st.booleans()),
        "center_input": draw(st.booleans()),
        "normalize": draw(st.sampled_from(("none", "layer_norm", "unit_norm"))),
        "input_scale": draw(st.sampled_from((1.0, 0.37))),
        "apply_b_dec_to_input": draw(st.booleans()),
        "decoder_norms": draw(st.sampled_from(("unused", "gate", "acts")[: 3 if has_norms else 1])),
    }
    if d_in < 3:  # a deviation of one number, a centred one: nothing to compare
        config |= {"normalize": "none", "center_input": False}
    return Plan(
        config=config,
        has_glu=draw(st.booleans()),
        is_whole=draw(st.booleans()),
        storage=draw(st.sampled_from(("memory", "safetensors", "npz"))),
        dtype=draw(st.sampled_from(tuple(DTYPES))),
        rows=draw(st.integers(1, 70)),
        n_ids=draw(st.integers(1, d_sae)),
        seed=draw(st.integers(0, 2**31)),
    )


def built(plan: Plan, folder: Path) -> Case:
    config = SAEConfig(**plan.config)
    generator = torch.Generator().manual_seed(plan.seed)
    weights = made_weights(config, generator, whole=plan.is_whole, has_glu=plan.has_glu)
    sae = stored_sae(config, weights, plan.storage, plan.dtype, folder)
    ids = torch.randperm(config.d_sae, generator=generator)[: plan.n_ids].tolist()
    return Case(sae, ids, numbers(generator, plan.is_whole, plan.rows, config.d_in))


def numbers(generator: torch.Generator, whole: bool, *shape: int) -> Tensor:
    if whole:
        return torch.randint(-2, 3, shape, generator=generator).float()
    return torch.randn(*shape, generator=generator)


def made_weights(
    config: SAEConfig, generator: torch.Generator, *, whole: bool, has_glu: bool
) -> SAEWeights:
    def some(*shape: int) -> Tensor:
        return numbers(generator, whole, *shape)

    d_in, d_sae = config.d_in, config.d_sae
    is_gated = config.architecture == "gated"
    thresholds = {"jumprelu": some(d_sae), "batchtopk": torch.full((d_sae,), 0.5)}
    return SAEWeights(
        W_enc=some(d_in, d_sae),
        b_enc=None if is_gated else some(d_sae),
        W_dec=some(d_sae, d_in),
        b_dec=some(d_in),
        threshold=thresholds.get(config.architecture),
        b_gate=some(d_sae) if is_gated else None,
        r_mag=some(d_sae) if is_gated else None,
        b_mag=some(d_sae) if is_gated else None,
        W_glu=some(d_in, d_sae) if has_glu else None,
        b_glu=some(d_sae) if has_glu else None,
    )


def stored_sae(
    config: SAEConfig, weights: SAEWeights, storage: str, dtype: str, folder: Path
) -> SAE:
    """The SAE with its matrices the wrong way round in a file, as `nn.Linear` has them, or not."""
    given = {n: t.to(DTYPES[dtype]) for n, t in weights._asdict().items() if t is not None}
    found: dict[str, Stored]
    if storage == "memory":
        found = {name: InMemory(tensor, name) for name, tensor in given.items()}
    else:
        lying = {n: t.T.contiguous() if n in ("W_enc", "W_glu") else t for n, t in given.items()}
        path = folder / f"weights.{storage}"
        if storage == "safetensors":
            save_file(lying, path)
            opened = open_safetensors(path)
        else:
            half = np.float32 if dtype == "bfloat16" else None  # NumPy has no bfloat16
            arrays = {n: (t.float() if half else t).numpy() for n, t in lying.items()}
            np.savez(path, **arrays)
            opened = open_npz(path)
        found = {n: opened[n].T if n in ("W_enc", "W_glu") else opened[n] for n in lying}
    return SAE(config, SAEStore(config, found))


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Equal, NaN to NaN, 0 to 0 of either sign."""
    return bool(((found == expected) | (found.isnan() & expected.isnan())).all())


@BOUNDED
@given(plan=plans((*ELEMENTWISE, "groupmax")))
def test_a_slice_of_an_elementwise_gate_has_the_bits_of_the_whole(
    plan: Plan, tmp_path: Path
) -> None:
    sae, ids, x = built(plan, tmp_path)
    assert same_bits(sae.slice(ids)(x), sae.encode(x)[:, ids])


@BOUNDED
@given(plan=plans(RANKED), tiles=st.integers(1, 6), block=st.integers(8960, 70 * 700))
def test_a_slice_of_a_ranked_gate_has_the_bits_of_the_whole(
    plan: Plan, tiles: int, block: int, tmp_path: Path
) -> None:
    sae, ids, x = built(plan, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "CHUNK_LATENTS", TILE_COLUMNS * tiles)
        patch.setattr(ranking, "BLOCK_NUMBERS", block)
        acts = sae.slice(ids)(x)
        whole = sae.encode(x)
    assert same_bits(acts, whole[:, ids])
    assert same_bits(whole, sae.encode(x))  # blocks change nothing
    assert int((whole != 0).sum(dim=1).max()) <= (sae.config.k or 0) or bool(whole.isnan().any())


@BOUNDED
@given(plan=plans((*ELEMENTWISE, "groupmax", *RANKED)))
def test_a_token_alone_has_the_bits_that_it_has_in_a_batch(plan: Plan, tmp_path: Path) -> None:
    sae, ids, x = built(plan, tmp_path)
    encoder = sae.slice(ids)
    acts = encoder(x)
    some = list(range(plan.seed % len(x), len(x), 29))
    for row in some:
        assert same_bits(encoder(x[row : row + 1]), acts[row : row + 1])
        assert same_bits(encoder(x[row]), acts[row])
    assert same_bits(encoder(x[some]), acts[some])
    wide = torch.zeros(len(x), x.shape[1] + 3)
    wide[:, 3:] = x
    assert same_bits(encoder(wide[:, 3:]), acts)


def float64_acts(sae: SAE, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Activations in float64 NumPy, and how far each latent is from being decided otherwise."""
    config = sae.config
    w = {n: t.double().numpy() for n, t in sae.weights._asdict().items() if t is not None}
    z = x.double().numpy()
    if config.center_input:
        z = z - z.mean(1, keepdims=True)
    if config.normalize == "layer_norm":
        z = z - z.mean(1, keepdims=True)
        z = z / (z.std(1, ddof=1, keepdims=True) + 1e-5)
    elif config.normalize == "unit_norm":
        z = z / np.linalg.norm(z, axis=1, keepdims=True) * config.d_in**0.5
    z = z * config.input_scale
    if config.apply_b_dec_to_input:
        z = z - w["b_dec"]
    h = z @ w["W_enc"] + w.get("b_enc", 0.0)
    if "W_glu" in w:
        h = h / (1 + np.exp(-(z @ w["W_glu"] + w["b_glu"])))
    norms = np.linalg.norm(w["W_dec"], axis=1)
    q = h if config.decoder_norms == "unused" else h * norms
    out = q if config.decoder_norms == "acts" else h
    if config.architecture == "gated":
        gate = h + w["b_gate"]
        return np.maximum(h * np.exp(w["r_mag"]) + w["b_mag"], 0) * (gate > 0), np.abs(gate)
    if config.architecture in ("relu", "tanh_relu"):
        acts = np.maximum(out, 0)
        return np.tanh(acts) if config.architecture == "tanh_relu" else acts, np.abs(q)
    if config.architecture in ("jumprelu", "batchtopk"):
        bar = np.maximum(w["threshold"], 0)
        return np.maximum(out, 0) * (q > bar), np.abs(q - bar)
    assert config.k is not None
    if config.architecture == "groupmax":
        grouped = h.reshape(len(h), config.k, -1)
        first_two = -np.sort(-grouped, axis=2)[:, :, :2]
        margin = np.minimum(np.abs(first_two[:, :, :1] - grouped), 1e9)
        if grouped.shape[2] > 1:
            lead = first_two[:, :, :1] - first_two[:, :, 1:]
            margin = np.where(margin == 0, lead, margin)
        else:
            margin = np.abs(grouped)
        won = grouped == grouped.max(axis=2, keepdims=True)
        acts = np.where(won, np.maximum(grouped, 0), 0).reshape(h.shape)
        return acts, np.minimum(margin.reshape(h.shape), np.abs(h))
    key = np.abs(q) if config.architecture == "abstopk" else q
    ordered = -np.sort(-key, axis=1)
    kth = ordered[:, config.k - 1 : config.k]
    after = ordered[:, config.k : config.k + 1] if config.k < config.d_sae else kth - 1e9
    lowest = -np.inf if config.signed else 0.0
    acts = np.where((key >= kth) & (key > lowest), out, 0)
    margin = np.where(key >= kth, key - after, kth - key)
    return acts, margin if config.signed else np.minimum(margin, np.abs(key))


@BOUNDED
@given(plan=plans((*ELEMENTWISE, "groupmax", *RANKED)))
def test_slices_agree_with_float64_wherever_rounding_cannot_decide(
    plan: Plan, tmp_path: Path
) -> None:
    sae, ids, x = built(plan, tmp_path)
    with np.errstate(over="ignore", invalid="ignore"):
        expected, margin = float64_acts(sae, x)
    expected, margin = expected[:, ids], margin[:, ids]
    acts = sae.slice(ids)(x).numpy()
    with np.errstate(invalid="ignore"):
        size = np.abs(expected).max() if np.isfinite(expected).all() else np.inf
        tolerance = 1e-3 * (1 + size)  # float32 products of up to 300 numbers, normalised
        decided = margin > tolerance
    assert np.array_equal(acts[decided] != 0, expected[decided] != 0)
    np.testing.assert_allclose(acts[decided], expected[decided], rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_one_token_at_a_time_is_decided_as_the_whole_is(architecture: Any) -> None:
    """Few rows are looked at roughly first; thousands of latents make near ties common."""
    generator = torch.Generator().manual_seed(5)
    config = SAEConfig(architecture=architecture, d_in=40, d_sae=9000, k=64, decoder_norms="gate")
    sae = SAE(config, made_weights(config, generator, whole=False, has_glu=False))
    x = torch.randn(40, 40, generator=generator)
    ids = torch.randperm(9000, generator=generator)[:3000]
    expected = sae.encode(x)[:, ids]
    encoder = sae.slice(ids)
    assert (expected != 0).sum() > 40
    for row in range(len(x)):
        assert torch.equal(encoder(x[row : row + 1])[0], expected[row])


def test_a_rough_key_is_never_farther_off_than_its_bound() -> None:
    """Large numbers that cancel are where float32 is worst."""
    generator = torch.Generator().manual_seed(6)
    config = SAEConfig(architecture="topk", d_in=2048, d_sae=200, k=4)
    weights = made_weights(config, generator, whole=False, has_glu=False)
    encoder = SAE(config, weights).slice([0])
    z = torch.randn(3, 2048, generator=generator) * torch.logspace(-4, 4, 2048)
    rough = encoder._rough_keys(z)
    assert rough is not None
    exact = z.double() @ weights.W_enc.double() + weights.b_enc.double()  # type: ignore[union-attr]
    off = (rough.keys(z, 0, 200) - exact).abs().amax(dim=1)
    assert bool((off > 0).all())
    assert bool((2 * off < rough.error).all())


def test_a_token_that_is_not_finite_never_looks_silent() -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3, 12, generator=generator)
    x[1] = 0  # has no direction to normalise
    for architecture, k in (("topk", 4), ("abstopk", 4), ("groupmax", 5), ("relu", None)):
        config = SAEConfig(
            architecture=architecture,  # type: ignore[arg-type]
            d_in=12,
            d_sae=50,
            k=k,
            normalize="unit_norm",
        )
        sae = SAE(config, made_weights(config, generator, whole=False, has_glu=False))
        for acts in (sae.encode(x), sae.slice([3, 9])(x)):
            assert bool(acts[1].isnan().all())
            assert bool(acts[[0, 2]].isfinite().all())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 70),
    d_in=st.integers(1, 300),
    n=st.integers(1, 700),
    seed=st.integers(0, 2**31),
)
def test_a_product_does_not_depend_on_company(rows: int, d_in: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, W = torch.randn(rows, d_in, generator=generator), torch.randn(d_in, n, generator=generator)
    whole = exact_product(z, padded_to_tiles(W), n)
    columns = torch.randperm(n, generator=generator)[: max(1, n // 3)]
    some = torch.randperm(rows, generator=generator)[: max(1, rows // 2)]
    part = exact_product(z[some], padded_to_tiles(W[:, columns]), len(columns))
    assert torch.equal(part, whole[some][:, columns])
