"""The encoder half of an SAE: normalised input, pre-activations, gate.

`Encoder` computes some latents exactly as the whole SAE would. A gate that looks at one latent at
a time costs only the columns asked for, in time and memory. TopK and AbsTopK need each latent's
rank among all of them, so the dictionary is kept and gone through in chunks; GroupMax keeps the
columns of the groups it was asked about.
"""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae_core import activation_functions as gates
from sae_core.errors import ShapeError
from sae_core.exact_product import exact_product, padded_to_tiles
from sae_core.ranking import among_top_k
from sae_core.sae_config import RANKED, SAEConfig
from sae_core.sae_weights import SAEStore

LAYER_NORM_EPSILON = 1e-5
"""Added to the standard deviation, not under a root (sae_lens saes/sae.py; OpenAI model.py)."""


class Input(NamedTuple):
    """A normalised input, and what decoding needs to go back."""

    z: Float[Tensor, "... d_in"]
    mean: Float[Tensor, "... 1"] | None = None
    """What `center_input` took off."""
    shift: Float[Tensor, "... 1"] | None = None
    """What `normalize` took off."""
    scale: Float[Tensor, "... 1"] | None = None
    """What a reconstruction is multiplied by to undo `normalize`."""


def normalised(
    config: SAEConfig, x: Float[Tensor, "... width"], b_dec: Float[Tensor, " d_in"] | None
) -> Input:
    """What the encoder's matrix is multiplied with; ShapeError where `x` has another width.

    A token of zeros has no direction: under `unit_norm` it becomes NaN, as in the libraries.
    """
    z = _cut(config, x).float()
    mean = shift = scale = None
    if config.center_input:
        mean = z.mean(dim=-1, keepdim=True)
        z = z - mean
    if config.normalize == "layer_norm":
        shift = z.mean(dim=-1, keepdim=True)
        z = z - shift
        scale = z.std(dim=-1, keepdim=True)
        z = z / (scale + LAYER_NORM_EPSILON)
    elif config.normalize == "unit_norm":
        scale = z.norm(dim=-1, keepdim=True) / config.d_in**0.5
        z = z / scale
    if config.input_scale != 1:
        z = z * config.input_scale
    if b_dec is not None:
        z = z - b_dec
    return Input(z, mean, shift, scale)


def _cut(config: SAEConfig, x: Float[Tensor, "... width"]) -> Float[Tensor, "... d_in"]:
    width, d_in = x.shape[-1], config.d_in
    if width == d_in:
        return x
    head = config.head_index
    if head is not None and width % d_in == 0 and (head + 1) * d_in <= width:
        return x[..., head * d_in : (head + 1) * d_in]
    raise ShapeError(f"x has width {width}, the SAE's d_in is {d_in}")


class Columns(NamedTuple):
    """The encoder's numbers of some latents; matrices padded to whole tiles."""

    W: Float[Tensor, "d_in padded"]
    b_enc: Float[Tensor, " n"] | None
    threshold: Float[Tensor, " n"] | None
    b_gate: Float[Tensor, " n"] | None
    r_mag: Float[Tensor, " n"] | None
    b_mag: Float[Tensor, " n"] | None
    W_glu: Float[Tensor, "d_in padded"] | None
    b_glu: Float[Tensor, " n"] | None
    norms: Float[Tensor, " n"] | None
    """Lengths of their decoder rows, where the gate looks at them."""

    def pre_acts(
        self, z: Float[Tensor, "rows d_in"], start: int = 0, stop: int | None = None
    ) -> Float[Tensor, "rows n"]:
        """Pre-activations of the latents from `start` to before `stop`, before any decoder norm.

        `start` must be a whole number of tiles.
        """
        n = self.n if stop is None else stop
        end = self.W.shape[1] if n == self.n else n
        h = exact_product(z, self.W[:, start:end], n - start)
        if self.b_enc is not None:
            h = h + self.b_enc[start:n]
        if self.W_glu is not None:
            assert self.b_glu is not None
            glu = exact_product(z, self.W_glu[:, start:end], n - start) + self.b_glu[start:n]
            h = h * torch.sigmoid(glu)
        return h

    @property
    def n(self) -> int:
        some = self.b_enc if self.b_enc is not None else self.b_gate
        assert some is not None
        return len(some)


def read_columns(
    config: SAEConfig, store: SAEStore, latent_ids: Int64[np.ndarray, " n"]
) -> Columns:
    """The columns of `latent_ids`, in that order, and nothing else."""

    def some(name: str) -> Tensor | None:
        return store.some_of(name, latent_ids)

    W, W_glu = some("W_enc"), some("W_glu")
    assert W is not None
    return Columns(
        W=padded_to_tiles(W),
        b_enc=some("b_enc"),
        threshold=some("threshold"),
        b_gate=some("b_gate"),
        r_mag=some("r_mag"),
        b_mag=some("b_mag"),
        W_glu=None if W_glu is None else padded_to_tiles(W_glu),
        b_glu=some("b_glu"),
        norms=None if config.decoder_norms == "unused" else store.decoder_norms(latent_ids),
    )


