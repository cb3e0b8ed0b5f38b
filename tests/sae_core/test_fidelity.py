"""Fidelity numbers against NumPy, and their bands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_core import sae as sae_module
from sae_core.errors import FidelityError, ShapeError
from sae_core.fidelity import Bands, Measured, measure
from sae_core.formats import load_sae
from sae_core.formats.saelens_writer import save_saelens
from sae_core.sae_config import Architecture
from sae_core.testing.planted import planted_sae

MEASURED = Measured(n_tokens=40, fvu=0.2, fvu_median=0.4, l0=10.0, firings={3: 20, 5: 4, 9: 0})


def tokens(n: int = 60, d_in: int = 12) -> torch.Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(4)) + 0.5


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "topk", "batchtopk"])
def test_numbers_equal_numpy(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sae_module, "CHUNK_LATENTS", 16)
    monkeypatch.setattr(sae_module, "SMALL_NUMBERS", 0)
    sae, x = planted_sae(12, 50, architecture=architecture, seed=2), tokens()
    acts = sae.encode(x).double().numpy()
    recons = acts @ sae.weights.W_dec.double().numpy() + sae.weights.b_dec.double().numpy()
    error = ((x.double().numpy() - recons) ** 2).sum(axis=0)
    variance = len(x) * x.double().numpy().var(axis=0)
    found = measure(sae, x, [7, 2, 41])
    assert found.n_tokens == 60
    assert found.fvu == pytest.approx(error.sum() / variance.sum(), rel=1e-5)
    assert found.fvu_median == pytest.approx(float(np.sort(error / variance)[5]), rel=1e-5)
    assert found.l0 == pytest.approx((acts != 0).sum(axis=1).mean())
    assert found.firings == {i: int((acts[:, i] != 0).sum()) for i in (7, 2, 41)}
    assert sum(found.firings.values()) > 0


def test_measuring_a_large_sae_reads_its_file_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sae_module, "SMALL_NUMBERS", 0)
    sae = planted_sae(12, 50, architecture="jumprelu", seed=2)
    save_saelens(sae, tmp_path)
    stored = load_sae(tmp_path)
    assert measure(stored, tokens(), [1]) == measure(sae, tokens(), [1])
    assert "weights" not in vars(stored)


def test_transcoder_is_judged_by_what_it_predicts() -> None:
    plain = planted_sae(12, 50, architecture="relu", seed=2)
    sae = plain.replaced(config=replace(plain.config, predicts_another_place=True))
    x, target = tokens(), tokens() * 2 + 1
    assert measure(sae, x).fvu is None
    error = (target - sae.forward(x)).double().square().sum()
    variance = (target - target.mean(dim=0)).double().square().sum()
    assert measure(sae, x, target=target).fvu == pytest.approx(float(error / variance), rel=1e-6)


def test_sae_of_one_head_is_judged_by_its_own_columns() -> None:
    sae, x = planted_sae(6, 20, architecture="relu", seed=2), tokens()
    second = sae.replaced(config=replace(sae.config, head_index=1))
    assert measure(second, x) == measure(sae, x[:, 6:])
    assert measure(second, x).fvu is not None


def test_one_token_is_too_few() -> None:
    with pytest.raises(ShapeError, match="found 1 probe tokens, expected at least 2"):
        measure(planted_sae(12, 50, architecture="relu", seed=2), tokens(1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fvu": 0.22}, "FVU is 0.22, expected 0.19 to 0.21"),
        ({"fvu": 0.18}, "FVU is 0.18, expected 0.19 to 0.21"),
        ({"fvu_median": 0.43}, "median FVU over dimensions is 0.43, expected 0.381 to 0.42"),
        ({"l0": 10.6}, "L0 is 10.6, expected 9.5 to 10.5"),
        ({"l0": 9.4}, "L0 is 9.4, expected 9.5 to 10.5"),
        ({"n_tokens": 41}, "the probe texts have 41 tokens, expected 40"),
        (
            {"firings": {3: 5, 5: 0, 9: 4}},
            "fire as expected in 18% of cases, expected at least",
        ),
        ({"firings": {3: 20, 5: 4, 7: 1, 9: 0}}, "latents 7 are registered and were not measured"),
        ({"fvu": float("nan")}, "FVU is nan, expected 0.19 to 0.21"),
        ({"fvu": None}, "FVU is not measured, expected 0.19 to 0.21"),
    ],
)
def test_what_lies_outside_is_said_with_both_numbers(change: dict[str, object], said: str) -> None:
    bands = Bands.around(MEASURED)
    assert bands.problems(MEASURED) == ()
    problems = bands.problems(replace(MEASURED, **change))  # type: ignore[arg-type]
    assert len(problems) == 1
    assert said in problems[0]


def test_too_few_firings_say_nothing() -> None:
    bands = Bands.around(replace(MEASURED, firings={3: 2}))
    assert bands.firing_agreement(replace(MEASURED, firings={3: 0})) is None
    assert bands.problems(replace(MEASURED, firings={3: 0})) == ()


def test_bands_survive_json() -> None:
    bands = Bands.around(MEASURED)
    again = Bands.from_json(json.loads(json.dumps(bands.to_json())), "l1.json", d_sae=10)
    assert again.firings == bands.firings
    assert again.l0_max == pytest.approx(bands.l0_max, rel=1e-5)
    assert again.fvu_min == pytest.approx(bands.fvu_min, rel=1e-5)
    assert bands.silent == (9,)
    assert again.with_bos


def test_tiny_numbers_survive_json() -> None:
    bands = Bands.around(replace(MEASURED, fvu=3e-7))
    again = Bands.from_json(json.loads(json.dumps(bands.to_json())), "l1.json", d_sae=10)
    assert again.problems(replace(MEASURED, fvu=3e-7)) == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"l0": "many"}, "l1.json: l0: found 'many', expected a number from 0"),
        ({"l0_min": -1}, "l1.json: l0_min: found -1, expected a number from 0"),
        ({"firings": [1]}, r"l1.json: firings: found \[1\], expected counts by latent id"),
        ({"firings": {"10": 1}}, "firings: found '10': 1, expected counts .* from 0 to 9"),
        ({"firings": {"-1": 1}}, "firings: found '-1': 1, expected counts"),
        ({"firings": {"1": 2.7}}, r"firings: found '1': 2\.7, expected counts"),
        ({"l0_min": 99}, r"l0_min, l0, l0_max: found \[99, 10\.0, 10\.5\], expected three numbers"),
        (
            {"fvu": None},
            "fvu_min, fvu, fvu_max: found .*, expected three numbers in order",
        ),
        ({"n_tokens": 2.5}, r"n_tokens: found 2\.5, expected a whole number"),
        ({"with_bos": 1}, "with_bos: found 1, expected true or false"),
        ({"extra": 1}, r"l1.json: found unknown \['extra'\], expected the keys n_tokens, fvu"),
        ({"l0_max": ...}, "l1.json: found no l0_max, expected the keys"),
    ],
)
def test_bands_that_are_malformed_are_refused(change: dict[str, object], said: str) -> None:
    content = {**Bands.around(MEASURED).to_json(), **change}
    content = {key: value for key, value in content.items() if value is not ...}
    with pytest.raises(FidelityError, match=said):
        Bands.from_json(content, "l1.json", d_sae=10)
