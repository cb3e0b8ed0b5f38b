"""Judges what the canaries scored: verdicts, scores and latents against what is expected.

Knows no engine and no clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from monitor.canary_spec import (
    TOLERANCES,
    Canary,
    CanaryExpectation,
    ExpectedLatent,
    ExpectedScore,
)
from monitor.records import ClusterResult, Verdict
from monitor.served import Served

LATENT_FACTOR = 2.0
"""Times or parts of a latent's expected activation that it may have over all canaries: one token
that crosses a threshold or not is rounding, half of the activation is not."""
LEAST_FIRINGS = 3
"""Tokens on which a latent must have fired to be held to that."""
SOURCES = ("fused", "dense", "sae")


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryScores:
    """What one canary gave."""

    canary: Canary
    clusters: tuple[ClusterResult, ...]
    """In bundle order; empty where it could not be scored."""
    totals: NDArray[np.float64]
    """[n_registered_latents]: sums of activations over its tokens."""
    firings: NDArray[np.int64]
    """[n_registered_latents]: tokens on which each was active."""
    failure: str = ""
    """Why it could not be scored."""


@dataclass(slots=True)
class ClusterReport:
    """How one cluster fared on the canaries."""

    deviation: float = 0.0
    """The farthest that a score lay from what is expected, in tolerances; above 1 fails."""
    problems: list[str] = field(default_factory=list)
    """One clause each; empty where it passed."""

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def judge_canaries(served: Served, scored: Sequence[CanaryScores]) -> dict[str, ClusterReport]:
    """One report for each cluster, in bundle order.

    A benign canary that raises a cluster speaks against that cluster; a harmful one that is not
    raised against the cluster it names; scores against their own; a latent against every cluster
    that reads it.
    """
    reports = {cluster.id: ClusterReport() for cluster in served.bundle.spec.clusters}
    expected = served.bundle.canary_expectation
    for one in scored:
        if one.failure:
            for report in reports.values():
                report.problems.append(f"{one.canary.id} could not be scored: {one.failure}")
            continue
        for result in one.clusters:
            problem = _verdict_problem(one.canary, result)
            if problem:
                reports[result.cluster].problems.append(problem)
            if expected is not None:
                wanted = expected.scores.get(one.canary.id, {}).get(result.cluster)
                report, dtype = reports[result.cluster], served.provenance.dtype
                tolerance = expected.tolerance.get(dtype, TOLERANCES[dtype])
                _compare(report, one.canary.id, result, wanted, tolerance)
    whole = bool(scored) and not any(one.failure for one in scored)
    if expected is not None and whole:
        _compare_latents(served, scored, expected, reports)
    return reports


def expectation_of(
    served: Served, scored: Sequence[CanaryScores], measured_on: Mapping[str, object]
) -> CanaryExpectation:
    """What these scores are from now on to be met by."""
    totals, firings = _sums(scored)
    latents = {
        sae: {
            latent: ExpectedLatent(total=float(f"{totals[i]:.6g}"), firings=int(firings[i]))
            for latent, i in columns.items()
        }
        for sae, columns in _columns(served).items()
    }
    return CanaryExpectation(
        schema=1,
        measured_on=measured_on,
        tolerance=TOLERANCES,
        scores={
            one.canary.id: {
                result.cluster: ExpectedScore(
                    fused=_number(result.fused),
                    dense=_number(result.dense),
                    sae=_number(result.sae),
                )
                for result in one.clusters
            }
            for one in scored
        },
        latents=latents,
    )


def n_held(expectation: CanaryExpectation) -> tuple[int, int]:
    """Registered latents that fire often enough on the canaries to be held, and all of them."""
    every = [latent for some in expectation.latents.values() for latent in some.values()]
    return sum(latent.firings >= LEAST_FIRINGS for latent in every), len(every)


def _verdict_problem(canary: Canary, result: ClusterResult) -> str:
    found = f"{canary.id} gets {result.verdict} at {result.fused:.4g}"
    if canary.verdict is Verdict.PASS and result.verdict is not Verdict.PASS:
        return f"{found}, expected pass"
    if canary.cluster == result.cluster and result.verdict.rank < canary.verdict.rank:
        return f"{found}, expected {canary.verdict}"
    return ""


def _compare(
    report: ClusterReport,
    canary: str,
    result: ClusterResult,
    wanted: ExpectedScore | None,
    tolerance: float,
) -> None:
    if wanted is None:
        report.problems.append(f"{canary} was never measured (`sae-monitor bundle measure`)")
        return
    for source in SOURCES:
        found = _number(getattr(result, source))
        expected = getattr(wanted, source)
        if found is None or expected is None:
            if found is not expected:
                report.problems.append(
                    f"{source} score on {canary} is {found}, expected {expected}"
                )
            continue
        deviation = abs(found - expected) / (tolerance * max(1.0, abs(expected)))
        report.deviation = max(report.deviation, deviation)
        if deviation > 1:
            allowed = tolerance * max(1.0, abs(expected))
            report.problems.append(
                f"{source} score on {canary} is {found:.4g}, expected {expected:.4g} "
                f"within {allowed:.2g}"
            )


def _compare_latents(
    served: Served,
    scored: Sequence[CanaryScores],
    expected: CanaryExpectation,
    reports: Mapping[str, ClusterReport],
) -> None:
    totals, _ = _sums(scored)
    columns = _columns(served)
    for cluster in served.bundle.spec.clusters:
        for term in cluster.latents:
            wanted = expected.latents.get(term.sae, {}).get(term.id)
            if wanted is None or wanted.firings < LEAST_FIRINGS:
                continue
            found = float(totals[columns[term.sae][term.id]])
            if not wanted.total / LATENT_FACTOR <= found <= wanted.total * LATENT_FACTOR:
                reports[cluster.id].problems.append(
                    f"latent {term.id} of SAE {term.sae} has {found:.4g} in all on the canaries, "
                    f"expected about {wanted.total:.4g}"
                )


def _columns(served: Served) -> dict[str, dict[int, int]]:
    """By SAE and latent id: its place among the registered latents."""
    columns: dict[str, dict[int, int]] = {}
    start = 0
    for sae in served.scorer.heads.sae_ids:
        ids = [int(i) for i in served.scorer.heads.latent_ids[sae]]
        columns[sae] = {latent: start + i for i, latent in enumerate(ids)}
        start += len(ids)
    return columns


def _sums(scored: Sequence[CanaryScores]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    totals = np.sum([one.totals for one in scored], axis=0)
    return totals, np.sum([one.firings for one in scored], axis=0)


def _number(value: float) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) else None
