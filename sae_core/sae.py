"""A sparse autoencoder: what it is (`SAEConfig`), its numbers (`SAEWeights`), and its maths.

    z = x - b_dec        where apply_b_dec_to_input, else x
    h = z @ W_enc + b_enc
    a = gate(h)          relu | jumprelu | topk | batchtopk with its stored threshold
    y = a @ W_dec + b_dec

Everything is float32, whatever the checkpoint stored. Files are `formats`' business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_core.activation_functions import batchtopk, jumprelu, relu, topk
from sae_core.errors import ShapeError

Architecture = Literal["relu", "jumprelu", "topk", "batchtopk"]
THRESHOLDED: tuple[Architecture, ...] = ("jumprelu", "batchtopk")
BLOCK_NUMBERS = 2**24
"""Most pre-activations a streaming TopK encoder holds at a time (64 MiB of float32)."""
CHUNK_LATENTS = 4096
"""Dictionary columns per chunk of that encoder; wide enough for an efficient matrix product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SAEConfig:
    """What an SAE is, apart from its numbers."""

    architecture: Architecture
    d_in: int
    d_sae: int
    k: int | None = None
    """Latents a token may have; for `topk` only."""
    apply_b_dec_to_input: bool = False
    normalize_activations: Literal["none"] = "none"
    hook_point: str | None = None
    """Where it was trained to read, as its checkpoint says; None where it does not."""
    model_name: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What else the checkpoint says, kept as found."""

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Architecture):
            expected = ", ".join(get_args(Architecture))
            raise ShapeError(f"architecture is {self.architecture!r}, expected one of {expected}")
        if self.d_in < 1 or self.d_sae < 1:
            raise ShapeError(f"d_in is {self.d_in}, d_sae is {self.d_sae}, expected at least 1")
        if self.architecture == "topk" and not (self.k and 1 <= self.k <= self.d_sae):
            raise ShapeError(f"k is {self.k}, expected 1 to d_sae, which is {self.d_sae}")
        if self.architecture != "topk" and self.k is not None:
            raise ShapeError(f"k is {self.k}, expected none for {self.architecture}")


class SAEWeights(NamedTuple):
    """An SAE's numbers, in the one orientation used here."""

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    threshold: Float[Tensor, " d_sae"] | None = None
    """For `jumprelu` and `batchtopk` (there one number, repeated); None otherwise."""


