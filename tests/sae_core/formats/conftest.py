"""What every format's tests check: the file against a formula in float64, slices against both."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from sae_core.sae import SAE


@pytest.fixture
def assert_computes() -> Callable[..., None]:
    """Fails unless the SAE's latents and reconstruction are those of the formula."""
    return _assert_computes


def _assert_computes(
    load: Callable[[], SAE], x: np.ndarray, acts: np.ndarray, recons: np.ndarray
) -> None:
    given = torch.from_numpy(x.astype(np.float32))
    sae = load()
    found = sae.encode(given)
    assert 0 < (acts != 0).mean() < 1
    assert np.array_equal(found.numpy() != 0, acts != 0)
    np.testing.assert_allclose(found.numpy(), acts, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae.forward(given).numpy(), recons, rtol=1e-4, atol=1e-4)
    for ids in ([5, 0, 11], list(range(acts.shape[1]))):
        assert torch.equal(load().slice(ids)(given), found[:, ids])
