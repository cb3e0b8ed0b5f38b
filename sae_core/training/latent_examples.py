"""Where a latent is strongest: one excerpt a text, around the token of its largest activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from sae_core.evaluation.data import LabelledText
from sae_core.training.examples import ResidualSet


class Example(NamedTuple):
    """An excerpt of a text in which a latent fires."""

    before: str
    token: str
    """The token of the largest activation."""
    after: str
    act: float
    is_harmful: bool
    source: str


def strongest_examples(
    acts: Float32[ndarray, " total"],
    texts: ResidualSet,
    rows: Sequence[LabelledText],
    token_texts: Callable[[Sequence[int]], list[str]],
    *,
    n_examples: int = 6,
    n_around: int = 12,
) -> tuple[Example, ...]:
    """The texts in which one latent is strongest, the strongest first.

    Args:
        acts: The latent's activation on every token of `texts`.
        token_texts: Token ids to the text of each.
        n_around: Tokens shown on either side.
    """
    found = []
    lengths = np.diff(texts.starts)
    full = np.flatnonzero(lengths > 0)
    peaks = np.zeros(len(texts), acts.dtype)
    if len(full):
        peaks[full] = np.maximum.reduceat(acts, texts.starts[:-1][full])
    for text in np.argsort(-peaks, kind="stable")[:n_examples]:
        if peaks[text] <= 0:
            break
        part = texts.rows_of(int(text))
        at = int(np.argmax(acts[part]))
        first = max(0, at - n_around)
        ids = texts.token_ids[part][first : at + n_around + 1].tolist()
        pieces = token_texts(ids)
        row = rows[int(text)]
        found.append(
            Example(
                before="".join(pieces[: at - first]),
                token=pieces[at - first],
                after="".join(pieces[at - first + 1 :]),
                act=float(peaks[text]),
                is_harmful=row.is_harmful,
                source=row.source,
            )
        )
    return tuple(found)
