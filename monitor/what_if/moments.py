"""Joint rules of streams, which are asked after every token and not once at the end.

A condition such as "below flag" can hold at one token and no longer at the next, so scores are
followed token by token: for streams only, and of them for those alone in which every cluster that
must be above a limit reaches it at some time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from monitor.bundle_spec import ClusterModel, RuleCondition, RuleModel
from monitor.what_if.outcomes import (
    STAGE_CODES,
    BatchReader,
    Claim,
    ClusterScores,
    condition_limit,
    near_floor,
    rule_claim,
)
from monitor.what_if.running import Bools, Floats, Ints, Ragged, running_scores
from sae_core.aggregation import AggregateSpec

CHUNK_TOKENS = 1 << 20
"""Followed at a time."""


class _Followed(NamedTuple):
    """One cluster's score after each of some tokens, -inf before its first."""

    low: Floats
    value: Floats
    high: Floats


def rule_claims(
    rule: RuleModel,
    clusters: Mapping[str, tuple[ClusterModel, ClusterScores]],
    reader: BatchReader,
    index_of: Mapping[str, int],
) -> Claim:
    """Whether a rule fires: of a request at its end, of a stream after any token.

    Args:
        index_of: each cluster's place in the traces.
    """
    found = rule_claim(rule, clusters)
    batch = reader.batch
    reached = batch.is_stream.copy()
    for condition in rule.all:
        model, scores = clusters[condition.cluster]
        reached &= scores.is_seen
        if condition.above is not None and model.aggregate.kind == "max_window_mean":
            reached &= np.isfinite(scores.peak.high)  # provisional scores may lie above the peak
        elif condition.above is not None:
            reached &= scores.peak.high >= condition_limit(condition, model)
    rows = np.flatnonzero(reached)
    for some in _chunks(rows, np.diff(batch.bounds)):
        held = []
        for condition in rule.all:
            model = clusters[condition.cluster][0]
            held.append(_holds(condition, model, _follow(reader, index_of[model.id], model, some)))
        starts = np.cumsum(np.concatenate(([0], np.diff(batch.bounds)[some])))[:-1]
        for part, moments in zip(found, zip(*held, strict=True), strict=True):
            part[some] = np.logical_or.reduceat(np.logical_and.reduce(moments), starts)
    return found


def _chunks(rows: Ints, lengths: Ints) -> list[Ints]:
    """The rows in parts of about `CHUNK_TOKENS` tokens."""
    ends = np.cumsum(lengths[rows])
    cuts = np.searchsorted(
        ends, np.arange(CHUNK_TOKENS, ends[-1] if len(ends) else 0, CHUNK_TOKENS)
    )
    return [part for part in np.split(rows, np.unique(cuts)) if len(part)]


def _holds(condition: RuleCondition, model: ClusterModel, scores: _Followed) -> Claim:
    limit = condition_limit(condition, model)
    low, value, high = scores
    if condition.above is not None:
        return Claim(low >= limit, value >= limit, high >= limit)
    is_seen = np.isfinite(value)
    return Claim(*(is_seen & (part < limit) for part in (high, value, low)))


def _follow(reader: BatchReader, index: int, model: ClusterModel, rows: Ints) -> _Followed:
    """The score after each token of some decisions, stages together."""
    tokens, stages, owners = reader.tokens_of(index, model, rows)
    spec = AggregateSpec(**model.aggregate.model_dump())
    unit = tokens.unit[owners]
    parts = [np.full(len(owners), -np.inf) for _ in range(3)]
    for stage in model.stages:
        counts = tokens.is_scored & (stages == STAGE_CODES[stage])
        mine = owners[counts]
        if not len(mine):
            continue
        starts = np.flatnonzero(np.diff(mine, prepend=-1))
        ragged = Ragged(tokens.logits[counts], np.append(starts, len(mine)), counts[counts])
        error, of = tokens.error[mine[starts]], tokens.unit[mine[starts]]
        latest = _latest(counts, owners)
        for best, series in zip(parts, _series(spec, ragged, of, error), strict=True):
            carried = np.where(latest >= 0, series[latest], -np.inf)
            np.maximum(best, carried * unit, out=best)
    return _Followed(*parts)


def _latest(counts: Bools, owners: Ints) -> Ints:
    """For each token the last one up to it that counts, by its place among those; -1 for none."""
    places = np.cumsum(counts) - 1
    before = np.concatenate(([-1], places))[np.searchsorted(owners, owners)]
    return np.where(places > before, places, -1)


def _series(
    spec: AggregateSpec, found: Ragged, unit: Floats, error: Floats
) -> tuple[Floats, Floats, Floats]:
    """The score after each token in units, and how far it may be off."""
    floor = spec.evidence_floor / unit
    middle = running_scores(spec, found, floor)
    by = found.spread(error)
    low, high = middle - by, middle + by
    if spec.min_evidence_tokens > 0:
        near = np.repeat(near_floor(found, floor, error), found.lengths)
        for moved, sign in ((low, -1.0), (high, 1.0)):
            shifted = Ragged(found.logits + sign * by, found.bounds, found.is_turn_end)
            moved[near] = running_scores(spec, shifted, floor)[near]
    return low, middle, high
