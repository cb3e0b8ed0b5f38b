"""Per-token numbers of labelled texts, arranged for training and for scoring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from numpy import ndarray

from sae_core.aggregation import AggregateSpec, Aggregator
from sae_core.sae import SAE
from sae_core.training.examples import ResidualSet

CHUNK_TOKENS = 8192
"""Tokens encoded at a time; 8192 x 8192 float32 latent acts are 256 MiB."""


def latent_chunks(
    sae: SAE, texts: ResidualSet, latent_ids: Sequence[int] | None = None
) -> Iterator[tuple[slice, Float32[ndarray, "n n_latents"]]]:
    """Latent acts of all latents (or of some) for consecutive slices of tokens."""
    encode = sae.encode if latent_ids is None else sae.slice(latent_ids)
    for start in range(0, len(texts.resid), CHUNK_TOKENS):
        part = slice(start, min(start + CHUNK_TOKENS, len(texts.resid)))
        with torch.inference_mode():
            acts = encode(torch.from_numpy(np.array(texts.resid[part])))
        yield part, acts.numpy()


def latent_acts_of(
    sae: SAE, texts: ResidualSet, latent_ids: Sequence[int]
) -> Float32[ndarray, "total n_latents"]:
    """Latent acts of the chosen latents for every token."""
    acts = np.empty((len(texts.resid), len(latent_ids)), np.float32)
    for part, values in latent_chunks(sae, texts, latent_ids):
        acts[part] = values
    return acts


def latent_scales(
    acts: Float32[ndarray, "total n_latents"], quantile: float
) -> Float32[ndarray, " n_latents"]:
    """The quantile of each latent's activations where it fires; 1 where it never does."""
    scales = np.ones(acts.shape[1], np.float32)
    for column in range(acts.shape[1]):
        active = acts[acts[:, column] > 0, column]
        if len(active):
            scales[column] = np.quantile(active, quantile)
    return scales


def text_means(
    values: Float32[ndarray, "total n"], starts: Int64[ndarray, " n_texts_and_one"]
) -> Float32[ndarray, "n_texts n"]:
    """Mean over each text's tokens, 0 for a text of none: what the aggregate `mean` sees."""
    lengths = np.diff(starts)
    means = np.zeros((len(lengths), values.shape[1]), np.float32)
    full = np.flatnonzero(lengths > 0)
    if len(full):
        sums = np.add.reduceat(values, starts[:-1][full], axis=0)
        means[full] = sums / lengths[full][:, None]
    return means


def text_scores(
    logits: Float32[ndarray, "total n_clusters 3"],
    starts: Int64[ndarray, " n_texts_and_one"],
    specs: Sequence[AggregateSpec],
) -> Float64[ndarray, "n_texts n_clusters 3"]:
    """The aggregated score of every text, by the code that serves; NaN for a text of no token."""
    aggregator = Aggregator(specs)
    scores = np.empty((len(starts) - 1, len(specs), 3))
    for text, (begin, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        state = aggregator.start()
        aggregator.update(state, logits[begin:end])
        scores[text] = aggregator.score(state)
    return scores
