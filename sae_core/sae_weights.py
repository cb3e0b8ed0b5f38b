"""An SAE's numbers: in memory (`SAEWeights`), or where they are stored (`SAEStore`).

One orientation, whatever the checkpoint's: `W_enc [d_in, d_sae]`, `W_dec [d_sae, d_out]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from sae_core.errors import ShapeError
from sae_core.sae_config import THRESHOLDED, SAEConfig
from sae_core.stored import InMemory, Stored

NORM_ROWS = 8192
"""Decoder rows whose norms are computed at a time."""


class SAEWeights(NamedTuple):
    """All numbers of an SAE; what its formula does not use is None."""

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"] | None
    """None for `gated` only."""
    W_dec: Float[Tensor, "d_sae d_out"] | None
    """None for a checkpoint of the encoder alone, which cannot be decoded."""
    b_dec: Float[Tensor, " d_out"]
    """Of a transcoder too; what is subtracted from the input is this, so d_out is d_in there."""
    threshold: Float[Tensor, " d_sae"] | None = None
    """For `jumprelu` and `batchtopk` (there one number, repeated)."""
    b_gate: Float[Tensor, " d_sae"] | None = None
    r_mag: Float[Tensor, " d_sae"] | None = None
    b_mag: Float[Tensor, " d_sae"] | None = None
    W_glu: Float[Tensor, "d_in d_sae"] | None = None
    """Pre-activations are multiplied by sigmoid(z @ W_glu + b_glu)."""
    b_glu: Float[Tensor, " d_sae"] | None = None
    scaling_factor: Float[Tensor, " d_sae"] | None = None
    """Activations are multiplied by it when they are decoded, and only then."""
    W_skip: Float[Tensor, "d_in d_out"] | None = None
    """What a skip transcoder adds to its reconstruction: x @ W_skip."""


LATENT_AXIS = {"W_enc": 1, "W_glu": 1, "W_dec": 0} | dict.fromkeys(
    ("b_enc", "threshold", "b_gate", "r_mag", "b_mag", "b_glu", "scaling_factor"), 0
)


class SAEStore:
    """Where each tensor of an SAE is, checked against its formula; nothing is read before it must.

    Raises ShapeError where a tensor is missing, has another shape, or does not belong there.
    """

    def __init__(self, config: SAEConfig, tensors: Mapping[str, Stored]) -> None:
        for name, expected in _expected(config, frozenset(tensors)).items():
            found = tensors[name].shape if name in tensors else None
            if found != expected:
                wanted = expected if expected is not None else f"none for {config.architecture}"
                raise ShapeError(f"{name} has shape {found}, expected {wanted}")
        self._tensors = dict(tensors)

    @classmethod
    def in_memory(cls, config: SAEConfig, weights: SAEWeights) -> SAEStore:
        """A store over tensors that are there already."""
        given = {n: InMemory(t, n) for n, t in weights._asdict().items() if t is not None}
        return cls(config, given)

    def under(self, config: SAEConfig) -> SAEStore:
        """The same tensors, checked against another formula."""
        return SAEStore(config, self._tensors)

    def read(self) -> SAEWeights:
        """Everything, as float32 in memory of its own."""
        found = {name: stored.read() for name, stored in self._tensors.items()}
        everything = {name: found.get(name) for name in SAEWeights._fields}
        return SAEWeights(**everything)  # type: ignore[arg-type]

    def all_of(self, name: str) -> Tensor | None:
        """One tensor whole, None where the SAE has none of that name."""
        return self._tensors[name].read() if name in self._tensors else None

    def some_of(self, name: str, latent_ids: Int64[np.ndarray, " n"]) -> Tensor | None:
        """One tensor's numbers of some latents only."""
        if name not in self._tensors:
            return None
        return self._tensors[name].take(latent_ids, LATENT_AXIS[name])

    def decoder_norms(self, latent_ids: Int64[np.ndarray, " n"]) -> Float32[Tensor, " n"]:
        """Lengths of the latents' decoder rows, in bounded memory."""
        parts = [torch.empty(0)]
        for start in range(0, len(latent_ids), NORM_ROWS):
            rows = self._tensors["W_dec"].take(latent_ids[start : start + NORM_ROWS], 0)
            parts.append(rows.norm(dim=-1).cpu())
        return torch.cat(parts)


def _expected(config: SAEConfig, given: frozenset[str]) -> dict[str, tuple[int, ...] | None]:
    """The shape of every tensor; None for one that must not be there."""
    d_in, d_sae, d_out = config.d_in, config.d_sae, config.d_out
    shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(SAEWeights._fields)
    shapes |= {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    if config.architecture == "gated":
        shapes |= dict.fromkeys(("b_gate", "r_mag", "b_mag"), (d_sae,))
    else:
        shapes["b_enc"] = (d_sae,)
    if config.architecture in THRESHOLDED:
        shapes["threshold"] = (d_sae,)
    if given & {"W_glu", "b_glu"}:
        shapes |= {"W_glu": (d_in, d_sae), "b_glu": (d_sae,)}
    if "W_dec" not in given and config.decoder_norms == "unused":
        shapes["W_dec"] = None
    if "scaling_factor" in given:
        shapes["scaling_factor"] = (d_sae,)
    if "W_skip" in given:
        shapes["W_skip"] = (d_in, d_out)
    return shapes
