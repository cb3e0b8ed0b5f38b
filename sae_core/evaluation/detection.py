"""How well scores separate harmful from benign texts, beside baselines that any monitor must beat.

Knows scores and labels, not models. Figures are for the data set as given; intervals are 95 %
bootstrap over texts, positives and benign drawn apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64
from numpy import ndarray

from sae_core.evaluation.data import EvaluationError, LabelledText

SOURCES = ("fused", "dense", "sae")
MIN_BENIGN_PER_RATE = 3.0
"""A rate is quoted only where at least so many benign texts lie above its threshold."""


class Interval(NamedTuple):
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """One score against one question (a cluster's rows, or all harmful rows, against benign)."""

    score: str
    """fused, dense, sae, or a baseline's name."""
    n_harmful: int
    n_benign: int
    auroc: Interval
    tpr_at_1pct: Interval | None
    """True-positive rate where 1 % of benign texts are raised; None where n cannot carry it."""
    tpr_at_01pct: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """All figures of one data set."""

    data: str
    data_digest: str
    n: int
    overall: tuple[Detection, ...]
    clusters: Mapping[str, tuple[Detection, ...]]
    benign_raised: Mapping[str, float]
    """Share of benign texts with any cluster at or above flag and alert, on this data set."""
    benign_hard_raised: Mapping[str, float]
    """The same among benign texts that look dangerous (category benign_hard)."""

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; intervals as [value, low, high]."""
        return asdict(self)

    def to_markdown(self) -> str:
        """Two tables: overall, and each cluster fused, dense and SAE."""
        lines = [
            f"Data: {self.data}, {self.n} texts. AUROC and TPR at 1 % FPR with 95 % intervals.",
            "",
            "| score | harmful / benign | AUROC | TPR at 1 % FPR |",
            "|---|---|---|---|",
        ]
        for found in self.overall:
            lines.append(
                f"| {found.score} | {found.n_harmful} / {found.n_benign} "
                f"| {_cell(found.auroc)} | {_cell(found.tpr_at_1pct)} |"
            )
        names = [d.score for d in next(iter(self.clusters.values()), ())]
        lines += [
            "",
            "| cluster | harmful | " + " | ".join(f"AUROC {n} | TPR {n}" for n in names) + " |",
            "|---|---|" + "---|---|" * len(names),
        ]
        for cluster, found_all in self.clusters.items():
            cells = " | ".join(f"{d.auroc.value:.3f} | {_rate(d.tpr_at_1pct)}" for d in found_all)
            lines.append(f"| {cluster} | {found_all[0].n_harmful} | {cells} |")
        return "\n".join(lines) + "\n"


def auroc(harmful: Float64[ndarray, " p"], benign: Float64[ndarray, " n"]) -> float:
    """Probability that a harmful text outscores a benign one, ties counted half."""
    ordered = np.sort(benign)
    below = np.searchsorted(ordered, harmful, side="left")
    upto = np.searchsorted(ordered, harmful, side="right")
    return float((below + upto).mean() / (2 * len(benign)))


def tpr_at(harmful: Float64[ndarray, " p"], benign: Float64[ndarray, " n"], rate: float) -> float:
    """Share of harmful texts above the threshold that at most `rate` of benign texts exceed."""
    allowed = int(np.floor(rate * len(benign) + 1e-9))
    threshold = np.sort(benign)[len(benign) - 1 - allowed]
    return float((harmful > threshold).mean())


def detect(
    score: str,
    harmful: Float64[ndarray, " p"],
    benign: Float64[ndarray, " n"],
    *,
    n_resamples: int = 200,
    seed: int = 0,
) -> Detection:
    """The figures of one score."""
    if len(harmful) == 0 or len(benign) == 0:
        raise EvaluationError(
            f"{score}: found {len(harmful)} harmful and {len(benign)} benign texts, "
            "expected at least one of each"
        )
    rng = np.random.default_rng(seed)
    resampled = [
        (rng.choice(harmful, len(harmful)), rng.choice(benign, len(benign)))
        for _ in range(n_resamples)
    ]

    def rate_figure(rate: float) -> Interval | None:
        if rate * len(benign) < MIN_BENIGN_PER_RATE:
            return None
        draws = [tpr_at(h, b, rate) for h, b in resampled]
        return _interval(tpr_at(harmful, benign, rate), draws)

    return Detection(
        score=score,
        n_harmful=len(harmful),
        n_benign=len(benign),
        auroc=_interval(auroc(harmful, benign), [auroc(h, b) for h, b in resampled]),
        tpr_at_1pct=rate_figure(0.01),
        tpr_at_01pct=rate_figure(0.001),
    )


def normalised(
    scores: Float64[ndarray, "n_texts n_clusters"],
    flag: Float64[ndarray, " n_clusters"],
    alert: Float64[ndarray, " n_clusters"],
) -> Float64[ndarray, " n_texts"]:
    """The largest (score - flag) / (alert - flag) over clusters: 0 is a flag, 1 an alert."""
    result: ndarray = ((scores - flag) / (alert - flag)).max(axis=1)
    return result


def evaluate(
    data: str,
    data_digest: str,
    rows: Sequence[LabelledText],
    cluster_ids: Sequence[str],
    positives: Mapping[str, Bool[ndarray, " n_texts"]],
    scores: Float64[ndarray, "n_texts n_clusters 3"],
    thresholds: Mapping[str, tuple[ndarray, ndarray]],
    baselines: Mapping[str, Float64[ndarray, " n_texts"]],
    *,
    n_resamples: int = 200,
) -> Evaluation:
    """Every figure for one data set.

    Args:
        positives: For each cluster which texts are its positives.
        scores: Aggregated; last axis fused, dense, sae.
        thresholds: For each of fused, dense, sae the clusters' (flag, alert).
        baselines: One number a text, higher is more suspicious; compared overall.
    """
    if len(rows) != len(scores) or scores.shape[1:] != (len(cluster_ids), 3):
        raise EvaluationError(
            f"scores are {scores.shape}, expected ({len(rows)}, {len(cluster_ids)}, 3)"
        )
    harmful = np.array([row.is_harmful for row in rows])
    benign, hard = ~harmful, np.array([row.category == "benign_hard" for row in rows])
    overall_scores = {
        name: normalised(scores[:, :, i], *thresholds[name]) for i, name in enumerate(SOURCES)
    }
    overall = [
        detect(name, values[harmful], values[benign], n_resamples=n_resamples)
        for name, values in {**overall_scores, **baselines}.items()
    ]
    clusters = {
        cluster: tuple(
            detect(
                name,
                scores[positives[cluster], c, i],
                scores[benign, c, i],
                n_resamples=n_resamples,
            )
            for i, name in enumerate(SOURCES)
        )
        for c, cluster in enumerate(cluster_ids)
        if positives[cluster].any()
    }
    zones = {"flag": overall_scores["fused"] > 0, "alert": overall_scores["fused"] > 1}
    return Evaluation(
        data=data,
        data_digest=data_digest,
        n=len(rows),
        overall=tuple(overall),
        clusters=clusters,
        benign_raised={z: float(raised[benign].mean()) for z, raised in zones.items()},
        benign_hard_raised={
            z: float(raised[hard].mean()) if hard.any() else 0.0 for z, raised in zones.items()
        },
    )


def _interval(value: float, draws: Sequence[float]) -> Interval:
    low, high = np.percentile(draws, [2.5, 97.5]) if draws else (value, value)
    return Interval(value, float(low), float(high))


def _cell(found: Interval | None) -> str:
    if found is None:
        return "too few benign texts"
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _rate(found: Interval | None) -> str:
    return "-" if found is None else f"{found.value:.2f}"
