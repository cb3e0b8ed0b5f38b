"""What one text did to the SAEs, in sums: enough to compare traffic with a calibration.

Sums of parts add up to those of the whole, so that a stream's can be taken piece by piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray


class FitSums(NamedTuple):
    """One whole SAE on some tokens, the first of a text left out."""

    n_tokens: int
    n_active: float
    """Active latents, all tokens together."""
    error: float
    """Squared distance of the reconstructions from what they stand for; NaN without a decoder, or
    where that is another place."""
    squares: float
    """Squared length of what they stand for."""
    sums: Float64[ndarray, " d_in"]
    """Sum of what they stand for: with `squares` its variance."""

    @property
    def l0(self) -> float:
        """Active latents a token."""
        return self.n_active / self.n_tokens

    @property
    def variance(self) -> float:
        """Squared distances from the tokens' own mean, summed."""
        return max(0.0, self.squares - float(self.sums @ self.sums) / self.n_tokens)

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained; NaN where there is no variance, or no error known."""
        variance = self.variance
        return self.error / variance if self.n_tokens > 1 and variance > 0 else float("nan")

    def plus(self, other: FitSums) -> FitSums:
        """Both together."""
        return FitSums(
            n_tokens=self.n_tokens + other.n_tokens,
            n_active=self.n_active + other.n_active,
            error=self.error + other.error,
            squares=self.squares + other.squares,
            sums=self.sums + other.sums,
        )


def summed(fits: Sequence[Mapping[str, FitSums]]) -> dict[str, FitSums]:
    """Those of several pieces together, by SAE."""
    total: dict[str, FitSums] = {}
    for piece in fits:
        for sae, sums in piece.items():
            total[sae] = total[sae].plus(sums) if sae in total else sums
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class TextVitals:
    """One text's scored tokens, over the registered latents in the order of the heads."""

    n_tokens: int
    firings: Int64[ndarray, " n_latents"]
    """Tokens on which each latent was active."""
    totals: Float64[ndarray, " n_latents"]
    """Sums of their activations."""
    fits: Mapping[str, FitSums] = field(default_factory=dict)
    """By SAE, where the text was one of those whose fit was measured."""

    @property
    def l0(self) -> float:
        """Active registered latents a token."""
        return float(self.firings.sum()) / self.n_tokens

    @property
    def means(self) -> Float64[ndarray, " n_latents"]:
        """Mean activations."""
        means: ndarray = self.totals / self.n_tokens
        return means

    def to_bytes(self) -> bytes:
        """As numbers, without `FitSums.sums`, which only adding needs."""
        fits = [[fit.n_tokens, fit.n_active, fit.error, fit.variance] for fit in self.fits.values()]
        head = [self.n_tokens, len(self.firings), len(fits)]
        flat = np.concatenate([head, self.firings, self.totals, *fits]).astype("<f8")
        return flat.tobytes()

    @classmethod
    def from_bytes(cls, stored: bytes, saes: Sequence[str]) -> TextVitals:
        """What `to_bytes` gave, of these SAEs."""
        flat = np.frombuffer(stored, "<f8")
        n_tokens, n, n_fits = (int(v) for v in flat[:3])
        rest = flat[3 + 2 * n :].reshape(n_fits, 4)
        nothing = np.zeros(0)
        return cls(
            n_tokens=n_tokens,
            firings=flat[3 : 3 + n].astype(np.int64),
            totals=flat[3 + n : 3 + 2 * n].astype(np.float64),
            fits={
                sae: FitSums(int(row[0]), float(row[1]), float(row[2]), float(row[3]), nothing)
                for sae, row in zip(saes, rest, strict=False)
            },
        )
