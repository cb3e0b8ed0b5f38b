"""Token logits to running evidence, one number per cluster and source; NumPy only.

A stream's state is a few numbers per cluster plus the last `window` logits. Every token is
folded in by the same operations in the same order whatever the chunk it came in, so whole,
chunked and token-by-token input give the same bits. Nothing here knows tokens or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from numpy import ndarray

from sae_core.errors import HeadError, ScorerError, ShapeError

AggregateKind = Literal["max_rolling_mean", "max", "mean", "ema"]
SOURCES = ("fused", "dense", "sae")
"""The last axis of logits and scores, in this order."""
FUSED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregateSpec:
    """How one cluster's token logits become one score."""

    kind: AggregateKind = "max_rolling_mean"
    """`max_rolling_mean`: largest mean of the last `window` tokens (fewer at the start); `max`:
    the same with window 1; `mean`: mean of all tokens; `ema`: largest exponential average."""
    window: int = 16
    """Tokens in the rolling mean; read by `max_rolling_mean` only."""
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


class _Rolling(NamedTuple):
    columns: Int64[ndarray, " n_columns"]
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
    evidence: Int64[ndarray, " n_clusters"]
    score: Float64[ndarray, "n_clusters 3"]
    best_position: Int64[ndarray, " n_clusters"]
    best_gated: Bool[ndarray, " n_clusters"]

    def copy(self) -> AggregateState:
        """An independent state that continues from the same evidence."""
        return AggregateState(
            n_tokens=self.n_tokens,
            recent=[history.copy() for history in self.recent],
            total=self.total.copy(),
            average=self.average.copy(),
            evidence=self.evidence.copy(),
            score=self.score.copy(),
            best_position=self.best_position.copy(),
            best_gated=self.best_gated.copy(),
        )


class Aggregator:
    """The aggregates of all clusters, in the order of `specs`; holds no stream's state."""

    def __init__(self, specs: Sequence[AggregateSpec]) -> None:
        self.specs = tuple(specs)
        windows: dict[int, list[int]] = {}
        for column, spec in enumerate(self.specs):
            if spec.kind in ("max_rolling_mean", "max"):
                windows.setdefault(_window(spec), []).append(column)
        self._rolling = [_Rolling(np.array(c, np.int64), w) for w, c in windows.items()]
        ema = [c for c, spec in enumerate(self.specs) if spec.kind == "ema"]
        self._ema = _Ema(
            np.array(ema, np.int64),
            np.array([self.specs[c].alpha for c in ema], np.float64).reshape(-1, 1),
        )
        self._mean = np.array([c for c, s in enumerate(self.specs) if s.kind == "mean"], np.int64)
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
            evidence=np.zeros(n, np.int64),
            score=np.full((n, 3), -np.inf),
            best_position=np.full(n, -1, np.int64),
            best_gated=np.zeros(n, np.bool_),
        )

    def update(
        self, state: AggregateState, logits: Float32[ndarray, "n n_clusters 3"]
    ) -> Float64[ndarray, "n n_clusters 3"]:
        """Folds new tokens into `state`; the running score after each of them.

        Raises ScorerError, with `state` unchanged, where a logit is not finite.
        """
        if logits.ndim != 3 or logits.shape[1:] != (len(self.specs), 3):
            raise ShapeError(f"logits are {logits.shape}, expected (n, {len(self.specs)}, 3)")
        if not np.isfinite(logits).all():
            n, c, s = np.argwhere(~np.isfinite(logits))[0]
            found = f"{SOURCES[s]} logit {logits[n, c, s]} of cluster {c}"
            raise ScorerError(f"{found} at token {state.n_tokens + n}, expected finite")
        if len(logits) == 0:
            return np.empty((0, len(self.specs), 3))
        x = logits.astype(np.float64)  # n n_clusters 3
        values = self._values(state, x)
        gated = self._gate(state, x, values)
        running = np.concatenate((state.score[None], values))
        np.maximum.accumulate(running, out=running)
        running = running[1:]
        running[:, self._mean] = values[:, self._mean]
        self._remember_best(state, values[:, :, FUSED], gated)
        state.score = running[-1].copy()
        state.n_tokens += len(x)
        return running

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
        n = stop if spec.kind == "mean" else min(_window(spec), stop)
        return Support(stop - n, stop, np.full(n, 1 / n), gated)

    def _values(
        self, state: AggregateState, x: Float64[ndarray, "n n_clusters 3"]
    ) -> Float64[ndarray, "n n_clusters 3"]:
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
    ) -> None:
        best = fused.argmax(axis=0)
        best[self._mean] = len(fused) - 1
        columns = np.arange(fused.shape[1])
        better = fused[best, columns] > state.score[:, FUSED]
        better[self._mean] = True
        state.best_position[better] = state.n_tokens + best[better]
        state.best_gated[better] = gated[best, columns][better]


def _window(spec: AggregateSpec) -> int:
    return 1 if spec.kind == "max" else spec.window
