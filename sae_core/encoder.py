"""The encoder half of an SAE: normalised input, pre-activations, gate.

`Encoder` computes some latents exactly as the whole SAE would. A gate that looks at one latent at
a time costs only the columns asked for, in time and memory. TopK and AbsTopK need each latent's
rank among all of them, so the dictionary is kept and gone through in chunks; GroupMax keeps the
columns of the groups it was asked about.
"""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae_core import activation_functions as gates
from sae_core.columns import Columns, Reach, apply_gate, reach_of, read_columns
from sae_core.errors import ShapeError
from sae_core.leaders import Leaders
from sae_core.ranking import RoughKeys, among_top_k, rows_at_once, steps
from sae_core.sae_config import RANKED, SAEConfig
from sae_core.sae_weights import SAEStore

LAYER_NORM_EPSILON = 1e-5
"""Added to the standard deviation, not under a root (sae_lens saes/sae.py; OpenAI model.py)."""


NOT_ELEMENTWISE = (*RANKED, "groupmax")
"""Gates that compare a token's latents with each other."""


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
    z = cut_input(config, x).float()
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


def cut_input(config: SAEConfig, x: Float[Tensor, "... width"]) -> Float[Tensor, "... d_in"]:
    """The part of `x` that the SAE reads: all of it, or its own head's."""
    if x.ndim == 0:
        raise ShapeError("x has no axes, expected at least the one of d_in numbers")
    width, d_in = x.shape[-1], config.d_in
    if width == d_in:
        return x
    head = config.head_index
    if head is not None and width % d_in == 0 and (head + 1) * d_in <= width:
        return x[..., head * d_in : (head + 1) * d_in]
    raise ShapeError(f"x has width {width}, the SAE's d_in is {d_in}")


class EncoderParts(NamedTuple):
    """What an `Encoder` computes with."""

    b_dec: Float[Tensor, " d_in"] | None
    columns: Columns
    place: Int64[Tensor, " n_latents"] | None
    """Of the registered latents among `columns`, under GroupMax; else they are the columns."""
    dictionary: Columns | None
    """All latents, where a rank is asked for."""


