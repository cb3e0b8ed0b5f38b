"""What a bundle says of a batch of traces: which clusters and rules, surely or perhaps.

A stored logit is off by at most half a step of its column, and every aggregate moves by at most as
much as its logits do. So a score is known as an interval; only where a logit may lie on either side
of the evidence floor is the interval computed from both ends. Most decisions are settled by their
largest logit alone, as no aggregate is above it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from monitor.audit_log.logged_traces import TraceBatch
from monitor.audit_log.trace import ABSENT
from monitor.bundle_spec import ClusterModel, FusionSpec, RuleCondition, RuleModel
from monitor.records import Stage
from monitor.what_if.running import Bools, Ends, Floats, Ints, Ragged, running_ends
from sae_core.aggregation import AggregateSpec

STAGE_CODES = {Stage.PROMPT: 1, Stage.COMPLETION: 2}
FUSED, DENSE, SAE = 0, 1, 2
LARGEST = np.iinfo(np.int16).max
"""Of the numbers that scores are stored as."""
ROUNDING = 2.0**-21
"""Of a fused logit, relative to its terms: the server adds them in float32."""


class Claim(NamedTuple):
    """A yes or no of each decision."""

    sure: Bools
    """It is yes wherever the true scores lie."""
    said: Bools
    """It is yes of the scores as stored."""
    possible: Bools
    """It may be yes."""


class Interval(NamedTuple):
    """A score of each decision; -inf where it is below every limit of the cluster."""

    low: Floats
    value: Floats
    high: Floats


class ClusterScores(NamedTuple):
    """One cluster's aggregated fused logits in each decision, both stages together."""

    peak: Interval
    """The largest running score, which verdicts act on."""
    last: Interval
    """The score at the end, which rules act on."""
    is_seen: Bools
    """Whether a token counted."""

    def reaches(self, limit: float) -> Claim:
        """Whether the running score ever was at the limit or above."""
        low, value, high = self.peak
        return Claim(low >= limit, value >= limit, high >= limit)


class ClusterTokens(NamedTuple):
    """One cluster's fused logits of some tokens."""

    logits: Floats
    """[n_tokens] in units."""
    is_scored: Bools
    """[n_tokens]"""
    unit: Floats
    """[n] logits of a unit."""
    error: Floats
    """[n] in units."""


