"""Does a latent speak of the risk, or of something that goes with it in these texts?

Three suspects, each a way in which a contrast of labelled texts deceives: one data set's manner of
writing, the length of the texts, and words that any list has. A latent that loses half of its
contrast when a suspect is taken away is flagged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from numpy import ndarray

from sae_core.evaluation.baselines import KEYWORDS
from sae_core.evaluation.data import LabelledText
from sae_core.training.discovery import benign_ranks

Flag = Literal["data_set", "length", "keyword"]
LEAST_KEPT = 0.5
"""Share of a contrast (AUROC above one half) that must remain."""
LENGTH_BINS = 10
MIN_BIN_TEXTS = 3
"""Of each label, for a tenth of the lengths to be compared."""
LEAST_AGREEMENT = 0.6
"""Share of the data sets in which a latent must point the right way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditData:
    """What the audit knows of the texts: of the risk and benign ones, others left out."""

    positive: Bool[ndarray, " n_texts"]
    """Texts of the risk; all others are benign."""
    sources: tuple[str, ...]
    n_tokens: Int64[ndarray, " n_texts"]
    has_keyword: Bool[ndarray, " n_texts"]
    min_source_texts: int = 8
    """Texts that a data set needs to be looked at alone."""


def audit_data(
    rows: Sequence[LabelledText],
    positive: Bool[ndarray, " n_texts"],
    n_tokens: Int64[ndarray, " n_texts"],
    *,
    min_source_texts: int = 8,
) -> AuditData:
    """The texts' facts; `rows` are those of the risk and benign ones."""
    return AuditData(
        positive=positive,
        sources=tuple(row.source for row in rows),
        n_tokens=n_tokens,
        has_keyword=np.array([KEYWORDS.search(row.text) is not None for row in rows]),
        min_source_texts=min_source_texts,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAudit:
    """What remains of one latent's AUROC when a suspect is taken away."""

    auroc: float
    left_out: float
    """The lowest with one data set left out, of either label."""
    left_out_source: str
    """That data set; empty where there is none to leave out."""
    n_agree: int
    """Data sets of the risk whose own AUROC against all benign texts is above one half."""
    n_sources: int
    """Data sets of the risk with enough texts to tell."""
    like_length: float | None
    """Between texts of like length; None where no harmful text is as long as a benign one."""
    without_keywords: float | None
    """Among texts in which no keyword occurs; None where these are too few."""
    flags: tuple[Flag, ...]


def audit_latents(
    mean_acts: Float32[ndarray, "n_texts n_latents"], data: AuditData
) -> tuple[LatentAudit, ...]:
    """One audit a column of `mean_acts`."""
    positive = data.positive
    ranks = benign_ranks(mean_acts, ~positive)
    auroc = ranks[positive].mean(axis=0, dtype=np.float64)
    like_length = _among_like_lengths(mean_acts, data)
    plain = ~data.has_keyword
    n_plain = (int((plain & positive).sum()), int((plain & ~positive).sum()))
    enough = min(n_plain) >= data.min_source_texts
    without_keywords = _ranked(mean_acts[plain], positive[plain]) if enough else None
    left_out, names = _leave_one_out(mean_acts, data)
    n_agree, n_sources = _agreement(ranks, data)
    audits = []
    for i in range(mean_acts.shape[1]):
        least = 0.5 + LEAST_KEPT * (auroc[i] - 0.5)
        lonely = n_sources > 1 and n_agree[i] < LEAST_AGREEMENT * n_sources
        keywords = None if without_keywords is None else float(without_keywords[i])
        flags: list[Flag] = []
        if lonely or left_out[i] < least:
            flags.append("data_set")
        length = None if like_length is None else float(like_length[i])
        if length is not None and length < least:
            flags.append("length")
        if keywords is not None and keywords < least:
            flags.append("keyword")
        audits.append(
            LatentAudit(
                auroc=float(auroc[i]),
                left_out=float(left_out[i]),
                left_out_source=names[i],
                n_agree=int(n_agree[i]),
                n_sources=n_sources,
                like_length=length,
                without_keywords=keywords,
                flags=tuple(flags),
            )
        )
    return tuple(audits)


def _ranked(values: ndarray, positive: ndarray) -> Float64[ndarray, " n_latents"]:
    found: ndarray = benign_ranks(values, ~positive)[positive].mean(axis=0, dtype=np.float64)
    return found


def _among_like_lengths(
    mean_acts: ndarray, data: AuditData
) -> Float64[ndarray, " n_latents"] | None:
    """AUROC between texts of like length, over tenths of the lengths; None where none compare."""
    edges = np.quantile(data.n_tokens, np.linspace(0, 1, LENGTH_BINS + 1)[1:-1])
    bin_of = np.searchsorted(edges, data.n_tokens, side="right")
    total, mass = np.zeros(mean_acts.shape[1]), 0.0
    for one in np.unique(bin_of):
        inside = bin_of == one
        n_positive = int((inside & data.positive).sum())
        n_benign = int(inside.sum()) - n_positive
        if min(n_positive, n_benign) < MIN_BIN_TEXTS:
            continue
        share = n_positive * n_benign / (n_positive + n_benign)
        total += share * _ranked(mean_acts[inside], data.positive[inside])
        mass += share
    return total / mass if mass else None


def _leave_one_out(
    mean_acts: ndarray, data: AuditData
) -> tuple[Float64[ndarray, " n_latents"], list[str]]:
    positive, sources = data.positive, np.array(data.sources)
    lowest = _ranked(mean_acts, positive)
    names = [""] * len(lowest)
    for source in np.unique(sources):
        rest = sources != source
        if not (positive[rest].any() and (~positive[rest]).any()):
            continue
        found = _ranked(mean_acts[rest], positive[rest])
        for i in np.flatnonzero(found < lowest):
            lowest[i], names[i] = found[i], str(source)
    return lowest, names


def _agreement(ranks: ndarray, data: AuditData) -> tuple[Int64[ndarray, " n_latents"], int]:
    agree, n_sources = np.zeros(ranks.shape[1], np.int64), 0
    sources = np.array(data.sources)
    for source in np.unique(sources[data.positive]):
        mine = data.positive & (sources == source)
        if mine.sum() >= data.min_source_texts:
            n_sources += 1
            agree += ranks[mine].mean(axis=0) > 0.5
    return agree, n_sources
