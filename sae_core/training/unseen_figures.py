"""How well heads do on data sets that they were not fitted on, beside TF-IDF in the same folds.

Intervals are bootstrap, once over texts and once over data sets (those of one origin together):
the first say how exact the figures are for these data sets, the second what others may give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray

from sae_core.evaluation.baselines import tfidf_scores
from sae_core.evaluation.comparison import Comparison, compare
from sae_core.evaluation.data import LabelledText
from sae_core.evaluation.detection import SOURCES, Interval, auroc, normalised

TFIDF = "TF-IDF + logistic regression"
PAIRS = (
    ("fused", "dense"),
    ("fused", "sae"),
    ("fused", TFIDF),
    ("dense", TFIDF),
    ("sae", TFIDF),
    ("dense", "sae"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnseenFigures:
    """Every score on data sets that it was not fitted on, folds pooled."""

    overall: Comparison
    """All harmful texts against all benign ones; intervals over texts."""
    over_data_sets: Comparison
    """The same, data sets drawn instead of texts."""
    within_folds: Mapping[str, float]
    """Mean AUROC within the folds, which no offset between folds can help or harm."""
    clusters: Mapping[str, Comparison]
    """Each cluster's positives against all benign texts, by its own score; over texts."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON; intervals as [value, low, high]."""
        return asdict(self)

    def to_markdown(self) -> str:
        """Three tables: overall, differences, and each cluster's AUROC."""
        lines = [
            "On training data sets that the heads were not fitted on (folds keep data sets of one "
            "origin whole;",
            "latents chosen within each fold): first the 95 % interval over texts, then over data "
            "sets.",
            "",
            "| score | AUROC | mean within folds | TPR at 1 % FPR |",
            "|---|---|---|---|",
        ]
        for name, own in self.overall.figures.items():
            other = self.over_data_sets.figures[name]
            lines.append(
                f"| {name} | {_cell(own.auroc, other.auroc)} | {self.within_folds[name]:.3f} "
                f"| {_cell(own.tpr_at_1pct, other.tpr_at_1pct)} |"
            )
        lines += ["", "| difference | AUROC | TPR at 1 % FPR |", "|---|---|---|"]
        for one, two in zip(self.overall.differences, self.over_data_sets.differences, strict=True):
            lines.append(
                f"| {one.score} - {one.minus} | {_cell(one.auroc, two.auroc)} "
                f"| {_cell(one.tpr_at_1pct, two.tpr_at_1pct)} |"
            )
        lines += ["", "| cluster, AUROC | " + " | ".join(SOURCES) + " |"]
        lines.append("|---|" + "---|" * len(SOURCES))
        for cluster, found in self.clusters.items():
            cells = [f"{found.figures[name].auroc.value:.3f}" for name in SOURCES]
            lines.append(f"| {cluster} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def unseen_figures(
    rows: Sequence[LabelledText],
    positives: Mapping[str, Bool[ndarray, " n_texts"]],
    scores: Float64[ndarray, "n_texts n_clusters 3"],
    thresholds: Mapping[str, tuple[ndarray, ndarray]],
    folds: Int64[ndarray, " n_texts"],
    origins: Mapping[str, str],
    *,
    n_resamples: int = 1000,
) -> UnseenFigures:
    """The figures of scores that were made without the data set of each text.

    Args:
        positives: For each cluster, in the order of the scores, which texts are its positives.
        scores: Aggregated; last axis fused, dense, sae. The fusion's three numbers a cluster may
            have been fitted on these texts, the heads not.
        thresholds: For each of fused, dense, sae the clusters' (flag, alert): their common scale.
        folds: In which each text was held out; TF-IDF is fitted on the others.
        origins: Of data sets that were made from one another: drawn together.
    """
    harmful = np.array([row.is_harmful for row in rows])
    overall = {
        name: normalised(scores[:, :, i], *thresholds[name]) for i, name in enumerate(SOURCES)
    }
    overall[TFIDF] = _tfidf(rows, folds)
    _, groups = np.unique([origins.get(r.source, r.source) for r in rows], return_inverse=True)
    clusters = {}
    for column, (cluster, positive) in enumerate(positives.items()):
        seen = positive | ~harmful
        if positive.any():
            own = {name: scores[seen, column, i] for i, name in enumerate(SOURCES)}
            clusters[cluster] = compare(own, positive[seen], n_resamples=n_resamples)
    return UnseenFigures(
        overall=compare(overall, harmful, pairs=PAIRS, n_resamples=n_resamples),
        over_data_sets=compare(
            overall, harmful, pairs=PAIRS, groups=groups, n_resamples=n_resamples
        ),
        within_folds={
            name: float(np.mean([_auroc_in(values, harmful, folds == f) for f in np.unique(folds)]))
            for name, values in overall.items()
        },
        clusters=clusters,
    )


def _auroc_in(values: ndarray, harmful: ndarray, part: ndarray) -> float:
    return auroc(values[part & harmful], values[part & ~harmful])


def _tfidf(rows: Sequence[LabelledText], folds: ndarray) -> Float64[ndarray, " n_texts"]:
    """TF-IDF with logistic regression, fitted on the other folds."""
    scores = np.empty(len(rows))
    for fold in np.unique(folds):
        train = [row for row, f in zip(rows, folds, strict=True) if f != fold]
        held = np.flatnonzero(folds == fold)
        scores[held] = tfidf_scores(train, [rows[int(i)].text for i in held])
    return scores


def _cell(over_texts: Interval | None, over_data_sets: Interval | None) -> str:
    if over_texts is None or over_data_sets is None:
        return "too few benign texts"
    value, *own = over_texts
    intervals = (f"[{low:.3f}, {high:.3f}]" for low, high in (own, over_data_sets[1:]))
    return f"{value:.3f} {', '.join(intervals)}"
