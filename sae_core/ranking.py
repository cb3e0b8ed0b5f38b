"""Which registered latents are among a token's k largest, without a `[tokens, d_sae]` array.

The dictionary is gone through in chunks. For each token the k best latents so far are kept; a
later rival matters only if it beats the last of them, and a token is finished as soon as none of
its registered latents can still be among them. Of equal keys the lowest latent ids come first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCK_NUMBERS = 2**21
"""Keys that are held at a time (8 MiB of float32): rows x chunk."""
CHUNK_LATENTS = 4096
"""Dictionary columns per chunk; wide enough for an efficient product, a multiple of the tile."""

Keys = Callable[[Float[Tensor, "rows d_in"], int, int], Float[Tensor, "rows chunk"]]
"""Ranking keys of some rows for the latents from the first number to before the second."""


def among_top_k(
    z: Float[Tensor, "n d_in"],
    own: Float[Tensor, "n n_latents"],
    latent_ids: Int[Tensor, " n_latents"],
    *,
    keys: Keys,
    d_sae: int,
    k: int,
    lowest: float,
) -> Bool[Tensor, "n n_latents"]:
    """Whether each registered latent is one of its token's `k` first.

    Args:
        own: The registered latents' keys; the dictionary's at `latent_ids` are taken from here, so
            that a latent meets itself with one and the same number.
        lowest: Latents whose key is not above it are not asked for and come out False.
    """
    kept = torch.zeros_like(own, dtype=torch.bool)
    chunk = min(CHUNK_LATENTS, d_sae)
    n_rows = max(1, BLOCK_NUMBERS // chunk)
    for start in range(0, len(z), n_rows):
        block = slice(start, start + n_rows)
        kept[block] = _block(z[block], own[block], latent_ids, keys, d_sae, k, lowest, chunk)
    return kept


def _block(
    z: Float[Tensor, "n d_in"],
    own: Float[Tensor, "n n_latents"],
    latent_ids: Int[Tensor, " n_latents"],
    keys: Keys,
    d_sae: int,
    k: int,
    lowest: float,
    chunk: int,
) -> Bool[Tensor, "n n_latents"]:
    kept = torch.zeros_like(own, dtype=torch.bool)
    if own.shape[1] == 0:
        return kept
    best_own = own.amax(dim=1)
    rows = (best_own > lowest).nonzero().squeeze(-1)
    leaders = _Leaders(rows.numel(), k, own)
    for start in range(0, d_sae, chunk):
        if not len(rows):
            break
        stop = min(start + chunk, d_sae)
        rivals = keys(z[rows], start, stop)  # rows chunk
        here = ((latent_ids >= start) & (latent_ids < stop)).nonzero().squeeze(-1)
        if len(here):
            rivals[:, latent_ids[here] - start] = own[rows][:, here]
        leaders.meet(rivals, start)
        open_rows = best_own[rows] >= leaders.last_key
        if not bool(open_rows.all()):
            rows = rows[open_rows]
            leaders.keep(open_rows)
    mine = own[rows]
    last_key, last_id = leaders.last_key[:, None], leaders.last_id[:, None]
    first = (mine > last_key) | ((mine == last_key) & (latent_ids <= last_id))
    kept[rows] = first & (mine > lowest)
    return kept


class _Leaders:
    """Each row's first k latents so far, in order: larger keys first, lower ids among equals."""

    def __init__(self, n_rows: int, k: int, like: Tensor) -> None:
        self._k = k
        self._keys = like.new_empty((n_rows, 0))
        self._ids = torch.empty((n_rows, 0), dtype=torch.long, device=like.device)
        self.last_key = like.new_full((n_rows,), float("-inf"))
        self.last_id = torch.full((n_rows,), -1, device=like.device)

    def keep(self, which: Bool[Tensor, " n_rows"]) -> None:
        """Forgets the other rows."""
        self._keys, self._ids = self._keys[which], self._ids[which]
        self.last_key, self.last_id = self.last_key[which], self.last_id[which]

    def meet(self, rivals: Float[Tensor, "n_rows chunk"], start: int) -> None:
        """Takes in a chunk whose first latent is `start`, above all that came before."""
        n_rows, width = rivals.shape
        if self._keys.shape[1] == 0 and width > self._k:
            # Nothing to beat yet: the chunk's own k-th key keeps the lists short.
            bar = rivals.topk(self._k, dim=1).values[:, -1]
            row, column = (rivals >= bar[:, None]).nonzero(as_tuple=True)
        else:
            row, column = (rivals > self.last_key[:, None]).nonzero(as_tuple=True)
        if not len(row):
            return
        counts = torch.bincount(row, minlength=n_rows)
        changed = counts.nonzero().squeeze(-1)
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        within = (counts > 0).cumsum(0) - 1  # of a row among those that changed
        wide = int(counts.max())
        new_keys = rivals.new_full((len(changed), wide), float("-inf"))
        new_ids = torch.full((len(changed), wide), -1, device=row.device)
        new_keys[within[row], place] = rivals[row, column]
        new_ids[within[row], place] = column + start
        keys = torch.cat((self._keys[changed], new_keys), dim=1)
        ids = torch.cat((self._ids[changed], new_ids), dim=1)
        # Stable: the older ones, whose ids are lower, stay ahead of equal newcomers.
        keys, order = keys.sort(dim=1, descending=True, stable=True)
        n = min(self._k, keys.shape[1])
        keys, ids = keys[:, :n], ids.gather(1, order[:, :n])
        if n > self._keys.shape[1]:
            missing = (0, n - self._keys.shape[1])
            self._keys = torch.nn.functional.pad(self._keys, missing, value=float("-inf"))
            self._ids = torch.nn.functional.pad(self._ids, missing, value=-1)
        self._keys[changed, :n], self._ids[changed, :n] = keys, ids
        if self._keys.shape[1] == self._k:
            self.last_key, self.last_id = self._keys[:, -1].clone(), self._ids[:, -1].clone()
