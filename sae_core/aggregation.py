"""Token logits to running evidence, one number per cluster and source; NumPy only.

A stream's state is a few numbers per cluster plus the last `window` logits, or the `k` largest.
Every token is folded in by the same operations in the same order whatever the chunk it came in,
so whole, chunked and token-by-token input give the same bits. Nothing here knows tokens or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from numpy import ndarray

from sae_core.errors import HeadError, ScorerError, ShapeError

AggregateKind = Literal[
    "max_rolling_mean", "max_window_mean", "max", "mean", "ema", "top_k_mean", "k_of_window"
]
SOURCES = ("fused", "dense", "sae")
"""The last axis of logits and scores, in this order."""
FUSED = 0
CHUNK_TOKENS = 1024
"""Windows sorted at a time; of ten clusters and 16 tokens they take 4 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregateSpec:
    """How one cluster's token logits become one score."""

    kind: AggregateKind = "max_rolling_mean"
    """`max_rolling_mean`: largest mean of the last `window` tokens (fewer at the start);
    `max_window_mean`: largest mean of `window` tokens, and while there are fewer the mean of all,
    which is no more than a provisional score: the few tokens of a beginning say little; `max`:
    `max_rolling_mean` with window 1; `mean`: mean of all tokens; `ema`: largest exponential
    average; `top_k_mean`: mean of the `k` largest of all tokens (of all there are, while fewer);
    `k_of_window`: the k-th largest of the last `window` tokens, at its largest, so that it reaches
    a threshold where k tokens of one window do (the smallest, while there are fewer than k)."""
    window: int = 16
    """Read by `max_rolling_mean`, `max_window_mean` and `k_of_window`."""
    k: int = 4
    """Read by `top_k_mean` and `k_of_window`."""
    alpha: float = 0.1
    """Weight of the newest token in `ema`, in (0, 1]; the first token starts the average."""
    min_evidence_tokens: int = 3
    """Until this many tokens had a fused logit above the floor, a fused value counts as at most
    `evidence_floor`; 0 opens the gate from the start."""
    evidence_floor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(AggregateKind):
            expected = ", ".join(get_args(AggregateKind))
            raise HeadError(f"aggregate kind is {self.kind!r}, expected one of {expected}")
        if self.window < 1:
            raise HeadError(f"aggregate window is {self.window} tokens, expected at least 1")
        if self.k < 1:
            raise HeadError(f"aggregate k is {self.k} tokens, expected at least 1")
        if self.kind == "k_of_window" and self.k > self.window:
            raise HeadError(
                f"aggregate k is {self.k} tokens of a window of {self.window}, expected at most "
                "the window"
            )
        if not 0 < self.alpha <= 1:
            raise HeadError(f"aggregate alpha is {self.alpha}, expected in (0, 1]")
        if self.min_evidence_tokens < 0:
            raise HeadError(f"min_evidence_tokens is {self.min_evidence_tokens}, expected >= 0")
        if not np.isfinite(self.evidence_floor):
            raise HeadError(f"evidence_floor is {self.evidence_floor}, expected a finite number")


class Support(NamedTuple):
    """The tokens that made a fused score, and each one's weight in it."""

    start: int
    """First token, counted from the first one fed to the state."""
    stop: int
    """One past the last; equal to `start` where nothing has been fed."""
    weights: Float64[ndarray, " n_support"]
    """`sum(weights * fused_logits[start:stop])` is the value before the evidence gate."""
    gated: bool
    """Whether the evidence gate holds the score below that value."""


class Folded(NamedTuple):
    """What new tokens made of the scores."""

    running: Float64[ndarray, "n n_clusters 3"]
    """After each of them, -inf where a score is provisional."""
    scores: Float64[ndarray, "n n_clusters 3"]
    """The same with the provisional ones."""


class _Rolling(NamedTuple):
    columns: Int64[ndarray, " n_columns"]
    window: int
    whole: bool
    """Whether fewer tokens than the window make a provisional score only."""


class _TopK(NamedTuple):
    columns: Int64[ndarray, " n_columns"]
    k: int


class _KOfWindow(NamedTuple):
    columns: Int64[ndarray, " n_columns"]
    k: int
    window: int


class _Ema(NamedTuple):
    columns: Int64[ndarray, " n_columns"]
    alpha: Float64[ndarray, "n_columns 1"]


