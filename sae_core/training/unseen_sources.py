"""Heads fitted anew without each data set, and what they say of it.

For every source: latents are chosen, dense and SAE heads fitted, on all the others; the fusion's
three numbers a cluster are fitted on the others too, on logits of heads that had not seen the row
in question. What is left of the source in them is that those heads had seen it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from sae_core.aggregation import AggregateSpec
from sae_core.evaluation.data import LabelledText
from sae_core.evaluation.folds import SourceFold, fold_numbers
from sae_core.training.dense_heads import (
    HeadConfig,
    cross_fitted_pairs,
    fit_fusion,
)
from sae_core.training.dictionary import Dictionary, ReadTexts, Streams, shared
from sae_core.training.discovery import ClusterPlan
from sae_core.training.token_features import text_scores

DENSE_L2 = 5e-2
"""The penalty that was best on unseen data sets of the default bundle; see `HeadConfig.l2_grid`."""


def unseen_source_scores(
    plans: Sequence[ClusterPlan],
    rows: Sequence[LabelledText],
    streams: Streams,
    dictionary: Dictionary,
    dense_hook_point: str,
    folds: Sequence[SourceFold],
    config: HeadConfig,
    aggregate: AggregateSpec,
    *,
    l2: float = DENSE_L2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Float64[ndarray, "n_texts n_clusters 3"]:
    """Each text's aggregated fused, dense and SAE score, from heads that never saw its source.

    Aggregated as `aggregate` says.

    Args:
        streams: Residuals of the rows, each with one token at least.
        dense_hook_point: Where dense heads read.
        folds: From `source_folds`; they hold every row out once.
        progress: Folds done, and all of them.
    """
    numbers = fold_numbers(folds)
    done = -1

    def fold_began(line: str) -> None:
        nonlocal done
        done += 1
        progress(done, len(folds))

    pairs = cross_fitted_pairs(
        plans,
        rows,
        ReadTexts.of(streams, dictionary, dense_hook_point),
        numbers,
        l2,
        replace(config, n_folds=len(folds)),
        progress=fold_began,
    )
    texts = shared(streams)
    text_of = texts.text_of_token()
    logits = np.empty((len(pairs), len(plans), 3), np.float32)
    for fold in folds:
        lengths = np.diff(texts.starts)[fold.train]
        fusion = fit_fusion(
            plans,
            [rows[int(i)] for i in fold.train],
            pairs[np.isin(text_of, fold.train)],
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            config,
        )
        held = np.isin(text_of, fold.held)
        sae_logits, dense = pairs[held, :, 0], pairs[held, :, 1]
        fused = fusion.bias + fusion.sae * sae_logits + fusion.dense * dense
        logits[held] = np.stack([fused, dense, sae_logits], axis=-1)
    progress(len(folds), len(folds))
    return text_scores(logits, texts.starts, [aggregate] * len(plans))