class Encoder:
    """Some latents of an SAE, encoded exactly as all of them would be; made by `SAE.slice`.

    Gates that look at one latent at a time (all but TopK, AbsTopK) give the bits that
    `SAE.encode` gives. So do TopK and AbsTopK where the BLAS keeps `exact_product`'s promise;
    elsewhere one that rounding alone separates from the k-th value may fall on the other side.
    """

    def __init__(
        self,
        config: SAEConfig,
        store: SAEStore,
        latent_ids: Int64[np.ndarray, " n"],
        dictionary: Columns | None = None,
    ) -> None:
        self.config = config
        self.latent_ids = torch.from_numpy(latent_ids)
        self._b_dec = store.all_of("b_dec") if config.apply_b_dec_to_input else None
        self._place: Tensor | None = None
        self._dictionary: Columns | None = None
        self._reach: Reach | None = None
        read = latent_ids
        if config.architecture == "groupmax":
            assert config.k is not None
            size = config.d_sae // config.k
            groups, position = np.unique(latent_ids // size, return_inverse=True)
            read = (groups[:, None] * size + np.arange(size)).reshape(-1)
            self._place = torch.from_numpy(position * size + latent_ids % size)
        elif config.architecture in RANKED:
            self._dictionary = dictionary if dictionary is not None else read_columns(config, store)
            self._reach = reach_of(self._dictionary)
        self._columns = read_columns(config, store, read)

    @property
    def device(self) -> torch.device:
        """Where it computes, and where its input must be."""
        return self._columns.W.device

    @property
    def parts(self) -> EncoderParts:
        """For a form of it that runs elsewhere."""
        return EncoderParts(self._b_dec, self._columns, self._place, self._dictionary)

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
        with torch.no_grad():
            z = normalised(self.config, x, self._b_dec).z.reshape(-1, self.config.d_in)
            acts = self._encode(z)
        return acts.reshape(*x.shape[:-1], len(self.latent_ids))

    def _encode(self, z: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows n_latents"]:
        config, columns = self.config, self._columns
        h = columns.pre_acts(z)
        if config.architecture not in NOT_ELEMENTWISE:
            return apply_gate(config, h, columns)
        assert config.k is not None
        if self._place is not None:
            size = config.d_sae // config.k
            grouped = h.reshape(len(h), h.shape[1] // size, size)
            winners = gates.group_largest(grouped).reshape(h.shape)
            acts = torch.where(winners, torch.relu(h), torch.zeros_like(h))[:, self._place]
            return _marked(acts, z)
        key = ranking_key(config, h, columns)
        kept = among_top_k(
            z,
            key,
            self.latent_ids,
            keys=self._rival_keys,
            d_sae=config.d_sae,
            k=config.k,
            lowest=lowest_key(config),
            rough=self._rough_keys(z),
        )
        acts = columns.judged(h) if config.decoder_norms == "acts" else h
        return _marked(torch.where(kept, acts, torch.zeros_like(acts)), z)

    def _rival_keys(
        self, z: Float[Tensor, "rows d_in"], start: int, stop: int, *, is_rough: bool = False
    ) -> Float[Tensor, "rows chunk"]:
        assert self._dictionary is not None
        part = self._dictionary.part(start, stop)
        return ranking_key(self.config, part.pre_acts(z, is_rough=is_rough), part)

    def _rough_keys(self, z: Float[Tensor, "rows d_in"]) -> RoughKeys | None:
        if self._reach is None or z.device.type != "cpu":  # elsewhere float32 may be rounder
            return None
        return RoughKeys(partial(self._rival_keys, is_rough=True), self._reach.rounding_error(z))


def encode_all(
    config: SAEConfig, columns: Columns, z: Float[Tensor, "rows d_in"]
) -> Float[Tensor, "rows d_sae"]:
    """Latent activations of every latent; beside them only some chunks' worth of memory."""
    acts = z.new_empty((len(z), config.d_sae))
    for start in range(0, len(z), rows_at_once(config.d_sae)):
        rows = slice(start, start + rows_at_once(config.d_sae))
        if config.architecture in NOT_ELEMENTWISE:
            _encode_competitors(config, columns, z[rows], acts[rows])
            continue
        for first, last in steps(config.d_sae, len(z[rows])):
            part = columns.part(first, last)
            acts[rows, first:last] = apply_gate(config, part.pre_acts(z[rows]), part)
    return acts


def _encode_competitors(
    config: SAEConfig,
    columns: Columns,
    z: Float[Tensor, "rows d_in"],
    acts: Float[Tensor, "rows d_sae"],
) -> None:
    """Fills `acts` for gates that compare latents: first with pre-activations, then the winners."""
    assert config.k is not None
    leaders = Leaders(len(z), config.k, lowest_key(config), z.device)
    for first, last in steps(config.d_sae, len(z)):
        part = columns.part(first, last)
        h = part.pre_acts(z)
        acts[:, first:last] = h
        if config.architecture in RANKED:
            leaders.meet(ranking_key(config, h, part), first)
    if config.architecture == "groupmax":
        size = config.d_sae // config.k
        firsts = torch.arange(0, config.d_sae, size, device=z.device)
        winners = acts.reshape(len(z), config.k, size).argmax(dim=-1) + firsts
        values = torch.relu(acts.gather(1, winners))
    else:
        ids = leaders.latent_ids()
        winners = ids.clamp(min=0)
        values = acts.gather(1, winners) * (ids >= 0)
        if config.decoder_norms == "acts":
            assert columns.norms is not None
            values = values * columns.norms[winners]
    # Added, as a place that nobody took adds 0 to latent 0.
    _marked(acts.zero_().scatter_add_(1, winners, values), z)


def ranking_key(
    config: SAEConfig, h: Float[Tensor, "rows n"], columns: Columns
) -> Float[Tensor, "rows n"]:
    """What TopK and AbsTopK rank pre-activations by."""
    judged = columns.judged(h)
    return judged.abs() if config.architecture == "abstopk" else judged


def lowest_key(config: SAEConfig) -> float:
    """What a latent's key must exceed for it to be active."""
    return float("-inf") if config.signed else 0.0


def _marked(
    acts: Float[Tensor, "rows n"], z: Float[Tensor, "rows d_in"]
) -> Float[Tensor, "rows n"]:
    """`acts`, NaN where a token is not finite: comparisons alone would make it look silent."""
    is_bad = ~torch.isfinite(z).all(dim=1)
    if bool(is_bad.any()):
        acts[is_bad] = float("nan")
    return acts
