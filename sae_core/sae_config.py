"""What an SAE is, apart from its numbers: its formula (`SAEConfig`) and its origin (`SAECard`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal, get_args

from sae_core.errors import ShapeError

Architecture = Literal[
    "relu", "tanh_relu", "jumprelu", "gated", "batchtopk", "topk", "abstopk", "groupmax"
]
"""The gate between pre-activations and latent activations; `activation_functions` has each."""
Normalization = Literal["none", "layer_norm", "unit_norm"]
DecoderNorms = Literal["unused", "gate", "acts"]

THRESHOLDED: tuple[Architecture, ...] = ("jumprelu", "batchtopk")
RANKED: tuple[Architecture, ...] = ("topk", "abstopk")
"""Gates that ask for a latent's rank among all latents of its token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SAEConfig:
    """An SAE's formula.

    In order: `head_index` cuts the input, `center_input`, `normalize`, `input_scale`,
    `apply_b_dec_to_input`, the encoder, the gate. Decoding goes back the same way.
    """

    architecture: Architecture
    d_in: int
    d_sae: int
    d_out: int = 0
    """Width of what is reconstructed; 0 stands for d_in."""
    k: int | None = None
    """Latents a token may have (`topk`, `abstopk`), or groups (`groupmax`)."""
    signed: bool = False
    """Whether `topk` keeps negative values that are among the k largest."""
    head_index: int | None = None
    """The attention head that is read, where the input holds all heads side by side."""
    center_input: bool = False
    """x - mean(x): the residual stream of a model whose writing weights were centred."""
    normalize: Normalization = "none"
    """Per token: `layer_norm` is (x - mean) / (unbiased std + 1e-5); `unit_norm` gives each token
    the length sqrt(d_in)."""
    input_scale: float = 1.0
    output_scale: float = 1.0
    """What training scaled its targets by; decoding divides by it."""
    apply_b_dec_to_input: bool = False
    decoder_norms: DecoderNorms = "unused"
    """`gate` judges pre-activations times the norm of their decoder row and returns them without
    it; `acts` returns them with it, and decoding takes it off again."""
    predicts_another_place: bool = False
    """A transcoder: what it reconstructs is not its input, so no normalisation is undone."""

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Architecture):
            expected = ", ".join(get_args(Architecture))
            raise ShapeError(f"architecture is {self.architecture!r}, expected one of {expected}")
        if self.d_in < 1 or self.d_sae < 1:
            raise ShapeError(f"d_in is {self.d_in}, d_sae is {self.d_sae}, expected at least 1")
        if self.d_out < 0:
            raise ShapeError(f"d_out is {self.d_out}, expected at least 1")
        if self.d_out == 0:
            object.__setattr__(self, "d_out", self.d_in)
        if self.d_out != self.d_in and not self.predicts_another_place:
            raise ShapeError(f"d_out is {self.d_out}, expected d_in, which is {self.d_in}")
        counted = (*RANKED, "groupmax")
        if self.architecture in counted and not (self.k and 1 <= self.k <= self.d_sae):
            raise ShapeError(f"k is {self.k}, expected 1 to d_sae, which is {self.d_sae}")
        if self.architecture not in counted and self.k is not None:
            raise ShapeError(f"k is {self.k}, expected none for {self.architecture}")
        if self.architecture == "groupmax" and self.k and self.d_sae % self.k:
            raise ShapeError(f"k is {self.k}, expected a divisor of d_sae, which is {self.d_sae}")
        if self.signed and self.architecture != "topk":
            raise ShapeError(f"signed is set, expected it for topk only, not {self.architecture}")
        for name in ("input_scale", "output_scale"):
            value = getattr(self, name)
            if not (isfinite(value) and value > 0):
                raise ShapeError(f"{name} is {value}, expected a positive number")

    def reads(self, width: int) -> bool:
        """Whether activations of this width can be its input: d_in, or heads of d_in each."""
        if self.head_index is None or width == self.d_in:
            return width == self.d_in
        return width % self.d_in == 0 and (self.head_index + 1) * self.d_in <= width


@dataclass(frozen=True, slots=True, kw_only=True)
class SAECard:
    """Where an SAE comes from and what its checkpoint says of itself."""

    format: str = "memory"
    source: str = ""
    """Folder or file that it was read from."""
    hook_point: str | None = None
    """Where it was trained to read: as its checkpoint says, or as the format means; None where
    neither says."""
    hook_point_out: str | None = None
    """What a transcoder predicts; None for an SAE, which predicts what it reads."""
    model_name: str | None = None
    processing: Literal["none", "default"] = "none"
    """How TransformerLens had rewritten the model whose activations it was trained on: `default`
    is what `HookedTransformer.from_pretrained` does unless it is told otherwise."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the checkpoint says, kept as found."""
    notes: tuple[str, ...] = ()
    """What a reader should know before trusting it, a sentence each."""