class Encoder:
    """Some latents of an SAE, encoded exactly as all of them would be; made by `SAE.slice`.

    Gates that look at one latent at a time (all but TopK, AbsTopK) give the bits that
    `SAE.encode` gives. So do TopK and AbsTopK where the BLAS keeps `exact_product`'s promise;
    elsewhere one that rounding alone separates from the k-th value may fall on the other side.
    """

    def __init__(
        self, config: SAEConfig, store: SAEStore, latent_ids: Int64[np.ndarray, " n"]
    ) -> None:
        self.config = config
        self.latent_ids = torch.from_numpy(latent_ids)
        self._b_dec = store.all_of("b_dec") if config.apply_b_dec_to_input else None
        self._place: Tensor | None = None
        self._dictionary: Columns | None = None
        read = latent_ids
        if config.architecture == "groupmax":
            assert config.k is not None
            size = config.d_sae // config.k
            groups, position = np.unique(latent_ids // size, return_inverse=True)
            read = (groups[:, None] * size + np.arange(size)).reshape(-1)
            self._place = torch.from_numpy(position * size + latent_ids % size)
        elif config.architecture in RANKED:
            self._dictionary = read_columns(config, store, np.arange(config.d_sae))
        self._columns = read_columns(config, store, read)

    @property
    def device(self) -> torch.device:
        """Where it computes, and where its input must be."""
        return self._columns.W.device

    def to(self, device: torch.device | str) -> Encoder:
        """The same encoder with its tensors on `device`."""
        moved = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device))
            elif isinstance(value, Columns):
                there = (None if t is None else t.to(device) for t in value)
                setattr(moved, name, Columns(*there))  # type: ignore[arg-type]
        return moved

    def __call__(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... n_latents"]:
        """Latent activations of the registered latents, in their order."""
        z = normalised(self.config, x, self._b_dec).z.reshape(-1, self.config.d_in)
        acts = self._encode(z)
        return acts.reshape(*x.shape[:-1], len(self.latent_ids))

    def _encode(self, z: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows n_latents"]:
        config, columns = self.config, self._columns
        h = columns.pre_acts(z)
        if self._place is not None:
            assert config.k is not None
            grouped = h.reshape(len(h), -1, config.d_sae // config.k)
            winners = gates.group_largest(grouped).reshape(h.shape)
            return (torch.relu(h) * winners)[:, self._place]
        if self._dictionary is None:
            return apply_gate(config, h, columns)
        if config.decoder_norms != "unused":
            assert columns.norms is not None
            scaled = h * columns.norms
        else:
            scaled = h
        is_abs = config.architecture == "abstopk"
        key = scaled.abs() if is_abs else scaled
        assert config.k is not None
        kept = among_top_k(
            z,
            key,
            self.latent_ids,
            keys=self._rival_keys,
            d_sae=config.d_sae,
            k=config.k,
            lowest=float("-inf") if config.signed else 0.0,
        )
        acts = scaled if config.decoder_norms == "acts" else h
        return torch.where(kept, acts, torch.zeros_like(acts))

    def _rival_keys(
        self, z: Float[Tensor, "rows d_in"], start: int, stop: int
    ) -> Float[Tensor, "rows chunk"]:
        assert self._dictionary is not None
        h = self._dictionary.pre_acts(z, start, stop)
        if self._dictionary.norms is not None:
            h = h * self._dictionary.norms[start:stop]
        return h.abs_() if self.config.architecture == "abstopk" else h


def apply_gate(
    config: SAEConfig, h: Float[Tensor, "rows n"], columns: Columns
) -> Float[Tensor, "rows n"]:
    """A gate that looks at one latent at a time, decoder norms included."""
    judged = h if columns.norms is None else h * columns.norms
    if config.architecture == "gated":
        assert columns.b_gate is not None
        assert columns.r_mag is not None
        assert columns.b_mag is not None
        return gates.gated(h, columns.b_gate, columns.r_mag, columns.b_mag)
    if config.architecture in ("jumprelu", "batchtopk"):
        assert columns.threshold is not None
        gate = gates.jumprelu if config.architecture == "jumprelu" else gates.batchtopk
        acts = gate(judged, columns.threshold)
    elif config.architecture == "tanh_relu":
        acts = gates.tanh_relu(judged)
    else:
        acts = torch.relu(judged)
    if config.decoder_norms == "gate":
        return torch.relu(h) * (acts > 0)
    return acts
