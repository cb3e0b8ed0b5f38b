"""The four gates while they are trained: which pairs are active, and the gradients each one adds.

Everything is elementwise over the few pairs of `LatentEntries`. A gate's own number (BatchTopK's
running threshold, ReLU's L1 coefficient) is part of a checkpoint.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sae_core.training.sae_train_config import SAETrainConfig

LEAST = 1e-6
"""A latent is active from here: zero and what rounding leaves of it are not."""
L1_RATE = 0.005
"""How fast ReLU's L1 coefficient follows its L0: at twice the target half a percent a step. At 2 %
it overshoots and half of planted features are lost."""


@runtime_checkable
class Gate(Protocol):
    """One architecture's gate."""

    number: float
    """What it keeps from step to step."""

    def entries(self, pre_acts: Float[Tensor, "rows d_sae"]) -> Int64[Tensor, " n"]:
        """Flat indices of the pairs that are active or get a gradient, ascending."""
        ...

    def acts(
        self, pre: Float[Tensor, " n"], latent_ids: Int64[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """Latent activations of those pairs."""
        ...

    def grad_pre(
        self,
        pre: Float[Tensor, " n"],
        acts: Float[Tensor, " n"],
        grad_acts: Float[Tensor, " n"],
        latent_ids: Int64[Tensor, " n"],
        n_rows: int,
    ) -> Float[Tensor, " n"]:
        """Gradient of the pre-activations, from that of the activations and the gate's penalty."""
        ...

    def after_step(self, l0: float) -> None:
        """Updates `number` by what the batch gave."""
        ...


def gate_of(config: SAETrainConfig, threshold: Float[Tensor, " d_sae"] | None) -> Gate:
    """The gate of an architecture; `threshold` is JumpReLU's parameter."""
    if config.architecture == "jumprelu":
        assert threshold is not None
        return JumpReLUGate(config, threshold)
    if config.architecture == "relu":
        return ReLUGate(config)
    return TopKGate(config) if config.architecture == "topk" else BatchTopKGate(config)


class BatchTopKGate:
    """The rows * k largest pre-activations of the batch."""

    def __init__(self, config: SAETrainConfig) -> None:
        self.k = config.k
        self.number = 0.0
        self._kept_from = 0.0

    def entries(self, pre_acts: Float[Tensor, "rows d_sae"]) -> Int64[Tensor, " n"]:
        """The running threshold spares sorting what is surely below."""
        n_kept = len(pre_acts) * self.k
        flat = pre_acts.flatten()
        ids = indices_where(flat > max(0.8 * self.number, LEAST))
        if len(ids) < n_kept and self.number:
            ids = indices_where(flat > LEAST)
        found = flat[ids]
        if len(ids) > n_kept:
            self._kept_from = float(found.float().topk(n_kept, sorted=False).values.min())
            ids = ids[found >= self._kept_from]
        else:
            self._kept_from = LEAST
        return ids

    def acts(
        self, pre: Float[Tensor, " n"], latent_ids: Int64[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        return pre

    def grad_pre(
        self,
        pre: Float[Tensor, " n"],
        acts: Float[Tensor, " n"],
        grad_acts: Float[Tensor, " n"],
        latent_ids: Int64[Tensor, " n"],
        n_rows: int,
    ) -> Float[Tensor, " n"]:
        return grad_acts

    def after_step(self, l0: float) -> None:
        kept = self._kept_from
        self.number = 0.95 * self.number + 0.05 * kept if self.number else kept


class TopKGate(BatchTopKGate):
    """The k largest pre-activations of each token, those below zero left out."""

    def entries(self, pre_acts: Float[Tensor, "rows d_sae"]) -> Int64[Tensor, " n"]:
        found = pre_acts.topk(self.k, dim=1, sorted=False)
        starts = torch.arange(len(pre_acts), device=pre_acts.device) * pre_acts.shape[1]
        flat = found.indices + starts[:, None]
        return flat[found.values > LEAST].sort().values

    def after_step(self, l0: float) -> None:
        """A rank needs no threshold."""


class ReLUGate:
    """Every positive pre-activation, at the price of an L1 penalty that follows the L0 target."""

    def __init__(self, config: SAETrainConfig) -> None:
        self.l0_target = config.l0_target
        self.number = config.l1_coefficient

    def entries(self, pre_acts: Float[Tensor, "rows d_sae"]) -> Int64[Tensor, " n"]:
        return indices_where(pre_acts.flatten() > LEAST)

    def acts(
        self, pre: Float[Tensor, " n"], latent_ids: Int64[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        return pre

    def grad_pre(
        self,
        pre: Float[Tensor, " n"],
        acts: Float[Tensor, " n"],
        grad_acts: Float[Tensor, " n"],
        latent_ids: Int64[Tensor, " n"],
        n_rows: int,
    ) -> Float[Tensor, " n"]:
        return grad_acts + self.number / n_rows

    def after_step(self, l0: float) -> None:
        excess = min(max(l0 / self.l0_target - 1.0, -1.0), 1.0)
        self.number *= 1.0 + L1_RATE * excess


class JumpReLUGate:
    """Pre-activations above their latent's threshold, which learns through a rectangle kernel.

    The jump has no gradient, so that of a window of width `bandwidth` around it stands in (a
    straight-through estimator); it reaches the thresholds alone. The penalty is quadratic in the
    batch's L0 around its target. Source: Rajamanoharan et al. 2024, arXiv:2407.14435, section 4
    and appendix H.
    """

    def __init__(self, config: SAETrainConfig, threshold: Float[Tensor, " d_sae"]) -> None:
        self.l0_target, self.bandwidth = config.l0_target, config.bandwidth
        self.l0_coefficient = config.l0_coefficient
        self.threshold = threshold
        self.number = 0.0
        self.d_in = 0

    def entries(self, pre_acts: Float[Tensor, "rows d_sae"]) -> Int64[Tensor, " n"]:
        """The first batch sets every threshold to where L0 is the target."""
        if self.number == 0:
            n_kept = int(len(pre_acts) * self.l0_target)
            start = float(pre_acts.float().flatten().topk(n_kept, sorted=False).values.min())
            self.threshold.data.fill_(max(start, LEAST))
            self.number = start
        lowest = (self.threshold.detach() - self.bandwidth / 2).clamp(min=LEAST)
        return indices_where((pre_acts > lowest.to(pre_acts.dtype)).flatten())

    def acts(
        self, pre: Float[Tensor, " n"], latent_ids: Int64[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        return pre * (pre > self.threshold.detach()[latent_ids])

    def grad_pre(
        self,
        pre: Float[Tensor, " n"],
        acts: Float[Tensor, " n"],
        grad_acts: Float[Tensor, " n"],
        latent_ids: Int64[Tensor, " n"],
        n_rows: int,
    ) -> Float[Tensor, " n"]:
        threshold = self.threshold.detach()[latent_ids]
        is_near = (pre - threshold).abs() < self.bandwidth / 2
        l0 = int((acts > 0).sum()) / n_rows
        push = 2 * self.l0_coefficient * self.d_in * (l0 / self.l0_target - 1) / self.l0_target
        kernel = is_near / self.bandwidth
        grad = -kernel * (threshold * grad_acts + push / n_rows)
        total = torch.bincount(latent_ids, weights=grad, minlength=len(self.threshold))
        self.threshold.grad = total.float()
        return grad_acts * (acts > 0)

    def after_step(self, l0: float) -> None:
        self.threshold.data.clamp_(min=LEAST)


def indices_where(flat: Bool[Tensor, " n"]) -> Int64[Tensor, " found"]:
    """Where it is true; NumPy's search is many times quicker than torch's on a CPU."""
    if flat.device.type != "cpu":
        return flat.nonzero()[:, 0]
    return torch.from_numpy(np.flatnonzero(flat.numpy()))
