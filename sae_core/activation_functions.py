"""What turns pre-activations into latent activations: pure functions of one token's row.

Each keeps the sign rules of the published checkpoints: comparisons are strict, and no latent
ever comes out negative.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def relu(pre_acts: Float[Tensor, "... d_sae"]) -> Float[Tensor, "... d_sae"]:
    """Each positive pre-activation, else 0."""
    return torch.relu(pre_acts)


def jumprelu(
    pre_acts: Float[Tensor, "... d_sae"], threshold: Float[Tensor, " d_sae"]
) -> Float[Tensor, "... d_sae"]:
    """Each positive pre-activation above its latent's threshold, else 0.

    A latent exactly at its threshold is off; under a negative threshold a latent is plain ReLU.
    Source: Rajamanoharan et al. 2024, arXiv:2407.14435.
    """
    return torch.relu(pre_acts) * (pre_acts > threshold)


def topk(pre_acts: Float[Tensor, "... d_sae"], k: int) -> Float[Tensor, "... d_sae"]:
    """The positive ones among the `k` largest pre-activations of each token, else 0.

    Among equal values at the k-th place the lowest latent ids are kept. Source: Gao et al. 2024,
    arXiv:2406.04093.
    """
    kth = pre_acts.topk(k, dim=-1).values[..., -1:]
    above = pre_acts > kth
    n_tied_kept = k - above.sum(dim=-1, keepdim=True)
    tied = pre_acts == kth
    if bool((tied.sum(dim=-1, keepdim=True) > n_tied_kept).any()):
        tied &= tied.cumsum(dim=-1) <= n_tied_kept
    return torch.relu(pre_acts) * (above | tied)


def batchtopk(
    pre_acts: Float[Tensor, "... d_sae"], threshold: Float[Tensor, ""] | float
) -> Float[Tensor, "... d_sae"]:
    """Each rectified pre-activation above the one threshold that training stored, else 0.

    Inference never ranks a batch: what a token's latents are must not depend on its neighbours.
    Source: Bussmann et al. 2024, arXiv:2412.06410.
    """
    acts = torch.relu(pre_acts)
    return acts * (acts > threshold)
