"""SAEs that fit a stream without training: its strongest directions, each with both signs.

They reconstruct the stream they were made from and, like trained ones, no other: what tests of
fidelity need, in milliseconds.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.sae import SAE
from sae_core.sae_config import SAECard, SAEConfig
from sae_core.sae_weights import SAEWeights


def principal_sae(
    x: Float[Tensor, "n d_in"],
    *,
    k: int | None = None,
    threshold: float = 0.6,
    input_scale: float = 1.0,
    hook_point: str | None = None,
) -> SAE:
    """An SAE of d_in latents that fits `x`: both signs of the d_in / 2 strongest directions.

    Args:
        k: For a TopK SAE; None makes a JumpReLU one.
        threshold: Of each latent, in standard deviations of its direction.
        input_scale: The SAE is made for inputs multiplied by it, and its config says so.
    """
    scaled = x.double() * input_scale
    mean = scaled.mean(dim=0)
    _, singular, directions = torch.linalg.svd(scaled - mean, full_matrices=False)
    missing = x.shape[1] - len(directions)
    assert missing == 0, "needs at least d_in tokens"
    half = max(1, x.shape[1] // 2)
    W_dec = torch.cat((directions[:half], -directions[:half]))
    deviations = (singular[:half] / len(x) ** 0.5).repeat(2)
    config = SAEConfig(
        architecture="jumprelu" if k is None else "topk",
        d_in=x.shape[1],
        d_sae=2 * half,
        k=k,
        input_scale=input_scale,
        output_scale=input_scale,
        apply_b_dec_to_input=True,
    )
    weights = SAEWeights(
        W_enc=W_dec.T.contiguous().float(),
        b_enc=torch.zeros(len(W_dec)),
        W_dec=W_dec.float(),
        b_dec=mean.float(),
        threshold=(threshold * deviations).float() if k is None else None,
    )
    return SAE(config, weights, SAECard(hook_point=hook_point))
