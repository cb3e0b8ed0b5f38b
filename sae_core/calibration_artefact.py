"""The evidence behind thresholds as JSON: what a bundle stores and a server compares with.

The claim of each zone is a sentence that has the counts in it, and uses the word "calibrated" only
where the bound lies below the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from sae_core.calibration import (
    CONFIDENCE,
    LENGTH_BUCKETS,
    Source,
    SourceCalibration,
    ZoneThresholds,
    split_texts,
    texts_needed,
    zone_of,
)

MAX_BENIGN_SCORES = 4096
"""Benign scores kept for p-values; more are thinned to evenly spaced ranks."""


def calibration_artefact(
    cluster_ids: Sequence[str],
    fused_scores: Float64[ndarray, "n_texts n_clusters"],
    calibrated: Mapping[Source, SourceCalibration],
    facts: Mapping[str, Any],
    *,
    aggregates: Sequence[Mapping[str, Any]],
    buckets: Int64[ndarray, " n_texts"] | None = None,
    confidence: float = CONFIDENCE,
) -> dict[str, Any]:
    """The evidence as JSON.

    `facts` are what the thresholds are bound to: digests of model, tokenizer, SAEs, heads and
    data, dtype, backend, date. `calibrated` at the top is the claim of the fused thresholds, both
    zones; without it `reason` says what is missing.

    Args:
        fused_scores: A cluster's NaN are texts that it does not look at.
        aggregates: Each cluster's, as bundle.yaml has it.
        buckets: The texts' length buckets, to state the rates within each.

    Rates are of the texts that set the level, `n_benign` of them; the others gave the tails.
    """
    zones = {
        source: {
            name: _zone_json(name, zone, confidence)
            for name, zone in (("flag", calibration.flag), ("alert", calibration.alert))
        }
        for source, calibration in calibrated.items()
    }
    fused = calibrated["fused"]
    proven = [zone for zone in (fused.flag, fused.alert) if zone.is_calibrated]
    clusters: dict[str, dict[str, Any]] = {}
    for index, cluster in enumerate(cluster_ids):
        known = fused_scores[:, index]
        clusters[cluster] = {
            "aggregate": dict(aggregates[index]),
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
            "benign_scores": benign_table(known[~np.isnan(known)]),
        }
    artefact: dict[str, Any] = {"schema": 2, **facts, "calibrated": len(proven) == 2}
    if len(proven) < 2:
        missing = "flag" if not fused.flag.is_calibrated else "alert"
        artefact["reason"] = zones["fused"][missing]["claim"]
    artefact["policy"] = zones
    if fused.escalated is not None:
        artefact["escalate"] = {**fused.escalated._asdict(), "confidence": confidence}
    if buckets is not None:
        level = split_texts(len(fused_scores))[1]
        artefact["length_buckets"] = _bucket_json(
            fused_scores[level], fused, buckets[level], confidence
        )
    return {**artefact, "clusters": clusters}


def _bucket_json(
    scores: Float64[ndarray, "n_texts n_clusters"],
    fused: SourceCalibration,
    buckets: Int64[ndarray, " n_texts"],
    confidence: float,
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for index, name in enumerate(LENGTH_BUCKETS):
        rows = scores[buckets == index]
        if len(rows):
            found[name] = {
                zone: _zone_json(
                    zone, zone_of(rows, wanted.thresholds, wanted.target, confidence), confidence
                )
                for zone, wanted in (("flag", fused.flag), ("alert", fused.alert))
            }
    return found


def _zone_json(name: str, zone: ZoneThresholds, confidence: float) -> dict[str, Any]:
    return {
        "target": zone.target,
        "n_benign": zone.n,
        "n_false_positive": zone.n_false_positive,
        "achieved": zone.achieved,
        "upper_bound": zone.bound,
        "confidence": confidence,
        "calibrated": zone.is_calibrated,
        "claim": _claim(name, zone, confidence),
    }


def _claim(name: str, zone: ZoneThresholds, confidence: float) -> str:
    rates = f"{zone.n_false_positive} of {zone.n} benign texts ({zone.achieved:.2%})"
    if zone.is_calibrated:
        return (
            f"calibrated: {name} raised by any cluster on {rates}; "
            f"below {zone.bound:.2%} with {confidence:.0%} confidence (target {zone.target:.2%})"
        )
    return (
        f"too few benign texts to prove {zone.target:.2%}: {name} raised on {rates}, bound "
        f"{zone.bound:.2%}; at least {texts_needed(zone.target, confidence)} texts are needed, a "
        "third of which give the tails"
    )


def benign_table(scores: Float64[ndarray, " n"]) -> list[float]:
    """Benign scores, sorted, for p-values."""
    ordered = np.sort(scores)
    if len(ordered) > MAX_BENIGN_SCORES:
        ranks = np.linspace(0, len(ordered) - 1, MAX_BENIGN_SCORES)
        ordered = ordered[np.round(ranks).astype(int)]
    return [round(float(score), 5) for score in ordered]
