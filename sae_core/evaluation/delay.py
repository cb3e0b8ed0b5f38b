"""How soon a stream is caught: scored tokens that had been read when a verdict was reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

HORIZONS = (16, 32, 64, 128, 256, 512)
"""Tokens after which the share of caught texts is stated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delay:
    """Of harmful texts treated as streams."""

    n: int
    n_caught: int
    median_tokens: float | None
    """Of those caught; None where none was. The token that reached the threshold counts."""
    p90_tokens: float | None
    median_share_of_text: float | None
    """The same as a share of the text's scored tokens."""
    caught_within: Mapping[int, float]
    """Tokens -> share of all the texts that were caught by then."""


def delay_of(caught_at: Sequence[int | None], n_tokens: Sequence[int]) -> Delay | None:
    """The delay over some texts; None where there are none.

    Args:
        caught_at: Per text the scored tokens up to and with the one that reached the verdict;
            None where it never was.
        n_tokens: Per text all its scored tokens.
    """
    if not caught_at:
        return None
    found = np.array([at for at in caught_at if at is not None], np.float64)
    shares = [at / n for at, n in zip(caught_at, n_tokens, strict=True) if at is not None]
    return Delay(
        n=len(caught_at),
        n_caught=len(found),
        median_tokens=float(np.median(found)) if len(found) else None,
        p90_tokens=float(np.percentile(found, 90)) if len(found) else None,
        median_share_of_text=float(np.median(shares)) if shares else None,
        caught_within={h: float((found <= h).sum() / len(caught_at)) for h in HORIZONS},
    )
