"""Many streams' keys and values under one budget of bytes.

A stream's tokens are kept as long as the stream; its keys and values as long as there is room for
them. What was dropped is recomputed from the tokens when the stream is next used, before its new
tokens, so that a caller notices nothing but the time. Knows no queue and no clock: `begin`, `end`
and `settle` are called by one thread, which also runs the steps; everything else by any.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
from jaxtyping import Float32

from sae_core.language_model.model import Segment
from sae_core.language_model.packed import KVStream
from sae_core.scorer import SegmentScores


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCounts:
    """Where a cache stands now, and what it did since it was made."""

    sessions: int
    """Streams that are open, those without keys and values included."""
    session_bytes: int
    """Their keys and values, unused capacity included."""
    evicted_for_memory: int
    """Times that an idle stream lost its keys and values to the budget."""
    evicted_at_close: int
    """Streams that were closed while they had any."""
    recomputed_tokens: int
    """Tokens that went through the model again after an eviction."""


class ScoredStream:
    """One stream: the tokens that were scored, and what there still is of their keys and values."""

    def __init__(self, kv: KVStream) -> None:
        self.kv = kv
        """Rows for the first tokens, maybe for none; the stepping thread's."""
        self.token_ids: list[int] = []
        """Grows with every step; the caller's while it waits for no score."""
        self.closed = False
        self.last_use = 0
        self.n_bytes = 0
        """`kv.cache_bytes` after the last step."""

    @property
    def length(self) -> int:
        """Tokens that later tokens can attend to."""
        return len(self.token_ids)

    def truncate(self, n: int) -> None:
        """Forgets all but the first `n` tokens; not while new ones are on their way."""
        if not 0 <= n <= self.length:
            raise ValueError(f"truncate: found {n}, expected 0 to the length {self.length}")
        del self.token_ids[n:]


class Continuation:
    """New tokens of one stream on their way through steps, behind those to recompute."""

    def __init__(self, stream: ScoredStream, token_ids: Sequence[int]) -> None:
        self.stream = stream
        self.n_scored = 0
        """New tokens that have their scores."""
        self.n_recomputed = 0
        self._token_ids = token_ids
        self._first = stream.length
        self._logits: list[Float32[np.ndarray, "n n_clusters 3"]] = []
        self._latent_acts: list[Float32[np.ndarray, "n n_latents"]] = []
        stream.kv.truncate(min(stream.kv.length, stream.length))

    @property
    def n_to_run(self) -> int:
        """Tokens that still have to go through the model, recomputed ones included."""
        return self._first + len(self._token_ids) - self.stream.kv.length

    def segment(self, n: int) -> Segment:
        """The next `n` tokens for a step."""
        start = self.stream.kv.length
        token_ids = self.stream.token_ids[start : start + n]
        new = self._token_ids[self.n_scored : self.n_scored + n - len(token_ids)]
        return Segment(self.stream.kv, [*token_ids, *new])

    def take(self, segment: Segment, scores: SegmentScores) -> None:
        """Keeps what a step made of `segment`, but for recomputed tokens: theirs are known."""
        stream, n = self.stream, len(segment.token_ids)
        n_old = min(n, max(0, stream.length - (stream.kv.length - n)))
        self.n_recomputed += n_old
        if n_old < n:
            stream.token_ids += segment.token_ids[n_old:]
            self.n_scored += n - n_old
            self._logits.append(scores.logits[n_old:])
            self._latent_acts.append(scores.latent_acts[n_old:])

    def scores(self) -> SegmentScores:
        """The scores of all new tokens, once there are none left."""
        if len(self._logits) == 1:
            return SegmentScores(self._logits[0], self._latent_acts[0])
        return SegmentScores(np.concatenate(self._logits), np.concatenate(self._latent_acts))


class ScoreCache:
    """Opens streams, and keeps the keys and values of the idle ones within `max_bytes`.

    A stream between `begin` and `end` is never evicted: two that are longer together than the
    budget would else undo each other's work for ever. `admits` says whether another one fits.
    What the begun ones need beyond the budget is held for as long as they need it.
    """

    def __init__(self, open_kv: Callable[[], KVStream], max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._open_kv = open_kv
        self._lock = Lock()
        self._open: weakref.WeakSet[ScoredStream] = weakref.WeakSet()
        self._begun: dict[ScoredStream, int] = {}
        self._row_bytes = 0
        self._clock = 0
        self._evicted_for_memory = 0
        self._evicted_at_close = 0
        self._recomputed_tokens = 0

    def open_stream(self) -> ScoredStream:
        """A stream without tokens; its memory goes with `close`, or with the object."""
        stream = ScoredStream(self._open_kv())
        with self._lock:
            self._open.add(stream)
        return stream

    def close(self, stream: ScoredStream) -> None:
        """Frees the keys and values of a stream that will not be used again.

        Where new tokens are on their way, at their `end`.
        """
        with self._lock:
            self._open.discard(stream)
            if not stream.closed:
                stream.closed = True
                self._evicted_at_close += stream.n_bytes > 0
            if stream not in self._begun:
                self._release(stream)

    def admits(self, stream: ScoredStream, n_new: int) -> bool:
        """Whether `stream` with `n_new` more tokens fits beside those begun; alone it does."""
        needed = (stream.length + n_new) * self._row_bytes
        return not self._begun or sum(self._begun.values()) + needed <= self.max_bytes

    def begin(self, stream: ScoredStream, token_ids: Sequence[int]) -> Continuation:
        """Takes `token_ids` as the continuation of `stream`, which stays until `end`."""
        with self._lock:
            self._begun[stream] = (stream.length + len(token_ids)) * self._row_bytes
            return Continuation(stream, token_ids)

    def end(self, continuation: Continuation) -> None:
        """Lets go of the stream, whether or not all its tokens were scored."""
        stream = continuation.stream
        with self._lock:
            del self._begun[stream]
            self._recomputed_tokens += continuation.n_recomputed
            if stream.closed:
                self._release(stream)

    def settle(self, used: Iterable[ScoredStream]) -> None:
        """After a step over `used`: evicts idle streams, longest unused first, until all fits."""
        with self._lock:
            self._clock += 1
            for stream in used:
                stream.last_use = self._clock
                stream.n_bytes = stream.kv.cache_bytes
                self._row_bytes = stream.kv.row_bytes or self._row_bytes
            held = sum(stream.n_bytes for stream in self._open)
            if held <= self.max_bytes:
                return
            idle = (s for s in self._open if s.n_bytes and s not in self._begun)
            for stream in sorted(idle, key=lambda s: s.last_use):
                held -= stream.n_bytes
                self._release(stream)
                self._evicted_for_memory += 1
                if held <= self.max_bytes:
                    return

    def counts(self) -> CacheCounts:
        """For metrics."""
        with self._lock:
            return CacheCounts(
                sessions=len(self._open),
                session_bytes=sum(stream.n_bytes for stream in self._open),
                evicted_for_memory=self._evicted_for_memory,
                evicted_at_close=self._evicted_at_close,
                recomputed_tokens=self._recomputed_tokens,
            )

    @staticmethod
    def _release(stream: ScoredStream) -> None:
        stream.kv.release()
        stream.n_bytes = 0
