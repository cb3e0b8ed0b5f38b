"""Where the activations of a piece of work come from: our own forward pass, or somebody else's.

A source gives its tokens part by part, so that long work is scored in steps. `Scorer.step` takes
parts of both kinds and scores them alike. Knows no requests and no wire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from sae_core.hook_points import HookPoint
from sae_core.language_model.model import Segment
from sae_core.language_model.packed import KVStream


@dataclass(frozen=True, slots=True)
class GivenRows:
    """Consecutive tokens whose activations are already known."""

    start: int
    """Position of the first row in its request."""
    n_tokens: int
    acts: Mapping[HookPoint, Shaped[np.ndarray, "n _"]]
    """As in `GivenActivations`."""

    def tensors(self, device: torch.device) -> dict[HookPoint, Float[Tensor, "n _"]]:
        """The rows on a device, in the floating-point type that they were given in."""
        return {hook_point: _tensor(acts).to(device) for hook_point, acts in self.acts.items()}


Part: TypeAlias = Segment | GivenRows
"""What one step scores of one piece of work."""


class ActivationSource(Protocol):
    """Some tokens, and how their activations are had."""

    @property
    def n_tokens(self) -> int:
        """How many tokens there are."""

    def part(self, start: int, stop: int) -> Part:
        """Tokens `start` to `stop`; parts are scored in order, each one once."""


@dataclass(frozen=True, slots=True)
class OwnForward:
    """Our own forward pass over new tokens of a stream."""

    stream: KVStream
    token_ids: Sequence[int]

    @property
    def n_tokens(self) -> int:
        """How many tokens the stream grows by."""
        return len(self.token_ids)

    def part(self, start: int, stop: int) -> Segment:
        """Follows what the stream holds when the part is scored."""
        return Segment(stream=self.stream, token_ids=list(self.token_ids[start:stop]))


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
