"""Which registered latents are among a token's k first, without a `[tokens, d_sae]` array.

The dictionary is gone through in chunks, in the order of latent ids, and a token is finished as
soon as none of its registered latents can still be among its first k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from sae_core.leaders import Leaders, places

BLOCK_NUMBERS = 2**21
"""Keys that are held at a time (8 MiB of float32): rows x chunk. They stay in the last cache; a
whole product of 134 MB takes longer to write than to compute (LOG.md, 2026-11-24)."""
CHUNK_LATENTS = 4096
"""Dictionary columns per chunk; wide enough for an efficient product, a multiple of the tile."""
MOST_CHUNKS_AT_ONCE = 4
"""Few rows take wider steps, for fewer calls, but not so wide that none finishes early."""
FEW_ROWS = 3
"""Up to here BLAS multiplies row by row, several times faster than a tile of rows: 7 ms against 43
for one token and 65,536 latents of 640 numbers (LOG.md, 2026-11-24)."""

Keys = Callable[[Float[Tensor, "rows d_in"], int, int], Float[Tensor, "rows chunk"]]
"""Ranking keys of some rows for the latents from the first number to before the second."""


class RoughKeys(NamedTuple):
    """Keys that are quicker to have for few rows, and how far off they may be."""

    keys: Keys
    error: Float[Tensor, " n"]
    """For each row: no rough key is farther from the exact one."""


def among_top_k(
    z: Float[Tensor, "n d_in"],
    own: Float[Tensor, "n n_latents"],
    latent_ids: Int[Tensor, " n_latents"],
    *,
    keys: Keys,
    d_sae: int,
    k: int,
    lowest: float,
    rough: RoughKeys | None = None,
) -> Bool[Tensor, "n n_latents"]:
    """Whether each registered latent is one of its token's `k` first.

    Args:
        own: The registered latents' keys; the dictionary's at `latent_ids` are taken from here, so
            that a latent meets itself with one and the same number.
        lowest: Latents whose key is not above it are not asked for and come out False.
        rough: Decides few rows where it can; what it leaves open is decided by `keys`.
    """
    kept = torch.zeros_like(own, dtype=torch.bool)
    if own.shape[1] == 0:
        return kept
    asked = (own.amax(dim=1) > lowest).nonzero().squeeze(-1)
    if rough is not None and 0 < len(asked) <= FEW_ROWS:
        error = rough.error[asked]
        rows, leaders = _race(z, own, latent_ids, asked, rough.keys, d_sae, k, lowest, error)
        last_key, error = leaders.last_key[:, None], rough.error[rows][:, None]
        kept[rows] = (own[rows] > last_key + error) & (own[rows] > lowest)
        is_near = ((own[rows] - last_key).abs() <= error) & (own[rows] > lowest)
        asked = rows[is_near.any(dim=1)]
    n_rows = rows_at_once(d_sae)
    for start in range(0, len(asked), n_rows):
        block = asked[start : start + n_rows]
        rows, leaders = _race(z, own, latent_ids, block, keys, d_sae, k, lowest)
        is_first = places(own[rows], latent_ids) >= leaders.last_place[:, None]
        kept[rows] = is_first & (own[rows] > lowest)
    return kept


def _race(
    z: Float[Tensor, "n d_in"],
    own: Float[Tensor, "n n_latents"],
    latent_ids: Int[Tensor, " n_latents"],
    rows: Int64[Tensor, " asked"],
    keys: Keys,
    d_sae: int,
    k: int,
    lowest: float,
    error: Float[Tensor, " asked"] | None = None,
) -> tuple[Int64[Tensor, " left"], Leaders]:
    """The whole dictionary against `rows`: those that may still have a first latent, and theirs."""
    leaders = Leaders(len(rows), k, lowest, own.device)
    z_rows, own_rows = z[rows], own[rows]
    still_first = own_rows.amax(dim=1) + (0.0 if error is None else error)
    start = 0
    while start < d_sae and len(rows):
        stop = min(start + step_width(len(rows)), d_sae)
        rivals = keys(z_rows, start, stop)  # rows chunk
        here = ((latent_ids >= start) & (latent_ids < stop)).nonzero().squeeze(-1)
        if len(here):
            rivals[:, latent_ids[here] - start] = own_rows[:, here]
        leaders.meet(rivals, start)
        is_open = still_first >= leaders.last_key
        if not bool(is_open.all()):
            rows, still_first = rows[is_open], still_first[is_open]
            z_rows, own_rows = z_rows[is_open], own_rows[is_open]
            leaders.keep(is_open)
        start = stop
    return rows, leaders


def rows_at_once(d_sae: int) -> int:
    """Rows whose keys of one chunk fit a block."""
    return max(1, BLOCK_NUMBERS // min(CHUNK_LATENTS, d_sae))


def step_width(n_rows: int) -> int:
    """Dictionary columns to take at a time for so many rows; a whole number of chunks."""
    fitting = BLOCK_NUMBERS // max(1, n_rows * CHUNK_LATENTS)
    return CHUNK_LATENTS * min(max(1, fitting), MOST_CHUNKS_AT_ONCE)


def steps(d_sae: int, n_rows: int) -> Iterator[tuple[int, int]]:
    """The dictionary in steps of `step_width`."""
    width = step_width(n_rows)
    for start in range(0, d_sae, width):
        yield start, min(start + width, d_sae)
