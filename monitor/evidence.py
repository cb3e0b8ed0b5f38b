"""The running evidence of one request or stream: per-token numbers in, cluster results out.

Keeps one aggregate a stage, the token logits (to explain, to go back after re-tokenisation and to
report), and the registered latents' activations in sparse form. Knows no clock and no network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from monitor.bundle_spec import BundleSpec
from monitor.coverage import StageCount
from monitor.policy import DENSE, FUSED, SAE, Crossing, Judgement, Policy, PolicyState
from monitor.records import (
    Attribution,
    ClusterResult,
    Coverage,
    LatentContribution,
    Stage,
    TokenScores,
    UnscoredReason,
    Verdict,
)
from sae_core.aggregation import AggregateSpec, AggregateState, Aggregator
from sae_core.heads import ClusterHeads

BenignP = Callable[[int, float], float | None]
"""Cluster index and fused score to the share of benign texts at least as high, if known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """What every request of one bundle shares."""

    spec: BundleSpec
    heads: ClusterHeads
    aggregator: Aggregator
    calibrated: tuple[bool, ...]
    """One per cluster."""
    benign_p: BenignP

    @property
    def n_clusters(self) -> int:
        """Clusters in bundle order."""
        return len(self.spec.clusters)


def aggregate_specs(spec: BundleSpec) -> list[AggregateSpec]:
    """The bundle's aggregates as the numbers' side takes them, in bundle order."""
    return [
        AggregateSpec(
            kind=c.aggregate.kind,
            window=c.aggregate.window,
            alpha=c.aggregate.alpha,
            min_evidence_tokens=c.aggregate.min_evidence_tokens,
            evidence_floor=c.aggregate.evidence_floor,
        )
        for c in spec.clusters
    ]


@dataclass(slots=True)
class _Block:
    """Consecutive tokens as the engine returned them."""

    start: int
    token_ids: list[int | None]
    stages: list[Stage | None]
    logits: NDArray[np.float32]
    act_rows: NDArray[np.int64]
    act_columns: NDArray[np.int64]
    act_values: NDArray[np.float32]
    unscored: UnscoredReason | None = None
    """Set where the engine never saw the block in time."""

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(slots=True)
class _StageEvidence:
    aggregate: AggregateState
    positions: list[int] = field(default_factory=list)


