"""What the three generations of OpenMOSS's files share.

Training divides its inputs by their mean length and multiplies them by sqrt(d_model); so it does
with its targets. Source: lm_saes abstract_sae.py and llamascopium models/sparse_dictionary.py,
`compute_norm_factor`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from sae_core.errors import SAEFormatError
from sae_core.formats.files import Cfg, Tensors
from sae_core.sae_config import Normalization
from sae_core.stored import InMemory, Stored

NORMS = "dataset_average_activation_norm"
CREDIBLE_NORMS = (1e-6, 1e9)
"""A mean length outside was never written: the libraries store `torch.empty` where training did not
measure one, and memory that nobody set is mostly 0, denormal or astronomical."""


class Scales(NamedTuple):
    """What inputs and targets are multiplied by before they meet the weights."""

    normalize: Normalization
    """`unit_norm` where each token has a factor of its own."""
    input: float
    output: float


def read_scales(cfg: Cfg, norm: Callable[[str], tuple[str, float]]) -> Scales:
    """The factors that `norm_activation` means.

    `norm` gives the mean length of a hook point, whose side is `in` or `out`, and where it is
    stored. It is asked only where the data set's lengths were used.
    """
    key = "norm_activation"
    if cfg.values.get(key) == "batch-wise":
        raise cfg.error(
            key,
            "dataset-wise, token-wise or inference (batch-wise makes a token's latents depend on "
            "its neighbours)",
        )
    found = cfg.one_of(key, ("dataset-wise", "token-wise", "inference"))
    if found != "dataset-wise":
        return Scales("unit_norm" if found == "token-wise" else "none", 1.0, 1.0)
    factors = []
    for side in ("in", "out"):
        where, value = norm(side)
        low, high = CREDIBLE_NORMS
        if not low < value < high:
            raise SAEFormatError(
                f"{where}: found {value}, expected the mean length of the activations that it was "
                "trained on"
            )
        factors.append(cfg.count("d_model") ** 0.5 / value)
    return Scales("none", *factors)


def stored_norms(
    tensors: Tensors, hook_points: tuple[str, str]
) -> Callable[[str], tuple[str, float]]:
    """How `read_scales` finds mean lengths that lie among the weights, one per hook point."""

    def norm(side: str) -> tuple[str, float]:
        name = f"{NORMS}.{hook_points[side == 'out']}"
        return f"{tensors.path}: {name}", tensors.scalar(name)

    return norm


def read_hook_points(cfg: Cfg) -> tuple[str, str]:
    """What is read and what is predicted; an SAE names one place twice, or once."""
    read = cfg.text("hook_point_in")
    if read is None:
        raise cfg.error("hook_point_in", "the name of a hook point")
    return read, cfg.text("hook_point_out") or read


def width_times_expansion(cfg: Cfg) -> int:
    """d_sae, which newer configs give as a multiple of d_model."""
    return int(cfg.count("d_model") * cfg.number("expansion_factor"))


def bias_or_zeros(tensors: Tensors, name: str, width: int) -> Stored:
    """The bias of that name, zeros where the SAE was trained without one."""
    return tensors[name] if name in tensors else InMemory(torch.zeros(width), name)


def scaled(stored: Stored, factor: float) -> Stored:
    """The same tensor, every number times `factor` once it is read."""
    return stored if factor == 1 else stored.changed(lambda numbers: numbers * factor)