class BatchReader:
    """A batch, and what several clusters want to know of it.

    Args:
        recorded: by cluster, the fusion that the stored fused logits were made with.
    """

    def __init__(self, batch: TraceBatch, recorded: Sequence[FusionSpec]) -> None:
        self.batch = batch
        self._recorded = recorded
        self._steps = np.ldexp(1.0, batch.exponents.astype(np.int64))  # n n_clusters 3
        self._largest: dict[tuple[Stage, ...], NDArray[np.int16]] = {}

    def scores(
        self, index: int, models: Sequence[ClusterModel], lowest: float
    ) -> list[ClusterScores]:
        """The scores of one cluster under each of `models`.

        Args:
            index: the cluster's place in the traces.
            lowest: the lowest limit that any of the models or their rules holds against it.
        """
        candidates = np.zeros(len(self.batch), np.bool_)
        for model in models:
            candidates |= self._may_reach(index, model, lowest)
        found: dict[tuple[object, ...], ClusterScores] = {}
        for model in models:
            key = (model.fusion, model.aggregate, model.stages)
            if key not in found:
                found[key] = self._scores(index, model, np.flatnonzero(candidates))
        return [found[model.fusion, model.aggregate, model.stages] for model in models]

    def tokens_of(
        self, index: int, model: ClusterModel, chosen: Ints
    ) -> tuple[ClusterTokens, NDArray[np.uint8], Ints]:
        """One cluster's tokens of some decisions, their stages, and whose they are in `chosen`."""
        tokens = self._tokens(index, model.fusion, chosen)
        stages = self.batch.stages[_within(self.batch.bounds, chosen)]
        return tokens, stages, np.repeat(np.arange(len(chosen)), np.diff(self.batch.bounds)[chosen])

    def _may_reach(self, index: int, model: ClusterModel, lowest: float) -> Bools:
        """Decisions with a logit that is not surely below every limit."""
        if model.fusion == self._recorded[index]:
            largest = self._largest_fused(model.stages)[:, index]
            reached: Bools = (largest + 0.5) * self._steps[:, index, FUSED] >= lowest
            reached &= largest != ABSENT
            return reached
        tokens = self._tokens(index, model.fusion, np.arange(len(self.batch)))
        counts = tokens.is_scored & _in_stages(self.batch.stages, model.stages)
        highest = np.maximum.reduceat(
            np.where(counts, tokens.logits, -np.inf), self.batch.bounds[:-1]
        )
        return highest + tokens.error >= lowest

    def _largest_fused(self, stages: tuple[Stage, ...]) -> NDArray[np.int16]:
        """[n, n_clusters]: the largest fused number of these stages, `ABSENT` without a token."""
        if stages not in self._largest:
            counts = _in_stages(self.batch.stages, stages)
            numbers = np.where(counts[:, None], self._numbers(FUSED), np.int16(ABSENT))
            self._largest[stages] = np.maximum.reduceat(numbers, self.batch.bounds[:-1], axis=0)
        return self._largest[stages]

    def _tokens(self, index: int, fusion: FusionSpec, chosen: Ints) -> ClusterTokens:
        """The logits of some decisions' tokens, one decision after the other."""
        within = _within(self.batch.bounds, chosen)
        fused, steps = self._numbers(FUSED)[within, index], self._steps[chosen, index]
        is_scored = fused != ABSENT
        if fusion == self._recorded[index]:
            half = np.full(len(chosen), 0.5)
            return ClusterTokens(fused.astype(np.float64), is_scored, steps[:, FUSED], half)
        lengths = np.diff(self.batch.bounds)[chosen]
        logits = np.full(len(within), fusion.bias)
        error = np.full(len(chosen), ROUNDING * abs(fusion.bias))
        for source, weight in ((SAE, fusion.sae), (DENSE, fusion.dense)):
            if weight:
                numbers = self._numbers(source)[within, index]
                is_scored &= numbers != ABSENT
                logits += numbers * np.repeat(weight * steps[:, source], lengths)
                error += abs(weight) * steps[:, source] * (0.5 + ROUNDING * LARGEST)
        return ClusterTokens(logits, is_scored, np.ones(len(chosen)), error)

    def _numbers(self, source: int) -> NDArray[np.int16]:
        numbers = self.batch.numbers[source]
        assert numbers is not None, "read with the sources that the fusions need"
        return numbers

    def _scores(self, index: int, model: ClusterModel, chosen: Ints) -> ClusterScores:
        n = len(self.batch)
        ends = [[np.full(n, -np.inf) for _ in range(3)] for _ in ("peak", "last")]
        spec = AggregateSpec(**model.aggregate.model_dump())
        if len(chosen):
            tokens, stages, owners = self.tokens_of(index, model, chosen)
            turn_ends = _turn_ends(owners, stages, tokens.is_scored)
        for stage in model.stages if len(chosen) else ():
            counts = tokens.is_scored & (stages == STAGE_CODES[stage])
            mine = owners[counts]
            if not len(mine):
                continue
            starts = np.flatnonzero(np.diff(mine, prepend=-1))
            rows = mine[starts]
            bounds = np.append(starts, len(mine))
            logits = Ragged(tokens.logits[counts], bounds, turn_ends[counts])
            unit, error = tokens.unit[rows], tokens.error[rows]
            for ended, interval in zip(ends, _intervals(spec, logits, unit, error), strict=True):
                for best, part in zip(ended, interval, strict=True):
                    best[chosen[rows]] = np.maximum(best[chosen[rows]], part * unit)
        peak, last = (Interval(*parts) for parts in ends)
        is_seen = self._largest_fused(model.stages)[:, index] != ABSENT
        return ClusterScores(peak, last, is_seen)


