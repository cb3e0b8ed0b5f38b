"""The running evidence of one request or stream: per-token numbers in, cluster results out.

Keeps one aggregate a stage, the token logits (to explain, to go back after re-tokenisation and to
report), and the registered latents' activations in sparse form. Knows no clock and no network.
"""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from monitor.attribution import Window
from monitor.audit_log.token_latents import TokenLatents
from monitor.audit_log.trace import TokenTrace
from monitor.bundle_spec import BundleSpec
from monitor.coverage import StageCount
from monitor.policy import DENSE, FUSED, SAE, Crossing, Judgement, Policy, PolicyState
from monitor.records import (
    ClusterResult,
    Coverage,
    Stage,
    TokenScores,
    UnscoredReason,
    Verdict,
)
from monitor.staleness import Staleness
from sae_core.aggregation import AggregateSpec, AggregateState, Aggregator
from sae_core.heads import ClusterHeads
from sae_core.vitals import FitSums, TextVitals

SLICE_TOKENS = 512
"""Tokens folded between two turns of the event loop: 3 ms, ten clusters (LOG.md, 2026-11-24)."""

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
    staleness: Staleness = field(default_factory=Staleness)
    """Which clusters have left their bounds; one book for all plans of a served bundle."""

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
            k=c.aggregate.k,
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
    """One request's evidence so far. `add` in order of position, `truncate` to go back.

    Args:
        rules_each_token: joint rules are asked after every token, as of a stream, whose caller
            hears of each; otherwise only by `judge`.
    """

    def __init__(
        self, plan: ClusterPlan, policy: Policy, *, rules_each_token: bool = False
    ) -> None:
        self._plan = plan
        self.policy = policy
        self._rules_each_token = rules_each_token
        self._blocks: list[_Block] = []
        self._stages: dict[Stage, _StageEvidence] = {}
        self._counts: dict[Stage, StageCount] = {}
        self._n_excluded = 0
        self._state: PolicyState = policy.start()
        self._turn: Stage | None = None
        """The stage of the last token that counts."""

    @property
    def n_tokens(self) -> int:
        """Positions seen, excluded ones too."""
        return self._blocks[-1].stop if self._blocks else 0

    def coverage(self) -> Coverage:
        """Positions received, scored, and not scored by reason."""
        unscored: dict[UnscoredReason, int] = {}
        _count(unscored, UnscoredReason.EXCLUDED, self._n_excluded)
        for count in self._counts.values():
            for reason, n in count.unscored.items():
                _count(unscored, reason, n)
        return Coverage(
            received=self.n_tokens,
            scored=sum(count.scored for count in self._counts.values()),
            unscored=unscored,
        )

    def stage_coverage(self) -> dict[Stage, StageCount]:
        """The counts of each stage, excluded tokens left out; the caller's to change."""
        return {
            stage: StageCount(count.received, count.scored, dict(count.unscored))
            for stage, count in self._counts.items()
        }

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
        # A flat search of booleans: many times as fast as np.nonzero of two axes of numbers.
        active = np.flatnonzero((latent_acts != 0).reshape(-1))
        rows, columns = np.divmod(active, max(1, latent_acts.shape[1]))
        block = _Block(
            start=self.n_tokens,
            token_ids=list(token_ids),
            stages=list(stages),
            logits=logits,
            act_rows=rows,
            act_columns=columns,
            act_values=latent_acts[rows, columns],
        )
        return self._fold(block, self._append(block))

    def close(self) -> list[Crossing]:
        """The alerts that open because no more will come; judges what is shorter than a window."""
        return self._end_turn()

    async def add_in_slices(
        self,
        token_ids: Sequence[int | None],
        stages: Sequence[Stage | None],
        logits: NDArray[np.float32],
        latent_acts: NDArray[np.float32],
    ) -> list[Crossing]:
        """As `add`, with the same bits; lets the event loop go on within long ones."""
        crossings: list[Crossing] = []
        for start in range(0, len(stages), SLICE_TOKENS):
            if start:
                await asyncio.sleep(0)
            part = slice(start, start + SLICE_TOKENS)
            crossings += self.add(token_ids[part], stages[part], logits[part], latent_acts[part])
        return crossings

    def skip(
        self,
        token_ids: Sequence[int | None],
        stages: Sequence[Stage | None],
        reason: UnscoredReason,
    ) -> None:
        """Takes tokens that were never scored, so that later positions stay right."""
        n = len(token_ids)
        empty = np.zeros(0, np.int64)
        self._append(
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
        self._blocks, self._stages, self._turn = [], {}, None
        self._counts, self._n_excluded = {}, 0
        for block in kept:
            rows = self._append(block)
            if block.unscored is None:
                self._fold(block, rows)

    def token_ids(self, start: int = 0, stop: int | None = None) -> list[int | None]:
        """The ids of positions start..stop, all by default, in order; None for one not known."""
        stop = self.n_tokens if stop is None else stop
        return [
            token_id
            for block in self._blocks_between(start, stop)
            for token_id in block.token_ids[max(0, start - block.start) : stop - block.start]
        ]

    def trace(self) -> TokenTrace:
        """Every position's stage and logits, as the audit log stores them."""
        empty = np.zeros((0, self._plan.n_clusters, 3), np.float32)
        return TokenTrace(
            clusters=tuple(cluster.id for cluster in self._plan.spec.clusters),
            stages=tuple(stage for block in self._blocks for stage in block.stages),
            logits=np.concatenate([empty, *(block.logits for block in self._blocks)]),
        )

    def token_latents(self, clusters: Sequence[str]) -> dict[str, TokenLatents]:
        """Which latents each token of the window has that made the score of these clusters."""
        stages = self._scores()[1]
        return {
            cluster.id: window.token_latents()
            for index, cluster in enumerate(self._plan.spec.clusters)
            if cluster.id in clusters and (window := self._window(index, stages[index])) is not None
        }

    def vitals(self, fits: Mapping[str, FitSums]) -> TextVitals:
        """What the scored tokens did to the registered latents.

        Args:
            fits: by SAE, where the text's fit was measured.
        """
        columns, values = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
        for block in self._blocks:
            counted = np.array([stage is not None for stage in block.stages], dtype=bool)
            kept = counted[block.act_rows]
            columns.append(block.act_columns[kept])
            values.append(block.act_values[kept])
        n, every = self._plan.heads.n_latents, np.concatenate(columns)
        return TextVitals(
            n_tokens=sum(count.scored for count in self._counts.values()),
            firings=np.bincount(every, minlength=n),
            totals=np.bincount(every, weights=np.concatenate(values), minlength=n),
            fits=fits,
        )

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
            window = self._window(index, stages[index]) if wanted else None
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
                    stale=cluster.id in self._plan.staleness,
                    benign_p=None if np.isnan(fused) else self._plan.benign_p(index, fused),
                    attribution=None if window is None else window.attribution(fused),
                )
            )
        return tuple(results)

    def tokens(self, start: int, stop: int, texts: Sequence[str]) -> tuple[TokenScores, ...]:
        """Per-token logits of positions start..stop; `texts` is one per position from `start`.

        NaN where a position was not scored in time.
        """
        tokens = []
        for block in self._blocks_between(start, stop):
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

    def _blocks_between(self, start: int, stop: int) -> Iterator[_Block]:
        """Those with positions in start..stop; the others, a long stream's, are not looked at."""
        first = bisect.bisect_right(self._blocks, start, key=lambda block: block.stop)
        for index in range(first, len(self._blocks)):
            if self._blocks[index].start >= stop:
                return
            yield self._blocks[index]

    def _append(self, block: _Block) -> dict[Stage, NDArray[np.int64]]:
        """Keeps and counts a block; gives the rows of each stage."""
        self._blocks.append(block)
        rows_of = _rows_by_stage(block.stages)
        self._n_excluded += len(block.stages) - sum(map(len, rows_of.values()))
        for stage, rows in rows_of.items():
            n = len(rows)
            count = self._counts.setdefault(stage, StageCount())
            count.received += n
            if block.unscored is None:
                count.scored += n
            else:
                _count(count.unscored, block.unscored, n)
        return rows_of

    def _fold(self, block: _Block, rows_of: dict[Stage, NDArray[np.int64]]) -> list[Crossing]:
        crossings = []
        for stage, rows in _turns(rows_of):
            if stage is not self._turn:
                crossings += self._end_turn()
                self._turn = stage
            mine = self._stages.get(stage)
            if mine is None:
                mine = self._stages[stage] = _StageEvidence(self._plan.aggregator.start())
            positions: list[int] = (block.start + rows).tolist()
            logits = block.logits if len(rows) == len(block.stages) else block.logits[rows]
            folded = self._plan.aggregator.fold(mine.aggregate, logits)
            mine.positions += positions
            crossings += self.policy.advance(self._state, stage, positions, folded.running)
            if self._rules_each_token and self.policy.has_rules:
                scores = self._scores_after(stage, folded.scores[:, :, FUSED])
                crossings += self.policy.advance_rules(self._state, positions, scores)
        return crossings

    def _end_turn(self) -> list[Crossing]:
        """Judges the stage's score as it stands, provisional or not: once what was said is said."""
        if self._turn is None:
            return []
        mine = self._stages[self._turn]
        score = self._plan.aggregator.score(mine.aggregate)
        return self.policy.advance(self._state, self._turn, mine.positions[-1:], score[None])

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

    def _scores_after(self, stage: Stage, fused: NDArray[np.float64]) -> NDArray[np.float64]:
        """As `_scores`, fused ones after each token of a turn.

        Args:
            fused: [n_tokens, n_clusters], the scores in the turn's stage.
        """
        looks = np.array([stage in cluster.stages for cluster in self._plan.spec.clusters])
        scores = np.where(looks, fused, np.nan)
        for other, evidence in self._stages.items():
            if other is not stage:
                theirs = self._plan.aggregator.score(evidence.aggregate)[:, FUSED]
                looks = np.array([other in cluster.stages for cluster in self._plan.spec.clusters])
                scores = np.fmax(scores, np.where(looks, theirs, np.nan))
        return scores

    def _window(self, index: int, stage: Stage | None) -> Window | None:
        """What made a cluster's score in this stage; None where no token counted."""
        if stage is None:
            return None
        evidence = self._stages[stage]
        support = self._plan.aggregator.support(evidence.aggregate, index)
        counted = np.flatnonzero(support.weights)
        positions = [evidence.positions[support.start + int(i)] for i in counted]
        logits, acts = self._gather(positions)
        return Window(
            cluster=self._plan.spec.clusters[index],
            positions=np.asarray(positions, np.int64),
            weights=support.weights[counted],
            dense=logits[:, index, DENSE].astype(np.float64),
            terms=self._plan.heads.contributions(index, acts),
            is_gated=support.gated,
        )

    def _gather(self, positions: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The logits and dense activations of ascending positions."""
        wanted = np.asarray(positions)
        logits = np.empty((len(wanted), self._plan.n_clusters, 3), np.float32)
        acts = np.zeros((len(wanted), self._plan.heads.n_latents), np.float32)
        for block in self._blocks:
            first, last = np.searchsorted(wanted, (block.start, block.stop))
            if first == last:
                continue
            rows = wanted[first:last] - block.start
            logits[first:last] = block.logits[rows]
            row_of = np.full(len(block.token_ids), -1)
            row_of[rows] = np.arange(first, last)
            ours = row_of[block.act_rows]
            kept = ours >= 0
            acts[ours[kept], block.act_columns[kept]] = block.act_values[kept]
        return logits, acts


def _rows_by_stage(stages: Sequence[Stage | None]) -> dict[Stage, NDArray[np.int64]]:
    """Indices of each stage's tokens, for the stages there are; excluded tokens are in none."""
    if stages and (stage := stages[-1]) is not None and stages.count(stage) == len(stages):
        return {stage: np.arange(len(stages))}
    found = {}
    for stage in Stage:
        rows = np.flatnonzero(np.frombuffer(bytes([s is stage for s in stages]), np.bool_))
        if len(rows):
            found[stage] = rows
    return found


def turns(stages: Sequence[Stage | None]) -> list[tuple[Stage, NDArray[np.int64]]]:
    """The rows of each turn: tokens of one stage with none of another between, in order."""
    return _turns(_rows_by_stage(stages))


def _turns(rows_of: dict[Stage, NDArray[np.int64]]) -> list[tuple[Stage, NDArray[np.int64]]]:
    if len(rows_of) < 2:
        return list(rows_of.items())
    rows = np.concatenate(list(rows_of.values()))
    stages = np.repeat(np.arange(len(rows_of)), [len(r) for r in rows_of.values()])
    order = np.argsort(rows)
    starts = np.flatnonzero(np.diff(stages[order])) + 1
    names = list(rows_of)
    return [(names[stages[part[0]]], rows[part]) for part in np.split(order, starts)]


def _count(counts: dict[UnscoredReason, int], reason: UnscoredReason, n: int) -> None:
    if n:
        counts[reason] = counts.get(reason, 0) + n
