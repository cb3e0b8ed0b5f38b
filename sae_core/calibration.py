"""Thresholds from benign texts, with a bound on the false-positive rate of all clusters together.

The number of benign texts that any cluster would raise keeps the one-sided 95 % Clopper-Pearson
bound below the target, and the clusters share that number evenly. Where the texts are too few for
that even with none raised, the thresholds are set above every benign score and the word
"calibrated" is withheld. Knows scores, not models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from scipy.stats import beta

from sae_core.errors import SAECoreError

CONFIDENCE = 0.95
STEP = 1e-5
"""Thresholds are multiples of this, at least one step above the benign score they rest on."""
MAX_BENIGN_SCORES = 4096
"""Benign scores kept for p-values; more are thinned to evenly spaced ranks."""


class CalibrationError(SAECoreError):
    """Scores that cannot be calibrated: too few, not finite, or targets that contradict."""


def upper_bound(n_positive: int, n: int, confidence: float = CONFIDENCE) -> float:
    """One-sided Clopper-Pearson bound: the rate is below it with this confidence."""
    if not 0 <= n_positive <= n or n < 1:
        raise CalibrationError(f"found {n_positive} of {n}, expected 0 <= positives <= n, n >= 1")
    if n_positive == n:
        return 1.0
    return float(beta.ppf(confidence, n_positive + 1, n - n_positive))


def most_allowed(n: int, target: float, confidence: float = CONFIDENCE) -> int:
    """Most false positives among `n` texts that still prove a rate below `target`; -1 if none."""
    allowed = -1
    while allowed + 1 < n and upper_bound(allowed + 1, n, confidence) < target:
        allowed += 1
    return allowed


def texts_needed(target: float, confidence: float = CONFIDENCE) -> int:
    """Fewest benign texts that can prove `target`, if none of them is raised."""
    return int(np.ceil(np.log(1 - confidence) / np.log(1 - target)))


class ZoneThresholds(NamedTuple):
    """One zone's thresholds (flag or alert) and what they were shown to keep."""

    thresholds: Float64[ndarray, " n_clusters"]
    """A score at or above its cluster's threshold is in the zone."""
    target: float
    n: int
    n_false_positive: int
    """Benign texts that at least one cluster would raise."""
    achieved: float
    bound: float
    """Upper 95 % bound of the policy's false-positive rate."""
    spend: Float64[ndarray, " n_clusters"]
    """Each cluster's own false-positive rate."""
    is_calibrated: bool
    """Whether `bound` is below `target`."""


