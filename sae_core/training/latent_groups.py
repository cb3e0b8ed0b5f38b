"""Latents that belong together: like decoder directions, or firing in the same texts."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float32
from numpy import ndarray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components


def group_latents(
    directions: Float32[ndarray, "n_latents d_in"] | None,
    fires: Bool[ndarray, "n_texts n_latents"],
    *,
    min_cosine: float = 0.6,
    min_overlap: float = 0.5,
) -> tuple[tuple[int, ...], ...]:
    """Columns in groups, each ascending, the groups by their first column.

    Two latents are linked where their decoder directions have a cosine of `min_cosine`, or where
    the texts in which both fire are `min_overlap` of those in which either does; a group is what
    links connect. Without `directions` (an SAE that has no decoder) firing alone decides.
    """
    active = fires.astype(np.float32)
    both = active.T @ active
    either = np.diag(both)[:, None] + np.diag(both)[None, :] - both
    linked = both >= min_overlap * np.maximum(either, 1.0)
    if directions is not None:
        unit = directions / np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-12)
        linked |= unit @ unit.T >= min_cosine
    n_groups, group_of = connected_components(csr_array(linked), directed=False)
    groups = [tuple(np.flatnonzero(group_of == g).tolist()) for g in range(n_groups)]
    return tuple(sorted(groups))
