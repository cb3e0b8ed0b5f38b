"""Aggregates of many ragged sequences at once; `sae_core.aggregation` says what each one is.

One call does what an `Aggregator` does for one cluster of every sequence: the largest running
score, which verdicts act on, and the last one, which rules act on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from monitor.errors import SettingsError
from sae_core.aggregation import AggregateSpec

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

SORTED_BYTES = 64 << 20
"""Of windows that `k_of_window` sorts at a time."""


class Ends(NamedTuple):
    """What a cluster's running score came to, one a sequence."""

    peak: Floats
    last: Floats


class Ragged(NamedTuple):
    """Sequences of at least one token, one after the other."""

    logits: Floats
    """[n_tokens]"""
    bounds: Ints
    """[n_sequences + 1]"""
    is_turn_end: Bools
    """[n_tokens] whether the other stage, or nothing, comes next: there the server judges a score
    that is provisional until then."""

    @property
    def lengths(self) -> Ints:
        """Tokens of each."""
        return np.diff(self.bounds)

    def spread(self, values: Floats) -> Floats:
        """One value a sequence -> one a token."""
        return np.repeat(values, self.lengths)


def running_ends(spec: AggregateSpec, found: Ragged, floor: Floats) -> Ends:
    """Peak and last running score of each sequence.

    Args:
        floor: [n_sequences] in the units of the logits; stands for the evidence floor of `spec`.
    """
    starts = found.bounds[:-1]
    positions, values = _gated_values(spec, found, floor)
    ends = values[found.bounds[1:] - 1]
    if _kind(spec) == "max_window_mean":
        is_whole = positions >= spec.window - 1
        whole = np.maximum.reduceat(np.where(is_whole, values, -np.inf), starts)
        judged = np.where(is_whole | found.is_turn_end, values, -np.inf)
        last = np.where(found.lengths >= spec.window, whole, ends)
        return Ends(np.maximum.reduceat(judged, starts), last)
    peak = np.maximum.reduceat(values, starts)
    return Ends(peak, ends if _kind(spec) in ("mean", "top_k_mean") else peak)


def running_scores(spec: AggregateSpec, found: Ragged, floor: Floats) -> Floats:
    """The score after each token, provisional ones too; arguments as of `running_ends`."""
    positions, values = _gated_values(spec, found, floor)
    if _kind(spec) in ("mean", "top_k_mean"):
        return values
    # Less than a whole window is provisional: no maximum holds it.
    first = spec.window - 1 if _kind(spec) == "max_window_mean" else 0
    begins = positions <= first
    edges = np.append(np.flatnonzero(begins), len(values))
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        np.maximum.accumulate(values[start:stop], out=values[start:stop])
    return values


def _gated_values(spec: AggregateSpec, found: Ragged, floor: Floats) -> tuple[Ints, Floats]:
    """Each token's place in its sequence, and the aggregate at it."""
    positions = np.arange(len(found.logits)) - np.repeat(found.bounds[:-1], found.lengths)
    values = _values(spec, found, positions)
    if spec.min_evidence_tokens > 0:
        _gate(spec, found, floor, values)
    return positions, values


def _kind(spec: AggregateSpec) -> str:
    return spec.kind


def _values(spec: AggregateSpec, found: Ragged, positions: Ints) -> Floats:
    kind = _kind(spec)
    if kind == "max" or (kind == "max_rolling_mean" and spec.window == 1):
        return found.logits.copy()
    if kind in ("max_rolling_mean", "max_window_mean", "mean"):
        n = positions + 1
        if kind != "mean":
            np.minimum(n, spec.window, out=n)
        totals = np.concatenate(([0.0], np.cumsum(found.logits)))
        stops = np.arange(1, len(found.logits) + 1)
        means: Floats = (totals[stops] - totals[stops - n]) / n
        return means
    if kind == "k_of_window":
        return _kth_largest(spec, found.logits, positions)
    if kind in ("ema", "top_k_mean"):
        return _in_steps(spec, found)
    raise SettingsError(f"what-if: found aggregate kind {kind!r}, which it cannot try")


def _gate(spec: AggregateSpec, found: Ragged, floor: Floats, values: Floats) -> None:
    """Caps values in place while evidence is short."""
    floors = found.spread(floor)
    counts = np.cumsum(found.logits > floors)
    before = np.concatenate(([0], counts))[found.bounds[:-1]]
    is_short = counts - found.spread(before) < spec.min_evidence_tokens
    np.minimum(values, floors, out=values, where=is_short)


def _kth_largest(spec: AggregateSpec, logits: Floats, positions: Ints) -> Floats:
    values = np.empty_like(logits)
    back = np.arange(spec.window)
    step = max(1, SORTED_BYTES // (8 * spec.window))
    for begin in range(0, len(logits), step):
        rows = np.arange(begin, min(begin + step, len(logits)))
        at = rows[:, None] - back
        windows = np.where(back <= positions[rows, None], logits[np.maximum(at, 0)], -np.inf)
        windows.sort(axis=1)
        rank = np.minimum(positions[rows] + 1, spec.k)
        values[rows] = windows[np.arange(len(rows)), spec.window - rank]
    return values


def _in_steps(spec: AggregateSpec, found: Ragged) -> Floats:
    """What needs the token before: one step a position, all sequences that are so long at once."""
    values = np.empty_like(found.logits)
    order = np.argsort(-found.lengths, kind="stable")
    starts, lengths = found.bounds[:-1][order], found.lengths[order]
    n_alive = np.searchsorted(-lengths, -np.arange(1, lengths.max(initial=0) + 1), side="right")
    average = found.logits[starts]
    largest = np.full((len(starts), spec.k), -np.inf)
    for position, n in enumerate(n_alive):
        at = starts[:n] + position
        new = found.logits[at]
        if spec.kind == "ema":
            if position:
                average = spec.alpha * new + (1 - spec.alpha) * average[:n]
            values[at] = average
            continue
        largest = largest[:n]
        better = new > largest[:, -1]
        if better.any():
            changed = np.column_stack((largest[better], new[better]))
            changed.sort(axis=1)
            largest[better] = changed[:, :0:-1]
        kept = min(position + 1, spec.k)
        total = largest[:, 0].copy()
        for column in range(1, kept):
            total += largest[:, column]
        values[at] = total / kept
    return values
