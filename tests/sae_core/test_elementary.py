"""Against NumPy in float64, and the same bits wherever a number lies."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_core.elementary import exp, sigmoid, tanh

EXPECTED = {
    exp: np.exp,
    sigmoid: lambda x: 1 / (1 + np.exp(-x)),
    tanh: np.tanh,
}
SPREAD = torch.cat((torch.linspace(-80, 80, 40_001), torch.logspace(-30, -1, 3001)))


@pytest.mark.parametrize("function", EXPECTED)
def test_results_are_rounded_float64_results(function: Callable[[Tensor], Tensor]) -> None:
    expected = EXPECTED[function](SPREAD.double().numpy())
    off = np.abs(function(SPREAD).double().numpy() - expected)
    assert bool((off <= 0.51 * np.spacing(np.abs(expected).astype(np.float32))).all())


@pytest.mark.parametrize("function", EXPECTED)
def test_a_result_does_not_depend_on_its_place(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4099, generator=torch.Generator().manual_seed(0)) * 5
    whole = function(x)
    for start in range(0, 4099, 129):
        assert torch.equal(function(x[start : start + 1]), whole[start : start + 1])
        assert torch.equal(function(x[start:]), whole[start:])
    assert torch.equal(function(x[::3]), whole[::3])


def test_the_ends_of_the_line() -> None:
    ends = torch.tensor([-torch.inf, torch.inf, torch.nan, -1e30, 1e30])
    torch.testing.assert_close(
        sigmoid(ends), torch.tensor([0, 1, torch.nan, 0, 1]), equal_nan=True, rtol=0, atol=1e-300
    )
    torch.testing.assert_close(
        tanh(ends), torch.tensor([-1, 1, torch.nan, -1, 1]), equal_nan=True, rtol=0, atol=0
    )
    torch.testing.assert_close(
        exp(ends), torch.tensor([0, torch.inf, torch.nan, 0, torch.inf]), equal_nan=True
    )
