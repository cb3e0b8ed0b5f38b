"""Linear heads trained for the aggregation that is deployed: the largest window decides a text.

One call fits many heads at once (clusters x folds x penalties): all read the same features and
differ in their targets and in the weight of each text.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int, Int64
from numpy import ndarray
from torch import Tensor
from torch.nn import functional

CHOICE_STEPS = 5
"""Optimiser steps between two choices of each text's window; the choice is the dear part."""


class LinearHeads(NamedTuple):
    """Weights for the features as given (not standardised), one column a head."""

    weight: Float32[ndarray, "n_features n_heads"]
    bias: Float32[ndarray, " n_heads"]


def fit_pooled_heads(
    features: Float32[ndarray, "total n_features"],
    starts: Int64[ndarray, " n_texts_and_one"],
    targets: Float32[ndarray, "n_texts n_heads"],
    text_weights: Float32[ndarray, "n_texts n_heads"],
    *,
    l2: Float32[ndarray, " n_heads"],
    l1: float = 0.0,
    non_negative: bool = False,
    mask: Float32[ndarray, "n_features n_heads"] | None = None,
    n_steps: int = 150,
    learning_rate: float = 0.02,
    soft_steps: int = 40,
) -> LinearHeads:
    """Logistic regression on each text's largest logit over its feature rows.

    The first `soft_steps` steps pool the text's mean instead, so that the choice of windows
    starts from a head that already means something. `l2` and `l1` penalise weights of
    standardised features (only scaled ones when `non_negative`). `mask` keeps features out of
    heads. Deterministic: no random number is drawn.
    """
    deviation = features.std(axis=0, dtype=np.float64).astype(np.float32)
    deviation = np.maximum(deviation, 1e-6 * max(float(deviation.max()), 1e-12))
    mean = np.zeros_like(deviation) if non_negative else features.mean(axis=0, dtype=np.float64)
    x = torch.from_numpy((features - mean.astype(np.float32)) / deviation)
    n_heads = targets.shape[1]
    lengths = torch.from_numpy(np.diff(starts))
    means = torch.segment_reduce(x, "mean", lengths=lengths)  # n_texts n_features
    target = torch.from_numpy(targets)
    text_weight = torch.from_numpy(text_weights / text_weights.sum(axis=0, keepdims=True))
    penalty = torch.from_numpy(np.asarray(l2, np.float32))
    allowed = None if mask is None else torch.from_numpy(mask)

    weight = torch.zeros(x.shape[1], n_heads, requires_grad=True)
    bias = torch.zeros(n_heads, requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], lr=learning_rate)
    rows = torch.empty(0)
    for step in range(n_steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min(1.0, 2.0 * (1 - step / n_steps))
        if step < soft_steps:
            pooled = means @ weight
        else:
            if (step - soft_steps) % CHOICE_STEPS == 0:
                rows = x[_best_rows(x, weight.detach(), lengths)]  # n_heads n_texts n_features
            pooled = torch.bmm(rows, weight.T[:, :, None])[:, :, 0].T
        loss = functional.binary_cross_entropy_with_logits(
            pooled + bias, target, weight=text_weight, reduction="sum"
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


def _best_rows(
    x: Float[Tensor, "total n_features"],
    weight: Float[Tensor, "n_features n_heads"],
    lengths: Int[Tensor, " n_texts"],
) -> Int[Tensor, "n_heads n_texts"]:
    """For each head and text the row with the largest logit."""
    logits = x @ weight
    best = torch.segment_reduce(logits, "max", lengths=lengths)
    is_best = logits == torch.repeat_interleave(best, lengths, dim=0)
    rows, heads = is_best.nonzero(as_tuple=True)
    texts = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[rows]
    chosen = torch.zeros(weight.shape[1], len(lengths), dtype=torch.long)
    chosen[heads, texts] = rows  # of several equal rows any may stand
    return chosen


def pooled_scores(
    heads: LinearHeads,
    features: Float32[ndarray, "total n_features"],
    starts: Int64[ndarray, " n_texts_and_one"],
) -> Float64[ndarray, "n_texts n_heads"]:
    """Each text's largest logit."""
    logits = features @ heads.weight + heads.bias
    return np.maximum.reduceat(logits, starts[:-1], axis=0).astype(np.float64)
