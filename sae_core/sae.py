"""A sparse autoencoder: encode, encode only some latents, decode.

    z = x, normalised as the config says, minus b_dec where apply_b_dec_to_input
    h = z @ W_enc + b_enc
    a = gate(h)
    y = a @ W_dec + b_dec, with the normalisation undone
    forward(x) = y + x @ W_skip where there is one

Everything is float32, whatever the checkpoint stored. Files are `formats`' business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from sae_core.columns import Columns, read_columns
from sae_core.encoder import Encoder, encode_all, normalised
from sae_core.errors import ShapeError
from sae_core.exact_product import padded_to_tiles
from sae_core.sae_config import RANKED, SAECard, SAEConfig
from sae_core.sae_weights import SAEStore, SAEWeights

CHUNK_LATENTS = 8192
"""Latents that `reconstruct` holds at a time."""
SMALL_NUMBERS = 2**24
"""Size of an encoder that `reconstruct` reads whole (64 MiB of float32): chunks cost more."""


class Reconstruction(NamedTuple):
    """What an SAE makes of its input, and how."""

    recons: Float[Tensor, "n d_out"] | None
    """None for an SAE that only encodes."""
    l0: Int[Tensor, " n"]
    """Active latents of each token."""
    latent_acts: Float[Tensor, "n n_latents"]
    """Of the latents that were asked for."""


class SAE:
    """An SAE whose numbers fit its formula; raises ShapeError where they do not.

    Over an `SAEStore` nothing is read before it is needed: `slice` reads the columns it was asked
    for, everything else reads the whole SAE once and keeps it.
    """

    def __init__(
        self,
        config: SAEConfig,
        weights: SAEWeights | SAEStore,
        card: SAECard | None = None,
    ) -> None:
        self.config = config
        self.card = SAECard() if card is None else card
        if isinstance(weights, SAEWeights):
            weights = SAEStore.in_memory(config, weights)
        self._store = weights

    @cached_property
    def weights(self) -> SAEWeights:
        """All numbers as float32; the first use reads them."""
        weights = self._store.read()
        self._store = SAEStore.in_memory(self.config, weights)
        return weights

    def to(self, device: torch.device | str) -> SAE:
        """The same SAE with all its weights on `device`."""
        moved = (None if w is None else w.to(device) for w in self.weights)
        return SAE(self.config, SAEWeights(*moved), self.card)  # type: ignore[arg-type]

    def replaced(self, *, config: SAEConfig | None = None, card: SAECard | None = None) -> SAE:
        """The same numbers under another formula or card; ShapeError where they do not fit it."""
        config = self.config if config is None else config
        return SAE(config, self._store.under(config), self.card if card is None else card)

    def encode(
        self, x: Float[Tensor, "... width"], latent_ids: Sequence[int] | Tensor | None = None
    ) -> Float[Tensor, "... n_latents"]:
        """Latent activations of `x`: of every latent, or of `latent_ids` in that order.

        No gradient flows through them.

        To encode the same latents again and again, keep what `slice` returns.
        """
        if latent_ids is not None:
            return self.slice(latent_ids)(x)
        with torch.no_grad():
            acts = encode_all(self.config, self._all_columns, self._normalised(x))
        return acts.reshape(*x.shape[:-1], self.config.d_sae)

    def pre_acts(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... d_sae"]:
        """What enters the gate, of every latent, before any decoder norm."""
        h = self._all_columns.pre_acts(self._normalised(x))
        return h.reshape(*x.shape[:-1], self.config.d_sae)

    def _normalised(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "rows d_in"]:
        b_dec = self._store.all_of("b_dec") if self.config.apply_b_dec_to_input else None
        return normalised(self.config, x, b_dec).z.reshape(-1, self.config.d_in)

    def decode(
        self, latent_acts: Float[Tensor, "... d_sae"], x: Float[Tensor, "... width"] | None = None
    ) -> Float[Tensor, "... d_out"]:
        """The reconstruction that `latent_acts` stand for, without a skip connection.

        `x`, the input that gave them, is needed where it was normalised token by token; ShapeError
        where it is needed and not given, and where the checkpoint held the encoder alone.
        """
        weights = self.weights
        if weights.W_dec is None:
            where = f" in {self.card.source}" if self.card.source else ""
            raise ShapeError(f"W_dec: found none{where}, expected a decoder: this SAE only encodes")
        norms = self._all_columns.norms if self.config.decoder_norms == "acts" else None
        acts = _decoded_acts(latent_acts.float(), weights.scaling_factor, norms)
        return self._denormalised(acts @ weights.W_dec + weights.b_dec, x)

    def reconstruct(
        self, x: Float[Tensor, "n width"], latent_ids: Sequence[int] = ()
    ) -> Reconstruction:
        """`forward` with the facts that fidelity is judged by, without holding the whole SAE.

        The dictionary is gone through in chunks. A ranked gate needs its whole encoder, and the
        activations of all latents; a small SAE is read whole.
        """
        config, store = self.config, self._store
        ids = self._checked_ids(latent_ids)
        if config.d_in * config.d_sae <= SMALL_NUMBERS:
            acts = self.encode(x)
            whole = None
            if self.weights.W_dec is not None:
                whole = self._with_skip(self.decode(acts, x), x)
            return Reconstruction(whole, _l0(acts), acts[:, torch.from_numpy(ids)])
        everything = self.encode(x) if config.architecture in RANKED else None
        b_dec = store.all_of("b_dec")
        assert b_dec is not None
        total = b_dec.to(x.device).repeat(len(x), 1)
        l0 = torch.zeros(len(x), dtype=torch.long, device=x.device)
        has_decoder = False
        for start in range(0, config.d_sae, CHUNK_LATENTS):
            some = np.arange(start, min(start + CHUNK_LATENTS, config.d_sae))
            if everything is not None:
                acts = everything[:, start : start + len(some)]
            else:
                acts = Encoder(config, store, some).to(x.device)(x)
            l0 += _l0(acts)
            rows = store.some_of("W_dec", some)
            if rows is not None:
                norms = store.decoder_norms(some) if config.decoder_norms == "acts" else None
                scaled = _decoded_acts(acts.cpu(), store.some_of("scaling_factor", some), norms)
                total += (scaled @ rows.cpu()).to(x.device)
                has_decoder = True
        recons = self._with_skip(self._denormalised(total, x), x) if has_decoder else None
        if everything is not None:
            return Reconstruction(recons, l0, everything[:, torch.from_numpy(ids)])
        return Reconstruction(recons, l0, Encoder(config, store, ids).to(x.device)(x))

    def _denormalised(
        self, recons: Float[Tensor, "... d_out"], x: Float[Tensor, "... width"] | None
    ) -> Float[Tensor, "... d_out"]:
        config = self.config
        if config.output_scale != 1:
            recons = recons / config.output_scale
        if config.predicts_another_place:
            return recons
        if config.normalize == "none" and not config.center_input:
            return recons
        if x is None:
            how = "centred" if config.normalize == "none" else config.normalize
            raise ShapeError(f"x is missing: this SAE's inputs are {how}, expected the input")
        given = normalised(config, x, None)
        if given.scale is not None:
            recons = recons * given.scale
        if given.shift is not None:
            recons = recons + given.shift
        return recons if given.mean is None else recons + given.mean

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... d_out"]:
        """The reconstruction of `x` (a transcoder: what it predicts), skip connection included."""
        return self._with_skip(self.decode(self.encode(x), x), x)

    def _with_skip(
        self, recons: Float[Tensor, "... d_out"], x: Float[Tensor, "... width"]
    ) -> Float[Tensor, "... d_out"]:
        W_skip = self._store.all_of("W_skip")
        return recons if W_skip is None else recons + x.float() @ W_skip.to(x.device)

    def slice(self, latent_ids: Sequence[int] | Tensor) -> Encoder:
        """An encoder of `latent_ids` alone, in that order, each once.

        Raises ShapeError for an id outside 0 to d_sae - 1, for one that comes twice, and for what
        is no list of whole numbers.
        """
        ids = self._checked_ids(latent_ids)
        if "weights" not in vars(self):
            return Encoder(self.config, self._store, ids)
        ranks = self.config.architecture in RANKED
        encoder = Encoder(self.config, self._store, ids, self._all_columns if ranks else None)
        return encoder.to(self.weights.W_enc.device)

    def _checked_ids(self, latent_ids: Sequence[int] | Tensor) -> Int64[np.ndarray, " n"]:
        given = latent_ids.cpu().numpy() if isinstance(latent_ids, Tensor) else latent_ids
        found = np.asarray(given if isinstance(given, np.ndarray) else list(given))
        if found.size == 0:
            return np.empty(0, np.int64)
        if found.dtype.kind not in "iu" or found.ndim != 1:
            raise ShapeError(
                f"latent_ids is {found.ndim}-d of {found.dtype}, expected a list of whole numbers"
            )
        ids = np.ascontiguousarray(found, np.int64)
        outside = ids[(ids < 0) | (ids >= self.config.d_sae)]
        if len(outside):
            last = self.config.d_sae - 1
            raise ShapeError(f"latent_ids has {outside.tolist()}, expected ids from 0 to {last}")
        if repeated := [i for i, n in Counter(ids.tolist()).items() if n > 1]:
            raise ShapeError(f"latent_ids has {repeated} more than once, expected each id once")
        return ids

    @cached_property
    def _all_columns(self) -> Columns:
        if "weights" not in vars(self):
            return read_columns(self.config, self._store)  # the decoder stays where it is
        device = self.weights.W_enc.device
        w = self.weights
        norms = None
        if self.config.decoder_norms != "unused":
            norms = self._store.decoder_norms(np.arange(self.config.d_sae)).to(device)
        return Columns(
            W=padded_to_tiles(w.W_enc),
            b_enc=w.b_enc,
            threshold=w.threshold,
            b_gate=w.b_gate,
            r_mag=w.r_mag,
            b_mag=w.b_mag,
            W_glu=None if w.W_glu is None else padded_to_tiles(w.W_glu),
            b_glu=w.b_glu,
            norms=norms,
        )


def _decoded_acts(
    acts: Float[Tensor, "... n"],
    scaling_factor: Float[Tensor, " n"] | None,
    norms: Float[Tensor, " n"] | None,
) -> Float[Tensor, "... n"]:
    """What multiplies the decoder's rows; a row of length 0 stays silent."""
    if scaling_factor is not None:
        acts = acts * scaling_factor
    if norms is not None:
        acts = acts * torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    return acts


def _l0(acts: Float[Tensor, "n n_latents"]) -> Int[Tensor, " n"]:
    return (acts != 0).sum(dim=-1)
