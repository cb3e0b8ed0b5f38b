"""What labelled texts do to the SAE and its registered latents, as the service measures it live."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Int64
from numpy import ndarray

from sae_core.hook_points import parse_hook_point
from sae_core.live_fit import LiveFit
from sae_core.sae import SAE
from sae_core.training.examples import ResidualSet
from sae_core.vitals import TextVitals


def text_vitals(
    texts: ResidualSet,
    chosen: Int64[ndarray, " n"],
    sae_id: str,
    sae: SAE,
    hook_point: str,
    latent_ids: Sequence[int],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[TextVitals]:
    """Of each chosen text that has tokens: its registered latents, and the fit of the whole SAE.

    Args:
        latent_ids: The registered latents, in the order of the heads.
        progress: Texts done, and all of them.
    """
    point = parse_hook_point(hook_point)
    encode, fit = sae.slice(latent_ids), LiveFit({sae_id: (point, None, sae)})
    found = []
    for n_done, index in enumerate(chosen.tolist(), 1):
        resid = torch.from_numpy(np.array(texts.resid[texts.rows_of(index)]))
        progress(n_done, len(chosen))
        if not len(resid):
            continue
        with torch.inference_mode():
            acts = encode(resid).numpy()
        found.append(
            TextVitals(
                n_tokens=len(acts),
                firings=np.count_nonzero(acts, axis=0).astype(np.int64),
                totals=acts.sum(axis=0, dtype=np.float64),
                fits=fit({point: resid}, 1),  # its first token is not in the set
            )
        )
    return found
