"""Raw activations to the space that an SAE learns in, and weights back to raw units."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from sae_core.errors import TrainingError


class InputTransform(NamedTuple):
    """Raw activations to the training space: (x - mean) / scale, per dimension.

    A few dimensions of a residual stream can hold most of its variance (Gemma 3: one holds more
    than half) and would take most of the dictionary; `tempering` flattens them.
    """

    mean: Float[Tensor, " d_in"]
    scale: Float[Tensor, " d_in"]

    @classmethod
    def fit(cls, rows: Float[Tensor, "rows d_in"], tempering: float) -> InputTransform:
        """`tempering` 0 divides every dimension by one number, 1 each by its own deviation.

        Either way the mean squared norm comes out as d_in.
        """
        mean = rows.float().mean(0)
        variance = (rows.float() - mean).square().mean(0)
        if not bool(variance.isfinite().all()) or float(variance.max()) <= 0:
            raise TrainingError("activations are not finite or do not vary, nothing to learn")
        floor = float(variance.mean()) * 1e-6
        scale = variance.clamp(min=floor).pow(tempering / 2)
        scale = scale * (variance / scale.square()).mean().sqrt()
        return cls(mean, scale)

    def __call__(self, rows: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
        return (rows.float() - self.mean) / self.scale
