"""The encoder's numbers of some latents, and what one latent makes of a token with them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae_core import activation_functions as gates
from sae_core.elementary import sigmoid
from sae_core.exact_product import TILE_COLUMNS, exact_product, padded_to_tiles
from sae_core.sae_config import SAEConfig
from sae_core.sae_weights import SAEStore


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

    @property
    def n(self) -> int:
        """How many latents they are of."""
        some = self.b_enc if self.b_enc is not None else self.b_gate
        assert some is not None
        return len(some)

    def part(self, start: int, stop: int) -> Columns:
        """The columns from `start` to before `stop`, as views.

        `start` must be a whole number of tiles, and `stop` too unless it is the end: only then
        are the bits of `pre_acts` those of the whole.
        """
        if start == 0 and stop == self.n:
            return self
        end = min(stop + -stop % TILE_COLUMNS, self.W.shape[1])
        parts = {
            name: t[:, start:end] if t.ndim == 2 else t[start:stop]
            for name, t in self._asdict().items()
            if t is not None
        }
        return self._replace(**parts)

    def pre_acts(
        self, z: Float[Tensor, "rows d_in"], *, is_rough: bool = False
    ) -> Float[Tensor, "rows n"]:
        """What enters the gate, before any decoder norm, in memory of its own.

        `is_rough` lets the BLAS round as it likes, within `rounding_error`.
        """
        h = (z @ self.W)[:, : self.n] if is_rough else exact_product(z, self.W, self.n)
        if self.b_enc is not None:
            h += self.b_enc
        if self.W_glu is not None:
            assert self.b_glu is not None
            h *= sigmoid(exact_product(z, self.W_glu, self.n) + self.b_glu)
        return h

    def judged(self, h: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        """Pre-activations as the gate judges them: times the norms where it looks at them."""
        return h if self.norms is None else h * self.norms


class Reach(NamedTuple):
    """How large the ranking keys of some columns can get: what bounds their rounding."""

    length: float
    """Of the longest column, decoder norm included."""
    bias: float
    """The largest in magnitude, decoder norm included."""

    def rounding_error(self, z: Float[Tensor, "rows d_in"]) -> Float[Tensor, " rows"]:
        """How far two float32 computations of a key of `columns` may lie apart, in any order.

        A sum of n products is off by at most n u |z| |w|, u = 2^-24 (Higham, Accuracy and
        Stability of Numerical Algorithms, 2002, section 3.1); bias and norm add less than four
        more roundings. Two computations are twice that apart; a tenth more covers the rounding of
        this bound itself.
        """
        gamma = (z.shape[1] + 4) * 2.0**-24
        error: Tensor = 2.2 * gamma * (torch.linalg.vector_norm(z, dim=1) * self.length + self.bias)
        return error + 1e-30


def reach_of(columns: Columns) -> Reach | None:
    """None for a GLU, whose keys are products of two."""
    if columns.W_glu is not None or columns.b_enc is None or columns.n == 0:
        return None
    lengths = torch.linalg.vector_norm(columns.W[:, : columns.n], dim=0)
    biases = columns.b_enc.abs()
    return Reach(
        float(columns.judged(lengths[None]).max()), float(columns.judged(biases[None]).max())
    )


def read_columns(
    config: SAEConfig, store: SAEStore, latent_ids: Int64[np.ndarray, " n"] | None = None
) -> Columns:
    """The columns of `latent_ids`, in that order, and nothing else; None asks for all."""

    def some(name: str) -> Tensor | None:
        return store.all_of(name) if latent_ids is None else store.some_of(name, latent_ids)

    W, W_glu = some("W_enc"), some("W_glu")
    assert W is not None
    everyone = np.arange(config.d_sae) if latent_ids is None else latent_ids
    return Columns(
        W=padded_to_tiles(W),
        b_enc=some("b_enc"),
        threshold=some("threshold"),
        b_gate=some("b_gate"),
        r_mag=some("r_mag"),
        b_mag=some("b_mag"),
        W_glu=None if W_glu is None else padded_to_tiles(W_glu),
        b_glu=some("b_glu"),
        norms=None if config.decoder_norms == "unused" else store.decoder_norms(everyone),
    )


def apply_gate(
    config: SAEConfig, h: Float[Tensor, "rows n"], columns: Columns
) -> Float[Tensor, "rows n"]:
    """A gate that looks at one latent at a time, decoder norms included."""
    judged = columns.judged(h)
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