class Evidence:
    """One request's evidence so far. `add` in order of position, `truncate` to go back."""

    def __init__(self, plan: ClusterPlan, policy: Policy) -> None:
        self._plan = plan
        self.policy = policy
        self._blocks: list[_Block] = []
        self._stages: dict[Stage, _StageEvidence] = {}
        self._state: PolicyState = policy.start()

    @property
    def n_tokens(self) -> int:
        """Positions seen, excluded ones too."""
        return self._blocks[-1].stop if self._blocks else 0

    def coverage(self) -> Coverage:
        """Positions received, scored, and not scored by reason."""
        unscored: dict[UnscoredReason, int] = {}
        for block in self._blocks:
            excluded = block.stages.count(None)
            _count(unscored, UnscoredReason.EXCLUDED, excluded)
            if block.unscored is not None:
                _count(unscored, block.unscored, len(block.token_ids) - excluded)
        return Coverage(
            received=self.n_tokens,
            scored=sum(len(stage.positions) for stage in self._stages.values()),
            unscored=unscored,
        )

    def stage_coverage(self) -> dict[Stage, StageCount]:
        """The counts of each stage, excluded tokens left out."""
        counts: dict[Stage, StageCount] = {}
        for block in self._blocks:
            for stage in Stage:
                n = block.stages.count(stage)
                if not n:
                    continue
                count = counts.setdefault(stage, StageCount())
                count.received += n
                if block.unscored is None:
                    count.scored += n
                else:
                    _count(count.unscored, block.unscored, n)
        return counts

    def add(
        self,
        token_ids: Sequence[int | None],
        stages: Sequence[Stage | None],
        logits: NDArray[np.float32],
        latent_acts: NDArray[np.float32],
    ) -> list[Crossing]:
        """Takes the next tokens; returns the alerts that they opened.

        Args:
            token_ids: None for tokens whose ids are not known.
            stages: None for tokens that are read but not scored.
            logits: [n, n_clusters, 3].
            latent_acts: [n, n_registered].
        """
        rows, columns = np.nonzero(latent_acts)
        block = _Block(
            start=self.n_tokens,
            token_ids=list(token_ids),
            stages=list(stages),
            logits=logits,
            act_rows=rows,
            act_columns=columns,
            act_values=latent_acts[rows, columns],
        )
        self._blocks.append(block)
        return self._fold(block)

    def skip(
        self,
        token_ids: Sequence[int | None],
        stages: Sequence[Stage | None],
        reason: UnscoredReason,
    ) -> None:
        """Takes tokens that were never scored, so that later positions stay right."""
        n = len(token_ids)
        empty = np.zeros(0, np.int64)
        self._blocks.append(
            _Block(
                start=self.n_tokens,
                token_ids=list(token_ids),
                stages=list(stages),
                logits=np.full((n, self._plan.n_clusters, 3), np.nan, np.float32),
                act_rows=empty,
                act_columns=empty,
                act_values=np.zeros(0, np.float32),
                unscored=reason,
            )
        )

    def truncate(self, n_tokens: int) -> None:
        """Goes back to the first `n_tokens` positions, as if the rest had never come.

        Scores go back; a verdict that was already announced stays, and its alert with it.
        """
        kept: list[_Block] = []
        for block in self._blocks:
            if block.stop <= n_tokens:
                kept.append(block)
            elif block.start < n_tokens:
                n = n_tokens - block.start
                keep = block.act_rows < n
                kept.append(
                    _Block(
                        start=block.start,
                        token_ids=block.token_ids[:n],
                        stages=block.stages[:n],
                        logits=block.logits[:n],
                        act_rows=block.act_rows[keep],
                        act_columns=block.act_columns[keep],
                        act_values=block.act_values[keep],
                        unscored=block.unscored,
                    )
                )
        self._blocks = kept
        self._stages = {}
        for block in kept:
            if block.unscored is None:
                self._fold(block)

    def token_ids(self) -> list[int | None]:
        """Every position's id, in order; None where it is not known."""
        return [token_id for block in self._blocks for token_id in block.token_ids]

    def judge(self) -> tuple[Judgement, list[Crossing]]:
        """The policy's verdict now, and the joint rules that newly hold."""
        judgement = self.policy.judge(self._state, self._scores()[0])
        crossings = self.policy.new_rules(self._state, judgement)
        if crossings:
            judgement = self.policy.judge(self._state, self._scores()[0])
        return judgement, crossings

    def results(self, *, attribution: bool | Sequence[str] = False) -> tuple[ClusterResult, ...]:
        """Every cluster's result in bundle order.

        Args:
            attribution: explain all clusters, none, or those named.
        """
        scores, stages = self._scores()
        results = []
        for index, cluster in enumerate(self._plan.spec.clusters):
            fused, dense, sae = (float(v) for v in scores[index])
            state = self._state.clusters[index]
            wanted = attribution if isinstance(attribution, bool) else cluster.id in attribution
            results.append(
                ClusterResult(
                    cluster=cluster.id,
                    fused=fused,
                    dense=dense,
                    sae=sae,
                    verdict=state.verdict if self.policy.includes(index) else Verdict.PASS,
                    severity=cluster.severity,
                    stage=stages[index],
                    first_crossing=state.first_crossing,
                    calibrated=self._plan.calibrated[index],
                    benign_p=None if np.isnan(fused) else self._plan.benign_p(index, fused),
                    attribution=self._attribution(index, stages[index], fused) if wanted else None,
                )
            )
        return tuple(results)

    def tokens(self, start: int, stop: int, texts: Sequence[str]) -> tuple[TokenScores, ...]:
        """Per-token logits of positions start..stop; `texts` is one per position from `start`.

        NaN where a position was not scored in time.
        """
        tokens = []
        for block in self._blocks:
            for position in range(max(start, block.start), min(stop, block.stop)):
                row = position - block.start
                values = block.logits[row].astype(float)
                tokens.append(
                    TokenScores(
                        position=position,
                        token_id=block.token_ids[row],
                        text=texts[position - start],
                        stage=block.stages[row],
                        fused=tuple(values[:, FUSED].tolist()),
                        dense=tuple(values[:, DENSE].tolist()),
                        sae=tuple(values[:, SAE].tolist()),
                    )
                )
        return tuple(tokens)

    def _fold(self, block: _Block) -> list[Crossing]:
        crossings = []
        for stage in Stage:
            rows = [i for i, s in enumerate(block.stages) if s is stage]
            if not rows:
                continue
            mine = self._stages.get(stage)
            if mine is None:
                mine = self._stages[stage] = _StageEvidence(self._plan.aggregator.start())
            positions = [block.start + row for row in rows]
            running = self._plan.aggregator.update(mine.aggregate, block.logits[rows])
            mine.positions += positions
            crossings += self.policy.advance(self._state, stage, positions, running)
        return crossings

    def _scores(self) -> tuple[NDArray[np.float64], list[Stage | None]]:
        """Each cluster's scores in the stage where its fused score is the highest."""
        best = np.full((self._plan.n_clusters, 3), np.nan)
        stages: list[Stage | None] = [None] * self._plan.n_clusters
        for stage, evidence in self._stages.items():
            scores = self._plan.aggregator.score(evidence.aggregate)
            for index, cluster in enumerate(self._plan.spec.clusters):
                if stage not in cluster.stages:
                    continue
                if stages[index] is None or scores[index, FUSED] > best[index, FUSED]:
                    stages[index] = stage
                    best[index] = scores[index]
        return best, stages

    def _attribution(self, index: int, stage: Stage | None, score: float) -> Attribution | None:
        if stage is None:
            return None
        evidence = self._stages[stage]
        support = self._plan.aggregator.support(evidence.aggregate, index)
        positions = evidence.positions[support.start : support.stop]
        weights = support.weights
        logits, acts = self._gather(positions)
        cluster = self._plan.spec.clusters[index]
        terms = self._plan.heads.contributions(index, acts)  # n n_terms
        shares = weights @ terms
        dense = float(cluster.fusion.dense * (weights @ logits[:, index, DENSE].astype(float)))
        bias = float(cluster.fusion.bias * weights.sum())
        latents = [
            LatentContribution(
                sae=latent.sae,
                latent_id=latent.id,
                label=latent.label,
                contribution=float(shares[i]),
                positions=tuple(np.asarray(positions)[terms[:, i] != 0].tolist()),
            )
            for i, latent in enumerate(cluster.latents)
            if shares[i] != 0
        ]
        total = dense + bias + sum(latent.contribution for latent in latents)
        return Attribution(
            latents=tuple(sorted(latents, key=lambda x: -abs(x.contribution))),
            dense=dense,
            bias=bias,
            gate=min(0.0, score - total) if support.gated else 0.0,
            window_start=positions[0],
            window_stop=positions[-1] + 1,
        )

    def _gather(self, positions: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The logits and dense activations of ascending positions."""
        logits = np.empty((len(positions), self._plan.n_clusters, 3), np.float32)
        acts = np.zeros((len(positions), self._plan.heads.n_latents), np.float32)
        row_of = {position: row for row, position in enumerate(positions)}
        for block in self._blocks:
            if block.stop <= positions[0] or block.start > positions[-1]:
                continue
            for position in range(block.start, block.stop):
                if position in row_of:
                    logits[row_of[position]] = block.logits[position - block.start]
            for row, column, value in zip(
                block.act_rows, block.act_columns, block.act_values, strict=True
            ):
                position = block.start + int(row)
                if position in row_of:
                    acts[row_of[position], column] = value
        return logits, acts


def _count(counts: dict[UnscoredReason, int], reason: UnscoredReason, n: int) -> None:
    if n:
        counts[reason] = counts.get(reason, 0) + n