@dataclass(slots=True)
class AggregateState:
    """One stream's evidence so far; made by `Aggregator.start`, changed by `update`."""

    n_tokens: int
    recent: list[Float64[ndarray, "_ _ 3"]]
    total: Float64[ndarray, "n_mean 3"]
    average: Float64[ndarray, "n_ema 3"]
    largest: list[Float64[ndarray, "_ _ 3"]]
    """Of each `top_k_mean` group the k largest logits so far, largest first."""
    largest_at: list[Int64[ndarray, "_ _ 3"]]
    """Their tokens."""
    last: list[Float64[ndarray, "_ _ 3"]]
    """Of each `k_of_window` group the last logits; -inf where there were none."""
    evidence: Int64[ndarray, " n_clusters"]
    score: Float64[ndarray, "n_clusters 3"]
    best_position: Int64[ndarray, " n_clusters"]
    best_gated: Bool[ndarray, " n_clusters"]
    best_token: Int64[ndarray, " n_clusters"]
    """The token that `k_of_window` chose at `best_position`."""

    def copy(self) -> AggregateState:
        """An independent state that continues from the same evidence."""
        return AggregateState(
            n_tokens=self.n_tokens,
            recent=[history.copy() for history in self.recent],
            total=self.total.copy(),
            average=self.average.copy(),
            largest=[logits.copy() for logits in self.largest],
            largest_at=[tokens.copy() for tokens in self.largest_at],
            last=[logits.copy() for logits in self.last],
            evidence=self.evidence.copy(),
            score=self.score.copy(),
            best_position=self.best_position.copy(),
            best_gated=self.best_gated.copy(),
            best_token=self.best_token.copy(),
        )


