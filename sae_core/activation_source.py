"""Where the activations of a piece of work come from: our own forward pass, or somebody else's.

Work is scored part by part, in steps; `Scorer.step` takes parts of both kinds and scores them
alike. Our own forward pass over a stream is `score_cache`'s. Knows no requests and no wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sae_core.hook_points import HookPoint
from sae_core.language_model.model import Segment


@dataclass(frozen=True, slots=True)
class GivenRows:
    """Consecutive tokens whose activations are already known."""

    start: int
    """Position of the first row in its request."""
    n_tokens: int
    acts: Mapping[HookPoint, Shaped[np.ndarray, "n _"]]
    """As in `GivenActivations`."""

    def tensors(
        self, devices: Mapping[HookPoint, torch.device]
    ) -> dict[HookPoint, Float[Tensor, "n _"]]:
        """The rows on their hook points' devices, in the type that they were given in."""
        return {h: _tensor(acts).to(devices[h]) for h, acts in self.acts.items()}


Part: TypeAlias = Segment | GivenRows
"""What one step scores of one piece of work."""


@dataclass(frozen=True, slots=True)
class GivenActivations:
    """Activations that another forward pass of the same model made.

    They must be the raw ones, as a Hugging Face model has them at the hook point. What an SAE wants
    done to its input (centring, norms, shifts of a processed model) the scorer does.
    """

    n_tokens: int
    acts: Mapping[HookPoint, Shaped[np.ndarray, "n _"]]
    """One row a token, writable: float32, float16, or uint16 with the bits of bfloat16."""

    def part(self, start: int, stop: int) -> GivenRows:
        """A view; nothing is copied."""
        rows = {hook_point: acts[start:stop] for hook_point, acts in self.acts.items()}
        return GivenRows(start, stop - start, rows)


def _tensor(acts: Shaped[np.ndarray, "n _"]) -> Float[Tensor, "n _"]:
    if acts.dtype == np.uint16:  # torch views signed integers on every backend
        return torch.from_numpy(acts.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(acts)