def zone_thresholds(
    scores: Float64[ndarray, "n_texts n_clusters"],
    target: float,
    *,
    confidence: float = CONFIDENCE,
) -> ZoneThresholds:
    """Thresholds for which the benign texts that any cluster raises prove `target`.

    All clusters get the same share of the benign tail, as large as the bound allows; texts that
    the bound leaves over go where they lower a threshold most. Every threshold then lies just
    above the highest benign score that is not given up.
    """
    _check(scores)
    if not 0 < target < 1:
        raise CalibrationError(f"target is {target}, expected a rate between 0 and 1")
    n = len(scores)
    allowed = most_allowed(n, target, confidence)
    ordered = np.sort(scores, axis=0)[::-1]
    raised: ndarray = np.zeros(n, np.bool_)
    for tail in range(1, n):  # each cluster may raise its `tail` largest benign scores
        more = np.any(scores >= _just_above(ordered[tail]), axis=1)
        if int(more.sum()) > allowed:
            break
        raised = more
    spread = np.maximum(ordered[0] - np.median(scores, axis=0), STEP)
    while int(raised.sum()) < allowed:  # then the text that lets one cluster gain most
        rest = np.flatnonzero(~raised)
        top_two = np.sort(scores[rest], axis=0)[-2:]
        cluster = int(np.argmax((top_two[1] - top_two[0]) / spread))
        raised[rest[np.argmax(scores[rest, cluster])]] = True
    thresholds = _just_above(scores[~raised].max(axis=0))
    n_false = int((scores >= thresholds).any(axis=1).sum())
    bound = upper_bound(n_false, n, confidence)
    return ZoneThresholds(
        thresholds=thresholds,
        target=target,
        n=n,
        n_false_positive=n_false,
        achieved=n_false / n,
        bound=bound,
        spend=(scores >= thresholds).mean(axis=0),
        is_calibrated=allowed >= 0 and bound < target,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCalibration:
    """Thresholds of every cluster for one score source."""

    flag: ZoneThresholds
    alert: ZoneThresholds
    clear: Float64[ndarray, " n_clusters"]
    """Below flag by a tenth of the way from the median benign score: hysteresis for streams."""


def calibrate_source(
    scores: Float64[ndarray, "n_texts n_clusters"],
    *,
    flag_target: float = 0.05,
    alert_target: float = 0.01,
) -> SourceCalibration:
    """Flag and alert thresholds of one source; alert is above flag for every cluster."""
    if not alert_target < flag_target:
        raise CalibrationError(f"alert target is {alert_target}, expected below {flag_target}")
    flag = zone_thresholds(scores, flag_target)
    alert = zone_thresholds(scores, alert_target)
    spread = flag.thresholds - np.median(scores, axis=0)
    least = _just_above(flag.thresholds + np.maximum(1e-3, 0.02 * spread))
    alert = alert._replace(thresholds=np.maximum(alert.thresholds, least))
    clear = np.minimum(_just_above(flag.thresholds - 0.1 * spread), flag.thresholds)
    return SourceCalibration(flag=flag, alert=alert, clear=clear)


Source = Literal["fused", "dense", "sae"]


def calibration_artefact(
    cluster_ids: Sequence[str],
    fused_scores: Float64[ndarray, "n_texts n_clusters"],
    calibrated: Mapping[Source, SourceCalibration],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The evidence as JSON.

    `facts` are what the thresholds are bound to: digests of model, tokenizer, SAE, heads and
    data, hook point, dtype, backend, aggregator, date. `calibrated` at the top is the claim of
    the fused thresholds, both zones; without it `reason` says what is missing.
    """
    zones = {
        source: {
            name: {
                "target": zone.target,
                "n_benign": zone.n,
                "n_false_positive": zone.n_false_positive,
                "achieved": zone.achieved,
                "upper_bound": zone.bound,
                "confidence": CONFIDENCE,
                "calibrated": zone.is_calibrated,
                "claim": _claim(name, zone),
            }
            for name, zone in (("flag", calibration.flag), ("alert", calibration.alert))
        }
        for source, calibration in calibrated.items()
    }
    fused = calibrated["fused"]
    proven = [zone for zone in (fused.flag, fused.alert) if zone.is_calibrated]
    clusters: dict[str, dict[str, Any]] = {}
    for index, cluster in enumerate(cluster_ids):
        clusters[cluster] = {
            "thresholds": {
                "flag": float(fused.flag.thresholds[index]),
                "alert": float(fused.alert.thresholds[index]),
                "clear": float(fused.clear[index]),
            },
            "solo": {
                source: {
                    "flag": float(calibration.flag.thresholds[index]),
                    "alert": float(calibration.alert.thresholds[index]),
                }
                for source, calibration in calibrated.items()
                if source != "fused"
            },
            "spend": {
                "flag": float(fused.flag.spend[index]),
                "alert": float(fused.alert.spend[index]),
            },
            "benign_scores": benign_table(fused_scores[:, index]),
        }
    artefact: dict[str, Any] = {"schema": 1, **facts, "calibrated": len(proven) == 2}
    if len(proven) < 2:
        artefact["reason"] = zones["fused"]["alert"]["claim"]
    return {**artefact, "policy": zones, "clusters": clusters}


def _claim(name: str, zone: ZoneThresholds) -> str:
    rates = f"{zone.n_false_positive} of {zone.n} benign texts ({zone.achieved:.2%})"
    if zone.is_calibrated:
        return (
            f"calibrated: {name} raised by any cluster on {rates}; "
            f"below {zone.bound:.2%} with {CONFIDENCE:.0%} confidence (target {zone.target:.2%})"
        )
    return (
        f"too few benign texts to prove {zone.target:.2%}: {name} raised on {rates}, bound "
        f"{zone.bound:.2%}; at least {texts_needed(zone.target)} texts are needed"
    )


def benign_table(scores: Float64[ndarray, " n"]) -> list[float]:
    """Benign scores, sorted, for p-values."""
    ordered = np.sort(scores)
    if len(ordered) > MAX_BENIGN_SCORES:
        ranks = np.linspace(0, len(ordered) - 1, MAX_BENIGN_SCORES)
        ordered = ordered[np.round(ranks).astype(int)]
    return [round(float(score), 5) for score in ordered]


def _just_above(scores: Float64[ndarray, " n"]) -> Float64[ndarray, " n"]:
    steps: ndarray = np.floor(scores / STEP) + 1.5  # at least half a step above
    above: ndarray = np.round(np.ceil(steps) * STEP, 5)
    return above


def _check(scores: ndarray) -> None:
    if scores.ndim != 2 or len(scores) < 2 or scores.shape[1] < 1:
        raise CalibrationError(f"scores are {scores.shape}, expected (n >= 2, n_clusters >= 1)")
    if not np.isfinite(scores).all():
        text, cluster = np.argwhere(~np.isfinite(scores))[0]
        found = scores[text, cluster]
        raise CalibrationError(f"score of text {text}, cluster {cluster} is {found}, not finite")