class Aggregator:
    """The aggregates of all clusters, in the order of `specs`; holds no stream's state."""

    def __init__(self, specs: Sequence[AggregateSpec]) -> None:
        self.specs = tuple(specs)
        windows: dict[tuple[int, bool], list[int]] = {}
        tops: dict[int, list[int]] = {}
        ranked: dict[tuple[int, int], list[int]] = {}
        for column, spec in enumerate(self.specs):
            if spec.kind in ("max_rolling_mean", "max_window_mean", "max"):
                whole = spec.kind == "max_window_mean"
                windows.setdefault((_window(spec), whole), []).append(column)
            elif spec.kind == "top_k_mean":
                tops.setdefault(spec.k, []).append(column)
            elif spec.kind == "k_of_window":
                ranked.setdefault((spec.k, spec.window), []).append(column)
        self._rolling = [_Rolling(np.array(c, np.int64), *key) for key, c in windows.items()]
        self._top = [_TopK(np.array(c, np.int64), k) for k, c in tops.items()]
        self._ranked = [_KOfWindow(np.array(c, np.int64), k, w) for (k, w), c in ranked.items()]
        ema = [c for c, spec in enumerate(self.specs) if spec.kind == "ema"]
        self._ema = _Ema(
            np.array(ema, np.int64),
            np.array([self.specs[c].alpha for c in ema], np.float64).reshape(-1, 1),
        )
        self._mean = np.array([c for c, s in enumerate(self.specs) if s.kind == "mean"], np.int64)
        over_all = [c for c, s in enumerate(self.specs) if s.kind in ("mean", "top_k_mean")]
        self._over_all = np.array(over_all, np.int64)
        self._floor = np.array([s.evidence_floor for s in self.specs], np.float64)
        self._needed = np.array([s.min_evidence_tokens for s in self.specs], np.int64)

    def start(self) -> AggregateState:
        """The state of a stream that has seen no token."""
        n = len(self.specs)
        return AggregateState(
            n_tokens=0,
            recent=[np.zeros((g.window - 1, len(g.columns), 3)) for g in self._rolling],
            total=np.zeros((len(self._mean), 3)),
            average=np.zeros((len(self._ema.columns), 3)),
            largest=[np.full((g.k, len(g.columns), 3), -np.inf) for g in self._top],
            largest_at=[np.full((g.k, len(g.columns), 3), -1, np.int64) for g in self._top],
            last=[np.full((g.window - 1, len(g.columns), 3), -np.inf) for g in self._ranked],
            evidence=np.zeros(n, np.int64),
            score=np.full((n, 3), -np.inf),
            best_position=np.full(n, -1, np.int64),
            best_gated=np.zeros(n, np.bool_),
            best_token=np.full(n, -1, np.int64),
        )

    def update(
        self, state: AggregateState, logits: Float32[ndarray, "n n_clusters 3"]
    ) -> Float64[ndarray, "n n_clusters 3"]:
        """Folds new tokens into `state`; the running score after each of them.

        -inf where a score is provisional: `score` gives it, for who knows that no more will come.

        Raises ScorerError, with `state` unchanged, where a logit is not finite.
        """
        return self.fold(state, logits).running

    def fold(self, state: AggregateState, logits: Float32[ndarray, "n n_clusters 3"]) -> Folded:
        """As `update`, and besides what `score` would give after each token."""
        if logits.ndim != 3 or logits.shape[1:] != (len(self.specs), 3):
            raise ShapeError(f"logits are {logits.shape}, expected (n, {len(self.specs)}, 3)")
        if not np.isfinite(logits).all():
            n, c, s = np.argwhere(~np.isfinite(logits))[0]
            found = f"{SOURCES[s]} logit {logits[n, c, s]} of cluster {c}"
            raise ScorerError(f"{found} at token {state.n_tokens + n}, expected finite")
        if len(logits) == 0:
            none = np.empty((0, len(self.specs), 3))
            return Folded(none, none)
        x = logits.astype(np.float64)  # n n_clusters 3
        chosen: ndarray = np.full(x.shape[:2], -1, np.int64)
        values = self._values(state, x, chosen)
        gated = self._gate(state, x, values)
        provisional = self._withhold(state, values)
        running = np.concatenate((state.score[None], values))
        np.maximum.accumulate(running, out=running)
        running = running[1:]
        running[:, self._over_all] = values[:, self._over_all]
        self._remember_best(state, values[:, :, FUSED], gated, chosen)
        state.score = running[-1].copy()
        state.n_tokens += len(x)
        scores = running.copy() if provisional else running
        for columns, means in provisional:
            scores[: len(means), columns] = means
            if len(means) == len(x):
                state.score[columns] = means[-1]
                state.best_position[columns] = state.n_tokens - 1
                state.best_gated[columns] = gated[-1, columns]
        return Folded(running, scores)

    def _withhold(
        self, state: AggregateState, values: Float64[ndarray, "n n_clusters 3"]
    ) -> list[tuple[Int64[ndarray, " n_columns"], Float64[ndarray, "n_early n_columns 3"]]]:
        """Takes means of less than a whole window out of `values` and out of the score.

        Returns columns for which the first tokens are less than a window, each with these means.
        """
        provisional = []
        for group in self._rolling:
            if not group.whole or state.n_tokens >= group.window:
                continue
            n_early = min(group.window - 1 - state.n_tokens, len(values))
            if n_early:
                provisional.append((group.columns, values[:n_early, group.columns].copy()))
            values[:n_early, group.columns] = -np.inf
            state.score[group.columns] = -np.inf
        return provisional

    def score(self, state: AggregateState) -> Float64[ndarray, "n_clusters 3"]:
        """The score of every cluster from each source; NaN before the first token."""
        if state.n_tokens == 0:
            return np.full((len(self.specs), 3), np.nan)
        return state.score.copy()

    def support(self, state: AggregateState, cluster: int) -> Support:
        """Which tokens made the fused score of one cluster, and with which weights.

        Where several positions reach the score, the first of them is taken.
        """
        if state.n_tokens == 0:
            return Support(0, 0, np.empty(0), gated=False)
        spec = self.specs[cluster]
        stop = int(state.best_position[cluster]) + 1
        gated = bool(state.best_gated[cluster])
        if spec.kind == "ema":
            weights = spec.alpha * (1 - spec.alpha) ** np.arange(stop - 1, -1, -1.0)
            weights[0] = (1 - spec.alpha) ** (stop - 1)
            return Support(0, stop, weights, gated)
        if spec.kind == "k_of_window":
            token = int(state.best_token[cluster])
            return Support(token, token + 1, np.ones(1), gated)
        if spec.kind == "top_k_mean":
            return self._top_support(state, cluster, gated)
        n = stop if spec.kind == "mean" else min(_window(spec), stop)
        return Support(stop - n, stop, np.full(n, 1 / n), gated)

    def _top_support(self, state: AggregateState, cluster: int, gated: bool) -> Support:
        for group, largest_at in zip(self._top, state.largest_at, strict=True):
            if cluster in group.columns:
                column = int(np.flatnonzero(group.columns == cluster)[0])
                tokens = largest_at[: state.n_tokens, column, FUSED]
        start, stop = int(tokens.min()), int(tokens.max()) + 1
        weights = np.zeros(stop - start)
        weights[tokens - start] = 1 / len(tokens)
        return Support(start, stop, weights, gated)

    def _values(
        self,
        state: AggregateState,
        x: Float64[ndarray, "n n_clusters 3"],
        chosen: Int64[ndarray, "n n_clusters"],
    ) -> Float64[ndarray, "n n_clusters 3"]:
        """The aggregate at each token; into `chosen` goes the token that `k_of_window` took."""
        values = np.empty_like(x)
        counts = np.arange(state.n_tokens + 1, state.n_tokens + len(x) + 1).reshape(-1, 1, 1)
        for i, group in enumerate(self._rolling):
            padded = np.concatenate((state.recent[i], x[:, group.columns]))
            total = padded[: len(x)].copy()
            for offset in range(1, group.window):  # oldest first: the order is part of the result
                total += padded[offset : offset + len(x)]
            values[:, group.columns] = total / np.minimum(counts, group.window)
            state.recent[i] = padded[len(x) :].copy()
        if len(self._mean):
            totals = np.concatenate((state.total[None], x[:, self._mean]))
            np.add.accumulate(totals, out=totals)
            values[:, self._mean] = totals[1:] / counts
            state.total = totals[-1].copy()
        if len(self._ema.columns):
            values[:, self._ema.columns] = self._averages(state, x[:, self._ema.columns])
        for i, top in enumerate(self._top):
            values[:, top.columns] = _top_k_means(state, i, x[:, top.columns])
        for i, ranked in enumerate(self._ranked):
            found, tokens = _kth_largest(state, i, x[:, ranked.columns], ranked)
            values[:, ranked.columns] = found
            chosen[:, ranked.columns] = tokens
        return values

    def _averages(
        self, state: AggregateState, x: Float64[ndarray, "n n_columns 3"]
    ) -> Float64[ndarray, "n n_columns 3"]:
        decay = 1 - self._ema.alpha
        averages: ndarray = self._ema.alpha * x
        previous = state.average
        if state.n_tokens == 0:
            averages[0] = previous = x[0]
        for average in averages[1 if state.n_tokens == 0 else 0 :]:
            average += decay * previous
            previous = average
        state.average = previous.copy()
        return averages

    def _gate(
        self,
        state: AggregateState,
        x: Float64[ndarray, "n n_clusters 3"],
        values: Float64[ndarray, "n n_clusters 3"],
    ) -> Bool[ndarray, "n n_clusters"]:
        """Caps fused `values` in place where evidence is short; where a cap took something off."""
        fused = values[:, :, FUSED]
        evidence = state.evidence + np.cumsum(x[:, :, FUSED] > self._floor, axis=0, dtype=np.int64)
        state.evidence = evidence[-1].copy()
        gated = (evidence < self._needed) & (fused > self._floor)
        np.copyto(fused, self._floor, where=gated)
        return gated

    def _remember_best(
        self,
        state: AggregateState,
        fused: Float64[ndarray, "n n_clusters"],
        gated: Bool[ndarray, "n n_clusters"],
        chosen: Int64[ndarray, "n n_clusters"],
    ) -> None:
        best = fused.argmax(axis=0)
        best[self._over_all] = len(fused) - 1
        columns = np.arange(fused.shape[1])
        better = fused[best, columns] > state.score[:, FUSED]
        better[self._over_all] = True
        state.best_position[better] = state.n_tokens + best[better]
        state.best_gated[better] = gated[best, columns][better]
        state.best_token[better] = chosen[best, columns][better]


