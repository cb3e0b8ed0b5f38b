"""How unusual a text is for the SAEs, in z-scores against benign calibration texts of its length.

Informational: nothing is decided on them. An attack may look like any benign text here, and an
unusual language is not an attack (benchmarks/LOG.md has what they tell apart).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from sae_core.baseline import Baseline
from sae_core.vitals import TextVitals


class AnomalyScores(NamedTuple):
    """Spreads above the mean of benign texts; NaN where not measured."""

    registered_l0: float
    """Active registered latents a token."""
    distance: float
    """Of the mean activations of the registered latents."""
    l0: float
    """Active latents of the whole SAE a token; of several SAEs the farthest from 0."""
    fvu: float
    """Fraction of variance unexplained; likewise."""


def anomaly_scores(baseline: Baseline, text: TextVitals) -> AnomalyScores:
    """The z-scores of one text; all NaN where no token was scored."""
    if not text.n_tokens:
        return AnomalyScores(*[math.nan] * 4)
    n = text.n_tokens
    whole = {"l0": math.nan, "fvu": math.nan}
    for sae, fit in text.fits.items():
        for kind, value in (("l0", fit.l0), ("fvu", fit.fvu)):
            signal = baseline.signals.get(f"{kind}:{sae}")
            if signal is None or math.isnan(value):
                continue
            z = signal.z(value, n)
            if math.isnan(whole[kind]) or abs(z) > abs(whole[kind]):
                whole[kind] = z
    return AnomalyScores(
        registered_l0=baseline.signals["registered_l0"].z(text.l0, n),
        distance=baseline.signals["distance"].z(baseline.distance(text.means), n),
        **whole,
    )
