"""Which latents each token of a raised cluster's window had, in a few bytes, inside the record.

The body of a decision holds, under `token_latents` and the cluster's id,

    exponent   e: a contribution is `number * 2**e`
    latents    [sae, latent id] of each latent that is named
    positions  the tokens, ascending
    tokens     for each of them index, number, index, number, ...; the largest contribution first
    others     for each of them, as a number, what its latents that are not named add up to
    left_out   tokens of the window that have latents and no place here

A contribution is what the latent added to the token's own fused logit. The step 2**e is the
smallest power of two that lets the largest contribution fit in 16 bits, and at least 2**-8; so one
is off by at most 2**(e - 1): 1/32767 of the largest, or 1/512 if that is more. What rounds to
nothing is not named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monitor.audit_log.chain import Json
from monitor.errors import AuditError

MAX_TOKENS = 64
"""Of a cluster's window: those whose latents weigh most where it is longer."""
MAX_LATENTS = 8
"""Of a token."""
FINEST_EXPONENT = -8
"""Contributions are read to a hundredth."""

_LARGEST = 32767


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenLatents:
    """The latents of one cluster in the tokens that made its score."""

    latents: tuple[tuple[str, int], ...]
    """SAE and latent id of each of the cluster's latents."""
    positions: NDArray[np.int64]
    """[n_tokens], ascending."""
    contributions: NDArray[np.float64]
    """[n_tokens, n_latents]: shares of the tokens' fused logits; 0 where a latent is not active."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenShare:
    """One token as it was stored."""

    position: int
    latents: tuple[tuple[str, int, float], ...]
    """SAE, latent id and contribution in logits; the largest first."""
    others: float
    """What the token's other latents contributed together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLatents:
    """One cluster's tokens as they were stored."""

    tokens: tuple[TokenShare, ...]
    left_out: int
    """Tokens with active latents that have no place in the record."""
    max_error: float
    """Largest absolute error of a contribution, in logits."""


def encode_token_latents(found: TokenLatents) -> dict[str, Json]:
    """The stored form."""
    sizes = np.abs(found.contributions)
    weights = sizes.sum(axis=1)
    active = np.flatnonzero(weights)
    heaviest = active[np.argsort(-weights[active], kind="stable")[:MAX_TOKENS]]
    rows = np.sort(heaviest)
    order = np.argsort(-sizes[rows], axis=1, kind="stable")[:, :MAX_LATENTS]
    shares = np.take_along_axis(found.contributions[rows], order, axis=1)
    totals = found.contributions[rows].sum(axis=1)
    exponent = _exponent(float(sizes[rows].max(initial=0.0)))
    numbers = np.rint(np.ldexp(shares, -exponent)).astype(np.int64)
    others = totals - np.where(numbers != 0, shares, 0.0).sum(axis=1)
    named = np.unique(order[numbers != 0])
    return {
        "exponent": exponent,
        "latents": [found.latents[latent] for latent in named],
        "positions": found.positions[rows].tolist(),
        "tokens": [
            [item for pair in zip(places, of_token, strict=True) if pair[1] for item in pair]
            for places, of_token in zip(
                np.searchsorted(named, order).tolist(), numbers.tolist(), strict=True
            )
        ],
        "others": np.rint(np.ldexp(others, -exponent)).astype(np.int64).tolist(),
        "left_out": len(active) - len(rows),
    }


def decode_token_latents(stored: Mapping[str, Any]) -> StoredLatents:
    """What `encode_token_latents` made; AuditError for anything else."""
    try:
        step = 2.0 ** int(stored["exponent"])
        latents = [(str(sae), int(latent)) for sae, latent in stored["latents"]]
        rows = zip(stored["positions"], stored["tokens"], stored["others"], strict=True)
        return StoredLatents(
            tokens=tuple(
                TokenShare(
                    position=int(position),
                    latents=tuple(
                        (*latents[place], number * step)
                        for place, number in zip(pairs[::2], pairs[1::2], strict=True)
                    ),
                    others=other * step,
                )
                for position, pairs, other in rows
            ),
            left_out=int(stored["left_out"]),
            max_error=step / 2,
        )
    except (KeyError, ValueError, TypeError, IndexError, OverflowError) as error:
        raise AuditError(f"token_latents: cannot be read: {error!r}") from error


def _exponent(largest: float) -> int:
    mantissa, exponent = np.frexp(largest)
    return max(int(exponent) - 15 + int(np.rint(mantissa * 2.0**15) > _LARGEST), FINEST_EXPONENT)