def _window(spec: AggregateSpec) -> int:
    return 1 if spec.kind == "max" else spec.window


def _top_k_means(
    state: AggregateState, group: int, x: Float64[ndarray, "n n_columns 3"]
) -> Float64[ndarray, "n n_columns 3"]:
    """The mean of the k largest logits after each token; summed from the largest down."""
    values = np.empty_like(x)
    largest, tokens = state.largest[group], state.largest_at[group]
    for row, logits in enumerate(x):
        position = state.n_tokens + row
        if (logits > largest[-1]).any():
            all_logits = np.concatenate((largest, logits[None]))
            all_tokens = np.concatenate((tokens, np.full((1, *logits.shape), position)))
            order = np.argsort(-all_logits, axis=0, kind="stable")[: len(largest)]
            largest = np.take_along_axis(all_logits, order, axis=0)
            tokens = np.take_along_axis(all_tokens, order, axis=0)
        n = min(position + 1, len(largest))
        total = largest[0].copy()
        for logit in largest[1:n]:
            total += logit
        values[row] = total / n
    state.largest[group], state.largest_at[group] = largest, tokens
    return values


def _kth_largest(
    state: AggregateState,
    index: int,
    x: Float64[ndarray, "n n_columns 3"],
    group: _KOfWindow,
) -> tuple[Float64[ndarray, "n n_columns 3"], Int64[ndarray, "n n_columns"]]:
    """The k-th largest logit of the window that ends at each token, and the fused one's token."""
    values = np.empty_like(x)
    tokens = np.empty(x.shape[:2], np.int64)
    padded = np.concatenate((state.last[index], x))
    for begin in range(0, len(x), CHUNK_TOKENS):
        rows = np.arange(begin, min(begin + CHUNK_TOKENS, len(x)))
        windows = np.lib.stride_tricks.sliding_window_view(
            padded[begin : begin + len(rows) + group.window - 1], group.window, axis=0
        )  # n n_columns 3 window
        rank = np.minimum(state.n_tokens + rows + 1, group.k).reshape(-1, 1, 1, 1)
        order = np.argsort(windows, axis=-1, kind="stable")
        place = np.take_along_axis(order, group.window - rank, axis=-1)
        values[rows] = np.take_along_axis(windows, place, axis=-1)[..., 0]
        first = (state.n_tokens + rows - group.window + 1)[:, None]
        tokens[rows] = first + place[:, :, FUSED, 0]
    state.last[index] = padded[len(x) :].copy()
    return values, tokens
