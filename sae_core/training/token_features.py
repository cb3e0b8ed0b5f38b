"""Per-token numbers of labelled texts, arranged for training and for scoring.

The deployed aggregation takes the largest rolling mean of a linear logit. The rolling mean of a
linear logit is the logit of the rolling mean, so heads are trained on rolling means directly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64
from numpy import ndarray

from sae_core.aggregation import AggregateSpec, Aggregator
from sae_core.heads import ClusterHeads
from sae_core.sae import SAE
from sae_core.training.examples import ResidualSet

CHUNK_TOKENS = 8192
"""Tokens encoded at a time; 8192 x 8192 float32 latent acts are 256 MiB."""


def rolling_means(
    values: Float32[ndarray, "total n"], starts: Int64[ndarray, " n_texts_and_one"], window: int
) -> Float32[ndarray, "total n"]:
    """Mean of each token and the `window - 1` before it in the same text (fewer at its start)."""
    means = np.empty_like(values)
    for begin, end in zip(starts[:-1], starts[1:], strict=True):
        if begin == end:
            continue
        sums = np.cumsum(values[begin:end], axis=0, dtype=np.float64)
        sums[window:] -= sums[:-window].copy()
        counts = np.minimum(np.arange(1, end - begin + 1), window)
        means[begin:end] = sums / counts[:, None]
    return means


def training_positions(
    starts: Int64[ndarray, " n_texts_and_one"], *, window: int, first: int, stride: int
) -> Bool[ndarray, " total"]:
    """The window ends that heads are trained on.

    Those before position `first` cannot alert (too little evidence) and are left out, unless the
    text is as short; beyond the first full window every `stride`-th is taken, and the last.
    """
    lengths = np.diff(starts)
    position = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    last = np.repeat(lengths - 1, lengths)
    is_early = (position >= first) & (position < window)
    chosen: ndarray = is_early | ((position >= window) & (position % stride == 0))
    chosen |= position == last
    return chosen


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


def token_logits(
    texts: ResidualSet, sae_id: str, sae: SAE, hook_point: str, heads: ClusterHeads
) -> Float32[ndarray, "total n_clusters 3"]:
    """Fused, dense and SAE logit of every token, by the code that serves."""
    logits = np.empty((len(texts.resid), len(heads.clusters), 3), np.float32)
    encode = sae.slice(heads.latent_ids[sae_id])
    for start in range(0, len(texts.resid), CHUNK_TOKENS):
        part = slice(start, min(start + CHUNK_TOKENS, len(texts.resid)))
        with torch.inference_mode():
            resid = torch.from_numpy(np.array(texts.resid[part]))
            found = heads({hook_point: resid}, {sae_id: encode(resid)})
            logits[part] = torch.stack((found.fused, found.dense, found.sae), dim=-1).numpy()
    return logits


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
