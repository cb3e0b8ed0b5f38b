"""Facts about an SAE on held-out activations: FVU, L0, dead share, firing rates."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.errors import TrainingError
from sae_core.sae import SAE
from sae_core.sae_config import THRESHOLDED

CHUNK_TOKENS = 4096
RATE_EDGES = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Bounds of the firing-rate histogram, powers of ten: most latents fire on 0.01 % to 1 %."""


class SAEReport(NamedTuple):
    """An SAE measured in float32 on tokens it was not trained on."""

    n_tokens: int
    fvu: float
    """Fraction of variance unexplained, over all dimensions together."""
    fvu_median_dimension: float
    """Median over dimensions: what a few dimensions of large variance cannot hide."""
    l0: float
    """Mean active latents a token."""
    dead_share: float
    """Share of latents that fire on none of the tokens."""
    rate_histogram: tuple[int, ...]
    """Latents by firing rate: never, then between successive `RATE_EDGES`."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON; the histogram by its ranges."""
        names = ["never"] + [
            f"{low:g}..{high:g}" for low, high in zip(RATE_EDGES[:-1], RATE_EDGES[1:], strict=True)
        ]
        return {
            **{key: value for key, value in self._asdict().items() if key != "rate_histogram"},
            "firing_rate_histogram": dict(zip(names, self.rate_histogram, strict=True)),
        }


def measure_sae(sae: SAE, resid: Float[Tensor, "total d_in"]) -> SAEReport:
    """Run the whole SAE over the activations."""
    if len(resid) < 2:
        raise TrainingError(f"found {len(resid)} held-out tokens, expected at least 2")
    mean = resid.mean(0)
    unexplained = torch.zeros(sae.config.d_in, dtype=torch.float64)
    variance = torch.zeros(sae.config.d_in, dtype=torch.float64)
    fired = torch.zeros(sae.config.d_sae, dtype=torch.float64)
    with torch.inference_mode():
        for rows in torch.split(resid, CHUNK_TOKENS):
            acts = sae.encode(rows)
            unexplained += (rows - sae.decode(acts, rows)).double().square().sum(0)
            variance += (rows - mean).double().square().sum(0)
            fired += (acts > 0).sum(0)
    rates = fired / len(resid)
    inside = [
        int(((rates > low) & (rates <= high)).sum())
        for low, high in zip(RATE_EDGES[:-1], RATE_EDGES[1:], strict=True)
    ]
    never = int((fired == 0).sum())
    return SAEReport(
        n_tokens=len(resid),
        fvu=float(unexplained.sum() / variance.sum()),
        fvu_median_dimension=float((unexplained / variance.clamp(min=1e-12)).median()),
        l0=float(rates.sum()),
        dead_share=never / sae.config.d_sae,
        rate_histogram=(never, *inside),
    )


def with_l0(sae: SAE, resid: Float[Tensor, "total d_in"], l0: float, *, n_bins: int = 4096) -> SAE:
    """The SAE with the one threshold for all latents at which its mean L0 on the rows is `l0`.

    Read off a histogram of pre-activations, so it is right to about one bin in `n_bins`. Raises
    TrainingError for an SAE without thresholds.
    """
    threshold = sae.weights.threshold
    if sae.config.architecture not in THRESHOLDED or threshold is None:
        raise TrainingError(f"a {sae.config.architecture} SAE has no threshold to set")
    top = 4.0 * max(float(threshold.max()), 1e-6)
    counts = torch.zeros(n_bins, dtype=torch.float64)
    above = 0
    with torch.inference_mode():
        for rows in torch.split(resid, CHUNK_TOKENS):
            pre_acts = sae.pre_acts(rows)
            above += int((pre_acts > top).sum())
            inside = pre_acts[(pre_acts > 0) & (pre_acts <= top)]
            counts += torch.histc(inside, bins=n_bins, min=0.0, max=top).double()
    n_active = counts.flip(0).cumsum(0).flip(0) + above  # at the lower edge of each bin
    wanted = l0 * len(resid)
    bin_index = int((n_active >= wanted).sum()) - 1
    found = torch.full_like(threshold, max(0.0, bin_index) * top / n_bins)
    return SAE(sae.config, sae.weights._replace(threshold=found), sae.card)