class SAE:
    """An SAE whose weights fit its config; raises ShapeError where they do not."""

    def __init__(self, config: SAEConfig, weights: SAEWeights) -> None:
        d_in, d_sae = config.d_in, config.d_sae
        expected = {
            "W_enc": (d_in, d_sae),
            "b_enc": (d_sae,),
            "W_dec": (d_sae, d_in),
            "b_dec": (d_in,),
        }
        if config.architecture in THRESHOLDED:
            expected["threshold"] = (d_sae,)
        for name, tensor in weights._asdict().items():
            found = None if tensor is None else tuple(tensor.shape)
            if found != expected.get(name):
                wanted = expected.get(name, f"none for {config.architecture}")
                raise ShapeError(f"{name} has shape {found}, expected {wanted}")
        self.config = config
        self.weights = _each(weights, torch.Tensor.float)

    def to(self, device: torch.device | str) -> SAE:
        """The same SAE with its weights on `device`."""
        return SAE(self.config, _each(self.weights, lambda w: w.to(device)))

    def encode(
        self, x: Float[Tensor, "... d_in"], latent_ids: Sequence[int] | Tensor | None = None
    ) -> Float[Tensor, "... n_latents"]:
        """Latent activations of `x`: of every latent, or of `latent_ids` in that order.

        To encode the same latents again and again, keep what `slice` returns.
        """
        if latent_ids is not None:
            return self.slice(latent_ids)(x)
        b_dec = self.weights.b_dec if self.config.apply_b_dec_to_input else None
        z = _centred(x, b_dec, self.config.d_in)
        pre_acts = z @ self.weights.W_enc + self.weights.b_enc
        if self.config.architecture == "topk":
            assert self.config.k is not None
            return topk(pre_acts, self.config.k)
        if self.config.architecture == "batchtopk":
            assert self.weights.threshold is not None
            return batchtopk(pre_acts, self.weights.threshold[0])
        return _gate(pre_acts, self.weights.threshold)

    def decode(
        self, latent_acts: Float[Tensor, "... d_sae"], x: Float[Tensor, "... d_in"] | None = None
    ) -> Float[Tensor, "... d_in"]:
        """The reconstruction of the input that gave `latent_acts`.

        `x`, that input, is for SAEs that normalise it; one with `normalize_activations` none has
        nothing to undo and does not look at it.
        """
        return latent_acts.float() @ self.weights.W_dec + self.weights.b_dec

    def slice(self, latent_ids: Sequence[int] | Tensor) -> SlicedEncoder:
        """An encoder of `latent_ids` alone, in that order, each once.

        Raises ShapeError for an id outside 0 to d_sae - 1, and for one that comes twice.
        """
        device = self.weights.W_enc.device
        ids = torch.as_tensor(latent_ids, dtype=torch.long, device=device).reshape(-1)
        outside = ids[(ids < 0) | (ids >= self.config.d_sae)]
        if len(outside):
            last = self.config.d_sae - 1
            raise ShapeError(f"latent_ids has {outside.tolist()}, expected ids from 0 to {last}")
        if repeated := [i for i, n in Counter(ids.tolist()).items() if n > 1]:
            raise ShapeError(f"latent_ids has {repeated} more than once, expected each id once")
        return SlicedEncoder(self, ids)


