"""The k first latents of some tokens, kept while the dictionary goes by.

Larger keys come first, and of equal keys the lowest latent ids. A key and its latent id make one
number, a place, so that keeping the k first is one `topk` of integers, ties included, and two
latents of a token never have the same place.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor

GROUPS_PER_LEADER = 4
"""Groups of the first chunk whose maxima bound its k-th key from below, for each of k."""
LAST_ID = 2**31 - 1


class Leaders:
    """Each row's first k latents so far; what is not above `lowest` is never one."""

    last_key: Float32[Tensor, " n_rows"]
    """What a later latent must exceed to become one."""

    def __init__(self, n_rows: int, k: int, lowest: float, device: torch.device) -> None:
        self._k = k
        self.last_key = torch.full((n_rows,), lowest, device=device)
        # Ahead of every latent whose key is `lowest`, behind every other.
        nobody = places(self.last_key[:, None], torch.tensor([-1], device=device))
        self._places = nobody.repeat(1, k)
        self.last_place = self._places[:, 0]
        self._is_fresh = True

    def keep(self, which: Bool[Tensor, " n_rows"]) -> None:
        """Forgets the other rows."""
        self._places = self._places[which]
        self.last_key, self.last_place = self.last_key[which], self.last_place[which]

    def latent_ids(self) -> Int64[Tensor, "n_rows k"]:
        """The leaders' ids in no order; -1 where a row has fewer than k."""
        return LAST_ID - (self._places & 0xFFFFFFFF)

    def meet(self, keys: Float32[Tensor, "n_rows chunk"], start: int) -> None:
        """Takes in a chunk whose first latent is `start`, above all that came before."""
        n_rows, width = keys.shape
        if self._is_fresh:
            bar = torch.maximum(self.last_key, _bound(keys, self._k))
            row, column = _where(keys >= bar[:, None])
            self._is_fresh = False
        else:
            row, column = _where(keys > self.last_key[:, None])
        if not len(row):
            return
        counts = torch.bincount(row, minlength=n_rows)
        within = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        widest = int(counts.max())
        # As good as nobody where a row has fewer newcomers than another.
        newcomers = self._places.new_full((n_rows, widest), torch.iinfo(torch.int64).min)
        newcomers[row, within] = places(keys[row, column], column + start)
        everybody = torch.cat((self._places, newcomers), dim=1)
        self._places = everybody.topk(self._k, dim=1, sorted=False).values
        self.last_place = self._places.amin(dim=1)
        self.last_key = _key(self.last_place)


def places(
    keys: Float32[Tensor, "*rows n"], latent_ids: Int[Tensor, "*any n"]
) -> Int64[Tensor, "*rows n"]:
    """Numbers in the order of ranking: larger keys above smaller, lower ids above equal keys."""
    bits = (keys + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0: the two are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    return (ordered.long() << 32) | (LAST_ID - latent_ids)


def _key(place: Int64[Tensor, " n"]) -> Float32[Tensor, " n"]:
    ordered = (place >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _bound(keys: Float[Tensor, "n_rows chunk"], k: int) -> Float[Tensor, " n_rows"]:
    """No more than each row's k-th largest key: the k-th largest maximum of disjoint groups."""
    n_rows, width = keys.shape
    n_groups = min(GROUPS_PER_LEADER * k, width)
    if n_groups < k:
        return keys.new_full((n_rows,), float("-inf"))
    size = width // n_groups
    maxima = keys[:, : size * n_groups].reshape(n_rows, size, n_groups).amax(dim=1)
    return maxima.topk(k, dim=1, sorted=False).values.amin(dim=1)


def _where(mask: Bool[Tensor, "n_rows chunk"]) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
    """Rows and columns of what is True, row after row."""
    if mask.device.type == "cpu":  # NumPy finds the few among many 25 times faster than torch
        flat = torch.from_numpy(np.flatnonzero(mask.numpy()))
    else:
        flat = mask.flatten().nonzero().squeeze(-1)
    width = mask.shape[1]
    return flat // width, flat % width
