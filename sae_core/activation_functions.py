"""What turns pre-activations into latent activations: pure functions of one token's row.

Each keeps the sign and tie rules of the published checkpoints. Comparisons are strict; unless a
gate is signed, no latent comes out negative.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_core.elementary import exp, tanh


def tanh_relu(pre_acts: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
    """The hyperbolic tangent of each positive pre-activation, else 0 (SAELens 5, `tanh-relu`)."""
    return tanh(torch.relu(pre_acts))


def jumprelu(
    pre_acts: Float[Tensor, "... d_sae"], threshold: Float[Tensor, " d_sae"]
) -> Float[Tensor, "... d_sae"]:
    """Each positive pre-activation above its latent's threshold, else 0.

    A latent exactly at its threshold is off; under a negative threshold a latent is plain ReLU.
    Source: Rajamanoharan et al. 2024, arXiv:2407.14435.
    """
    off = pre_acts <= threshold.clamp(min=0)  # NaN is not off
    return pre_acts.masked_fill(off, 0)


def gated(
    projections: Float[Tensor, "... d_sae"],
    b_gate: Float[Tensor, " d_sae"],
    r_mag: Float[Tensor, " d_sae"],
    b_mag: Float[Tensor, " d_sae"],
) -> Float[Tensor, "... d_sae"]:
    """Magnitudes `projection * exp(r_mag) + b_mag` where `projection + b_gate` is positive.

    `projections` are `z @ W_enc` without a bias. Source: Rajamanoharan et al. 2024,
    arXiv:2404.16014.
    """
    magnitudes = torch.relu(projections * exp(r_mag) + b_mag)
    return magnitudes * (projections + b_gate > 0)


def batchtopk(
    pre_acts: Float[Tensor, "... d_sae"], threshold: Float[Tensor, " d_sae"] | float
) -> Float[Tensor, "... d_sae"]:
    """Each rectified pre-activation above the one threshold that training stored, else 0.

    Inference never ranks a batch: what a token's latents are must not depend on its neighbours.
    Source: Bussmann et al. 2024, arXiv:2412.06410.
    """
    acts = torch.relu(pre_acts)
    return acts * (acts > threshold)


def group_largest(
    pre_acts: Float[Tensor, "... n_groups group"],
) -> Bool[Tensor, "... n_groups group"]:
    """Which latent of each group is its largest; the first among equals."""
    winners = pre_acts.argmax(dim=-1, keepdim=True)
    return torch.zeros_like(pre_acts, dtype=torch.bool).scatter_(-1, winners, True)