class SlicedEncoder:
    """Some latents of an SAE, encoded exactly as the whole SAE would; made by `SAE.slice`.

    A gate that looks at one latent at a time costs only the columns asked for, in time and
    memory. A TopK gate also needs each latent's rank among all of them: rivals are counted over
    chunks of the dictionary, in bounded memory, and the dictionary is kept.
    """

    def __init__(self, sae: SAE, latent_ids: Int[Tensor, " n_latents"]) -> None:
        weights = sae.weights
        is_topk = sae.config.architecture == "topk"
        self.config = sae.config
        self.latent_ids = latent_ids
        self._W = weights.W_enc[:, latent_ids].contiguous()
        self._b = weights.b_enc[latent_ids]
        self._b_dec = weights.b_dec if sae.config.apply_b_dec_to_input else None
        self._threshold = None if weights.threshold is None else weights.threshold[latent_ids]
        self._dictionary = (weights.W_enc, weights.b_enc) if is_topk else None

    def to(self, device: torch.device | str) -> SlicedEncoder:
        """The same encoder with its tensors on `device`."""
        moved = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device))
        if self._dictionary is not None:
            W_enc, b_enc = self._dictionary
            moved._dictionary = (W_enc.to(device), b_enc.to(device))
        return moved

    def __call__(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... n_latents"]:
        """Latent activations of the registered latents.

        Equal to the columns of `SAE.encode` but for rounding. TopK: among equal pre-activations
        at the k-th place the lowest latent ids are kept; one that rounding alone separates from
        the k-th value may fall on the other side.
        """
        shape = (*x.shape[:-1], len(self.latent_ids))
        z = _centred(x, self._b_dec, self.config.d_in).reshape(-1, self.config.d_in)  # n d_in
        pre_acts = z @ self._W + self._b  # n n_latents
        if self._dictionary is None:
            return _gate(pre_acts, self._threshold).reshape(shape)
        kept = torch.empty_like(pre_acts, dtype=torch.bool)
        chunk = min(CHUNK_LATENTS, self.config.d_sae)
        n_rows = max(1, BLOCK_NUMBERS // chunk)
        for start in range(0, len(z), n_rows):
            block = slice(start, start + n_rows)
            kept[block] = self._in_top_k(z[block], pre_acts[block], chunk)
        return (torch.relu(pre_acts) * kept).reshape(shape)

    def _in_top_k(
        self, z: Float[Tensor, "n d_in"], pre_acts: Float[Tensor, "n n_latents"], chunk: int
    ) -> Bool[Tensor, "n n_latents"]:
        """Which positive `pre_acts` have fewer than k latents of the dictionary before them."""
        k, d_sae = self.config.k, self.config.d_sae
        assert k is not None and self._dictionary is not None
        W_enc, b_enc = self._dictionary
        row, column = (pre_acts > 0).nonzero(as_tuple=True)  # one entry per candidate
        n_before = torch.zeros_like(row)
        for start in range(0, d_sae, chunk):
            if len(row) == 0:
                break
            stop = min(start + chunk, d_sae)
            wanted = torch.zeros(len(z), dtype=torch.bool, device=z.device)
            wanted[row] = True
            rows = wanted.nonzero().squeeze(-1)
            position = (wanted.cumsum(0) - 1)[row]  # of the candidate's row among `rows`
            rivals = z[rows] @ W_enc[:, start:stop] + b_enc[start:stop]  # n_rows chunk
            # A registered latent must meet itself and its peers with one and the same value.
            mine = (self.latent_ids >= start) & (self.latent_ids < stop)
            rivals[:, self.latent_ids[mine] - start] = pre_acts[rows][:, mine]
            if stop - start >= k:
                kth = rivals.topk(k, dim=-1).values[:, -1]
                alive = pre_acts[row, column] >= kth[position]
                row, column, position = row[alive], column[alive], position[alive]
                n_before = n_before[alive]
            n_before += self._count_before(rivals, position, pre_acts[row, column], column, start)
            alive = n_before < k
            row, column, n_before = row[alive], column[alive], n_before[alive]
        kept = torch.zeros_like(pre_acts, dtype=torch.bool)
        kept[row, column] = True
        return kept

    def _count_before(
        self,
        rivals: Float[Tensor, "n_rows chunk"],
        position: Int[Tensor, " n_candidates"],
        value: Float[Tensor, " n_candidates"],
        column: Int[Tensor, " n_candidates"],
        start: int,
    ) -> Int[Tensor, " n_candidates"]:
        """For each candidate, the chunk's latents that rank before it: larger, or equal and lower.

        `position` is the candidate's row in `rivals`; the chunk begins at latent `start`.
        """
        counts = torch.empty_like(position)
        ids = torch.arange(start, start + rivals.shape[1], device=rivals.device)
        n = max(1, BLOCK_NUMBERS // rivals.shape[1])
        for first in range(0, len(position), n):
            some = slice(first, first + n)
            theirs, ours = rivals[position[some]], value[some, None]
            lower = ids < self.latent_ids[column[some], None]
            counts[some] = ((theirs > ours) | ((theirs == ours) & lower)).sum(dim=-1)
        return counts


def _centred(
    x: Float[Tensor, "... width"], b_dec: Float[Tensor, " d_in"] | None, d_in: int
) -> Float[Tensor, "... d_in"]:
    if x.shape[-1] != d_in:
        raise ShapeError(f"x has width {x.shape[-1]}, the SAE's d_in is {d_in}")
    return x.float() if b_dec is None else x.float() - b_dec


def _each(weights: SAEWeights, change: Callable[[Tensor], Tensor]) -> SAEWeights:
    W_enc, b_enc, W_dec, b_dec, threshold = weights
    return SAEWeights(
        change(W_enc),
        change(b_enc),
        change(W_dec),
        change(b_dec),
        None if threshold is None else change(threshold),
    )


def _gate(
    pre_acts: Float[Tensor, "... n_latents"], threshold: Float[Tensor, " n_latents"] | None
) -> Float[Tensor, "... n_latents"]:
    return relu(pre_acts) if threshold is None else jumprelu(pre_acts, threshold)
