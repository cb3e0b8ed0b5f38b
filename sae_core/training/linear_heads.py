"""Logistic regression for many heads at once (clusters x folds x penalties).

All read the same features, one row a text, and differ in their targets and in the weight of each
text. A text's features are means over its tokens: a linear head on the mean of the tokens is the
mean of the head's token logits, so what is fitted here is what an aggregate of means deploys.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32
from numpy import ndarray
from torch.nn import functional


class LinearHeads(NamedTuple):
    """Weights for the features as given (not standardised), one column a head."""

    weight: Float32[ndarray, "n_features n_heads"]
    bias: Float32[ndarray, " n_heads"]

    def logits(self, features: Float32[ndarray, "n n_features"]) -> Float32[ndarray, "n n_heads"]:
        """Of texts or of tokens."""
        found: ndarray = features @ self.weight + self.bias
        return found


def fit_linear_heads(
    features: Float32[ndarray, "n_texts n_features"],
    targets: Float32[ndarray, "n_texts n_heads"],
    text_weights: Float32[ndarray, "n_texts n_heads"],
    *,
    l2: Float32[ndarray, " n_heads"],
    l1: float = 0.0,
    non_negative: bool = False,
    mask: Float32[ndarray, "n_features n_heads"] | None = None,
    n_steps: int = 150,
    learning_rate: float = 0.02,
) -> LinearHeads:
    """Weighted logistic regression by full-batch Adam.

    `l2` and `l1` penalise weights of standardised features (only scaled ones when `non_negative`),
    beside a loss in which each head's text weights sum to 1. `mask` keeps features out of heads.
    Deterministic: no random number is drawn.
    """
    deviation = features.std(axis=0, dtype=np.float64).astype(np.float32)
    deviation = np.maximum(deviation, 1e-6 * max(float(deviation.max()), 1e-12))
    mean = np.zeros_like(deviation) if non_negative else features.mean(axis=0, dtype=np.float64)
    x = torch.from_numpy((features - mean.astype(np.float32)) / deviation)
    target = torch.from_numpy(targets)
    text_weight = torch.from_numpy(text_weights / text_weights.sum(axis=0, keepdims=True))
    penalty = torch.from_numpy(np.asarray(l2, np.float32))
    allowed = None if mask is None else torch.from_numpy(mask)

    weight = torch.zeros(x.shape[1], targets.shape[1], requires_grad=True)
    bias = torch.zeros(targets.shape[1], requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], lr=learning_rate)
    for step in range(n_steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min(1.0, 2.0 * (1 - step / n_steps))
        loss = functional.binary_cross_entropy_with_logits(
            x @ weight + bias, target, weight=text_weight, reduction="sum"
        )
        loss = loss + (penalty * weight.square().sum(0)).sum() + l1 * weight.abs().sum()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        with torch.no_grad():
            if non_negative:
                weight.clamp_(min=0)
            if allowed is not None:
                weight *= allowed
    raw = weight.detach().numpy() / deviation[:, None]
    shift = bias.detach().numpy() - mean @ raw
    return LinearHeads(raw.astype(np.float32), shift.astype(np.float32))
