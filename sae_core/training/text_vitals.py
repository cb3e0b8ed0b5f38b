"""What labelled texts do to SAEs and their registered latents, as the service measures it live."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Int64
from numpy import ndarray

from sae_core.hook_points import parse_hook_point
from sae_core.live_fit import LiveFit
from sae_core.training.dictionary import Dictionary, Streams, shared
from sae_core.vitals import TextVitals


def text_vitals(
    streams: Streams,
    chosen: Int64[ndarray, " n"],
    dictionary: Dictionary,
    latent_ids: Mapping[str, Sequence[int]],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[TextVitals]:
    """Of each chosen text that has tokens: its registered latents, and the fit of the whole SAEs.

    Args:
        latent_ids: By SAE the registered latents, in the order of the heads.
        progress: Texts done, and all of them.
    """
    points = {one.id: parse_hook_point(one.hook_point) for one in dictionary.saes}
    encoders = [(one.id, one.sae.slice(latent_ids[one.id])) for one in dictionary.saes]
    fit = LiveFit({one.id: (points[one.id], None, one.sae) for one in dictionary.saes})
    found = []
    for n_done, index in enumerate(chosen.tolist(), 1):
        rows = shared(streams).rows_of(index)
        progress(n_done, len(chosen))
        if rows.start == rows.stop:
            continue
        resid = {
            points[one.id]: torch.from_numpy(np.array(streams[one.hook_point].resid[rows]))
            for one in dictionary.saes
        }
        with torch.inference_mode():
            acts = np.concatenate(
                [encode(resid[points[sae_id]]).numpy() for sae_id, encode in encoders], axis=1
            )
        found.append(
            TextVitals(
                n_tokens=len(acts),
                firings=np.count_nonzero(acts, axis=0).astype(np.int64),
                totals=acts.sum(axis=0, dtype=np.float64),
                fits=fit(resid, 1),  # its first token is not in the set
            )
        )
    return found
