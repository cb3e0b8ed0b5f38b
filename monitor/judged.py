"""What a policy says of a trace: the server's own evidence and policy, run over kept logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from monitor.evidence import Evidence, turns
from monitor.policy import Policy
from monitor.records import Stage, Verdict
from monitor.served import Served
from monitor.traces import Trace
from sae_core.aggregation import AggregateState


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One text's decision, without what only a reply needs."""

    verdict: Verdict
    overall: tuple[float, float, float]
    """fused, dense, sae on the policy's scale, 0 at flag and 1 at alert; NaN where none is."""
    scores: NDArray[np.float64]
    """[n_clusters, 3]: aggregated logits; NaN where the cluster does not look at the stage."""
    peaks: NDArray[np.float64]
    """[n_clusters, 3]: the largest score that thresholds act on; NaN likewise."""
    verdicts: tuple[Verdict, ...]
    """One per cluster."""
    n_scored: int
    """Tokens that count."""
    flagged_at: int | None
    """Scored tokens up to and with the one that flagged; None where none did."""
    alerted_at: int | None


def judge(served: Served, policy: Policy, trace: Trace, stages: tuple[Stage, ...] = ()) -> Judged:
    """The decision on a trace, as the pipeline makes it of the same logits.

    Args:
        stages: count tokens of these stages only; none means all. For a completion that was read
            after its prompt, whose label says nothing of the prompt.
    """
    kept = [s if not stages or s in stages else None for s in trace.stages]
    evidence = Evidence(served.plan, policy)
    n = len(kept)
    crossings = evidence.add(trace.token_ids, kept, trace.logits, np.zeros((n, 0), np.float32))
    crossings += evidence.close()
    judgement, _ = evidence.judge()
    results = evidence.results()
    scored = np.flatnonzero([s is not None for s in kept])
    flagged = [r.first_crossing for r in results if r.first_crossing is not None]
    alerted = [c.position for c in crossings if c.position is not None]

    def ordinal(positions: list[int]) -> int | None:
        return int(np.searchsorted(scored, min(positions), side="right")) if positions else None

    overall = judgement.overall
    return Judged(
        verdict=judgement.verdict,
        overall=(overall.fused, overall.dense, overall.sae),
        scores=np.array([[r.fused, r.dense, r.sae] for r in results]),
        peaks=_peaks(served, trace, kept),
        verdicts=tuple(r.verdict for r in results),
        n_scored=len(scored),
        flagged_at=ordinal(flagged),
        alerted_at=ordinal(alerted),
    )


def _peaks(served: Served, trace: Trace, kept: list[Stage | None]) -> NDArray[np.float64]:
    plan = served.plan
    peaks = np.full((plan.n_clusters, 3), np.nan)
    states: dict[Stage, AggregateState] = {}
    for stage, rows in turns(kept):
        state = states.setdefault(stage, plan.aggregator.start())
        running = plan.aggregator.update(state, trace.logits[rows])
        highest = np.fmax(running.max(axis=0), plan.aggregator.score(state))
        for index, cluster in enumerate(plan.spec.clusters):
            if stage in cluster.stages:
                peaks[index] = np.fmax(peaks[index], highest[index])
    return peaks
