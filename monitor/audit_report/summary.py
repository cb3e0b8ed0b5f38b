"""What a report counts, one decision after the other."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from monitor.records import Severity, Verdict

MAX_BINS = 48
"""Of time."""
SCORE_STEP = 0.05
"""Logits; scores are counted in steps of it."""
_SECOND = 1_000_000
_WIDTHS = [_SECOND * s for s in (1, 10, 60, 300, 900, 3600, 3 * 3600, 6 * 3600, 12 * 3600)]
_DAY = 86_400 * _SECOND


@dataclass(frozen=True, slots=True, kw_only=True)
class Bins:
    """Equal spans of time from `start_us`."""

    start_us: int
    width_us: int
    n: int

    @classmethod
    def over(cls, first_us: int, last_us: int) -> Bins:
        """The finest round width that needs at most `MAX_BINS`; from a day on whole days."""
        span = last_us - first_us
        days = max(1, math.ceil(span / _DAY / (MAX_BINS - 1)))
        width = next((w for w in _WIDTHS if span / w <= MAX_BINS - 1), days * _DAY)
        start = first_us - first_us % min(width, _DAY)
        return cls(start_us=start, width_us=width, n=(last_us - start) // width + 1)

    def of(self, time_us: int) -> int:
        """The bin of a time, the nearest where it lies outside."""
        return min(max(0, (time_us - self.start_us) // self.width_us), self.n - 1)


@dataclass(slots=True)
class LatentShare:
    """What a latent gave to the alerts of a cluster."""

    label: str
    alerts: int = 0
    contribution: float = 0.0
    """Logits, summed over the alerts."""


@dataclass(slots=True)
class ClusterCounts:
    """One cluster in all decisions that have it."""

    n_bins: int
    severity: str = Severity.INFO.value
    scored: int = 0
    """Decisions with a score of it."""
    flags: int = 0
    """Flagged or alerted."""
    alerts: int = 0
    uncalibrated: int = 0
    scores: Counter[int] = field(default_factory=Counter)
    """Steps of `SCORE_STEP` to decisions."""
    alerts_by_bin: list[int] = field(init=False)
    latents: dict[tuple[str, int], LatentShare] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.alerts_by_bin = [0] * self.n_bins


@dataclass(slots=True)
class Summary:
    """Everything counted; `add` takes a record's body."""

    bins: Bins
    decisions: int = 0
    first_time: str = ""
    last_time: str = ""
    verdicts: Counter[str] = field(default_factory=Counter)
    levels: Counter[str] = field(default_factory=Counter)
    policies: Counter[str] = field(default_factory=Counter)
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Stage and priority in the queue -> decisions; records of before are in none."""
    received: int = 0
    scored: int = 0
    unscored: Counter[str] = field(default_factory=Counter)
    not_whole: int = 0
    """Decisions with tokens that were not scored for another reason than their role."""
    by_bin: dict[str, list[int]] = field(init=False)
    """Verdict -> decisions in each bin."""
    clusters: dict[str, ClusterCounts] = field(default_factory=dict)
    rules: Counter[str] = field(default_factory=Counter)
    versions: Counter[tuple[tuple[str, str], ...]] = field(default_factory=Counter)
    """Provenance as sorted pairs -> decisions."""
    total_us: array[int] = field(default_factory=lambda: array("q"))
    latest_alerts: list[str] = field(default_factory=list)
    """Decision ids, newest last."""

    def __post_init__(self) -> None:
        self.by_bin = {verdict.value: [0] * self.bins.n for verdict in Verdict}

    def add(self, body: Mapping[str, Any]) -> None:
        """Counts one decision."""
        place = self.bins.of(body["time_us"])
        verdict = body["verdict"]
        self.decisions += 1
        self.first_time = self.first_time or body["time"]
        self.last_time = body["time"]
        self.verdicts[verdict] += 1
        self.by_bin[verdict][place] += 1
        self.levels[body["level"]] += 1
        self.policies[body["policy"]] += 1
        if "asked" in body:
            self.asked[body["asked"]["stage"], body["asked"]["priority"]] += 1
        coverage = body["coverage"]
        self.received += coverage["received"]
        self.scored += coverage["scored"]
        self.unscored.update(coverage["unscored"])
        self.not_whole += any(reason != "excluded" for reason in coverage["unscored"])
        for name, result in body["clusters"].items():
            self._add_cluster(name, result, place)
        self.rules.update(rule["rule"] for rule in body["rules"])
        self.versions[tuple(sorted(body["provenance"].items()))] += 1
        if body["timings_us"]["total"] is not None:
            self.total_us.append(body["timings_us"]["total"])
        if verdict == Verdict.ALERT.value:
            self.latest_alerts = [*self.latest_alerts[-9:], body["decision_id"]]

    def percentiles_ms(self) -> dict[str, float]:
        """Milliseconds from arrival to decision; empty where nothing was timed."""
        if not self.total_us:
            return {}
        found = np.percentile(np.asarray(self.total_us), (50, 95, 99)) / 1000
        return dict(zip(("p50", "p95", "p99"), map(float, found), strict=True))

    def _add_cluster(self, name: str, result: Mapping[str, Any], place: int) -> None:
        counts = self.clusters.get(name)
        if counts is None:
            counts = self.clusters[name] = ClusterCounts(self.bins.n)
        counts.severity = result["severity"]
        counts.uncalibrated += not result["calibrated"]
        counts.flags += result["verdict"] != Verdict.PASS.value
        if result.get("fused") is not None:
            counts.scored += 1
            counts.scores[math.floor(result["fused"] / SCORE_STEP)] += 1
        if result["verdict"] == Verdict.ALERT.value:
            counts.alerts += 1
            counts.alerts_by_bin[place] += 1
            for latent in result.get("attribution", {}).get("latents", ()):
                key = (latent["sae"], latent["latent_id"])
                share = counts.latents.setdefault(key, LatentShare(latent["label"]))
                share.alerts += 1
                share.contribution += latent["contribution"] or 0.0
