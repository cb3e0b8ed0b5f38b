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
    x = tokens()
    assert measure(sae, x).fvu is None
    assert measure(sae, x, target=sae.forward(x)).fvu == pytest.approx(0, abs=1e-6)


def test_one_token_is_too_few() -> None:
    with pytest.raises(ShapeError, match="found 1 probe tokens, expected at least 2"):
        measure(planted_sae(12, 50, architecture="relu", seed=2), tokens(1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fvu": 0.26}, "FVU is 0.26, expected 0.16 to 0.25"),
        ({"fvu": 0.15}, "FVU is 0.15, expected 0.16 to 0.25"),
        ({"fvu_median": 0.51}, "median FVU over dimensions is 0.51, expected 0.32 to 0.5"),
        ({"l0": 12.6}, "L0 is 12.6, expected 7.5 to 12.5"),
        ({"l0": 7.4}, "L0 is 7.4, expected 7.5 to 12.5"),
        ({"n_tokens": 41}, "the probe texts have 41 tokens, expected 40"),
        (
            {"firings": {3: 5, 5: 0, 9: 4}},
            "fire as expected in 18% of cases, expected at least 50%",
        ),
        ({"fvu": float("nan")}, "FVU is nan, expected 0.16 to 0.25"),
        ({"fvu": None}, "FVU is not measured, expected 0.16 to 0.25"),
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
    again = Bands.from_json(json.loads(json.dumps(bands.to_json())), "l1.json")
    assert again == bands


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"l0": "many"}, "l1.json: l0: found 'many', expected a number from 0"),
        ({"l0_min": -1}, "l1.json: l0_min: found -1, expected a number from 0"),
        ({"firings": [1]}, r"l1.json: firings: found \[1\], expected counts by latent id"),
        ({"extra": 1}, r"l1.json: found unknown \['extra'\], expected the keys n_tokens, fvu"),
        ({"l0_max": ...}, "l1.json: found no l0_max, expected the keys"),
    ],
)
def test_bands_that_are_malformed_are_refused(change: dict[str, object], said: str) -> None:
    content = {**Bands.around(MEASURED).to_json(), **change}
    content = {key: value for key, value in content.items() if value is not ...}
    with pytest.raises(FidelityError, match=said):
        Bands.from_json(content, "l1.json")