def rule_claim(
    rule: RuleModel, clusters: Mapping[str, tuple[ClusterModel, ClusterScores]]
) -> Claim:
    """Whether all conditions of a rule hold at the end, as for a request that comes whole."""
    held = [_holds(condition, *clusters[condition.cluster]) for condition in rule.all]
    sure, said, possible = (np.logical_and.reduce(parts) for parts in zip(*held, strict=True))
    return Claim(sure, said, possible)


def condition_limit(condition: RuleCondition, model: ClusterModel) -> float:
    """The score that a condition compares with."""
    side = condition.above if condition.above is not None else condition.below
    if isinstance(side, str):
        return model.thresholds.flag if side == "flag" else model.thresholds.alert
    return float(side or 0.0)


def _holds(condition: RuleCondition, model: ClusterModel, scores: ClusterScores) -> Claim:
    limit = condition_limit(condition, model)
    low, value, high = scores.last
    if condition.above is not None:
        held = Claim(low >= limit, value >= limit, high >= limit)
    else:
        held = Claim(high < limit, value < limit, low < limit)
    return Claim(*(part & scores.is_seen for part in held))


def _in_stages(stages: NDArray[np.uint8], wanted: Sequence[Stage]) -> Bools:
    table = np.zeros(len(STAGE_CODES) + 1, np.bool_)
    table[[STAGE_CODES[stage] for stage in wanted]] = True
    found: Bools = table[stages]
    return found


def _within(bounds: Ints, chosen: Ints) -> Ints:
    """The tokens of some decisions, in order."""
    lengths = np.diff(bounds)[chosen]
    shift = np.repeat(bounds[:-1][chosen] - np.concatenate(([0], np.cumsum(lengths)[:-1])), lengths)
    return np.arange(int(lengths.sum())) + shift


def _turn_ends(owners: Ints, stages: NDArray[np.uint8], is_scored: Bools) -> Bools:
    """Tokens after which the decision's other stage comes, or nothing; of those that count."""
    found = np.zeros(len(owners), np.bool_)
    rows = np.flatnonzero(is_scored & (stages != 0))
    turns = len(STAGE_CODES) * owners[rows] + stages[rows]
    found[rows] = np.diff(turns, append=-1) != 0
    return found


def _intervals(
    spec: AggregateSpec, logits: Ragged, unit: Floats, error: Floats
) -> tuple[Interval, Interval]:
    """Peak and last score of each sequence in units, with how far they may be off."""
    floor = spec.evidence_floor / unit
    middle = running_ends(spec, logits, floor)
    parts = [[end - error, end.copy(), end + error] for end in middle]
    if spec.min_evidence_tokens > 0:
        rows = np.flatnonzero(near_floor(logits, floor, error))
        if len(rows):
            for place, sign in ((0, -1.0), (2, 1.0)):
                moved = _moved(spec, logits, rows, sign * error, floor)
                for part, end in zip(parts, moved, strict=True):
                    part[place][rows] = end
    peak, last = parts
    return Interval(*peak), Interval(*last)


def near_floor(logits: Ragged, floor: Floats, error: Floats) -> Bools:
    """[n_sequences] whether a logit may lie on either side of the evidence floor."""
    near = np.abs(logits.logits - logits.spread(floor)) <= logits.spread(error)
    found: Bools = np.logical_or.reduceat(near, logits.bounds[:-1])
    return found


def _moved(spec: AggregateSpec, logits: Ragged, rows: Ints, by: Floats, floor: Floats) -> Ends:
    """The ends of some sequences with every logit moved."""
    lengths = logits.lengths[rows]
    within = _within(logits.bounds, rows)
    moved = logits.logits[within] + np.repeat(by[rows], lengths)
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    return running_ends(spec, Ragged(moved, bounds, logits.is_turn_end[within]), floor[rows])
