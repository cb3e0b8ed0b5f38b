"""Many streams' keys and values, and blocks of tokens seen before, under one budget of bytes.

A stream's tokens are kept as long as the stream; its keys and values as long as there is room for
them. What was dropped is recomputed from the tokens when the stream is next used, before its new
tokens, so that a caller notices nothing but the time. Blocks outlive their streams: whoever reads
the same tokens from the start takes their rows and scores over without a forward pass.

Knows no queue and no clock. `begin`, `take`, `end`, `settle` and `drop_idle`, and everything of a
`Continuation`, are called by one thread, which also runs the steps; the rest by any.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float32

from sae_core.activation_source import GivenActivations, GivenRows
from sae_core.language_model.model import Segment
from sae_core.language_model.pages import PageCounts, PagePool
from sae_core.language_model.token_streams import TokenStream
from sae_core.prefix_blocks import BLOCK_TOKENS, Block, PrefixBlocks, ScoreTail, extend_chain
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
    """Tokens that went through the model again, after an eviction or far back from a window."""
    prefix_blocks: int
    prefix_bytes: int
    prefix_evictions: int
    """Blocks that were dropped for the budget."""
    reused_tokens: int
    """Tokens that did not go through the model, as a block had them."""
    pages: PageCounts | None = None
    """None where every stream has buffers of its own. Memory of shared pages counts as the
    blocks', each page once."""


class ScoredStream:
    """One stream: the tokens that were scored, and what there still is of their keys and values."""

    def __init__(self, kv: TokenStream, *, reuses: bool = True) -> None:
        self.kv = kv
        """Rows for the first tokens, maybe for none; the stepping thread's."""
        self.reuses = reuses
        """Whether it takes known blocks over and leaves its own behind."""
        self.token_ids: list[int] = []
        """Grows with every step; the caller's while it waits for no score."""
        self.chain: list[bytes] = []
        """Names of its whole blocks, those of tokens on their way included."""
        self.tail = ScoreTail()
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


@dataclass(frozen=True, slots=True)
class OwnForward:
    """Our own forward pass over new tokens of a stream."""

    stream: ScoredStream
    token_ids: Sequence[int]

    @property
    def n_tokens(self) -> int:
        """How many tokens the stream grows by."""
        return len(self.token_ids)


ActivationSource: TypeAlias = OwnForward | GivenActivations
"""Where the activations of some tokens come from."""


class GivenRun:
    """Given activations on their way through steps; holds no keys and values."""

    def __init__(self, given: GivenActivations) -> None:
        self.n_scored = 0
        self._given = given
        self._scores: list[SegmentScores] = []

    @property
    def n_to_run(self) -> int:
        """Tokens that still have to be scored."""
        return self._given.n_tokens - self.n_scored

    def restore(self) -> None:
        """There is nothing to take over."""

    def part(self, n: int) -> GivenRows:
        """The next `n` tokens for a step."""
        return self._given.part(self.n_scored, self.n_scored + n)

    def take(self, scores: SegmentScores) -> None:
        """Keeps what a step made of the part."""
        self.n_scored += len(scores.logits)
        self._scores.append(scores)

    def scores(self) -> SegmentScores:
        """The scores of all tokens, once there are none left."""
        return _joined(self._scores)


class Continuation:
    """New tokens of one stream on their way through steps, behind those to recompute."""

    def __init__(self, stream: ScoredStream, token_ids: Sequence[int]) -> None:
        self.stream = stream
        self.blocks: list[Block] = []
        """Known blocks from the stream's end on, which `restore` takes over."""
        self.n_scored = 0
        """New tokens that have their scores."""
        self.n_recomputed = 0
        self.n_reused = 0
        self._token_ids = token_ids
        self._first = stream.length
        self._logits: list[Float32[np.ndarray, "n n_clusters 3"]] = []
        self._latent_acts: list[Float32[np.ndarray, "n n_latents"]] = []
        stream.kv.truncate(min(stream.kv.length, stream.length))
        stream.tail.cut(stream.kv.length)

    @property
    def n_to_run(self) -> int:
        """Tokens that still have to go through the model, recomputed ones included."""
        rows = self.stream.kv.length
        if self.blocks:
            rows = (rows // BLOCK_TOKENS + len(self.blocks)) * BLOCK_TOKENS
        return self._first + len(self._token_ids) - rows

    def restore(self) -> None:
        """Takes known blocks over; call before the first segment."""
        if not self.blocks:
            return
        stream, old = self.stream, self.stream.kv.length
        stream.kv.paste_rows(old // BLOCK_TOKENS * BLOCK_TOKENS, [b.rows for b in self.blocks])
        self.n_reused += stream.kv.length - old
        n_new = stream.kv.length - stream.length
        if n_new > 0:
            stream.token_ids += self._token_ids[:n_new]
            self.n_scored += n_new
            self._logits.append(np.concatenate([b.scores.logits for b in self.blocks])[-n_new:])
            acts = [b.scores.latent_acts for b in self.blocks]
            self._latent_acts.append(np.concatenate(acts)[-n_new:])
        self.blocks = []

    def part(self, n: int) -> Segment:
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
        pairs = zip(self._logits, self._latent_acts, strict=True)
        return _joined([SegmentScores(*pair) for pair in pairs])


def _joined(parts: Sequence[SegmentScores]) -> SegmentScores:
    if len(parts) == 1:
        return parts[0]
    logits = np.concatenate([part.logits for part in parts])
    return SegmentScores(logits, np.concatenate([part.latent_acts for part in parts]))


class ScoreCache:
    """Opens streams, and keeps what idle ones and known blocks hold within `max_bytes`.

    A stream between `begin` and `end` is never evicted: two that are longer together than the
    budget would else undo each other's work for ever. `admits` says whether another one fits.
    What the begun ones need beyond the budget is held for as long as they need it.

    Args:
        key: names all that scores depend on beside the tokens; None where nothing is to be reused.
        blocks: those to begin with; a key that differs finds nothing in them.
    """

    def __init__(
        self,
        open_kv: Callable[[], TokenStream],
        max_bytes: int,
        *,
        key: bytes | None = None,
        blocks: PrefixBlocks | None = None,
    ) -> None:
        self.max_bytes = max_bytes
        self._open_kv = open_kv
        self._key = key if max_bytes else None
        self._blocks = PrefixBlocks() if blocks is None else blocks
        self._lock = Lock()
        self._open: weakref.WeakSet[ScoredStream] = weakref.WeakSet()
        self._begun: dict[ScoredStream, int] = {}
        self._pool: PagePool | None = None
        self._row_bytes = 0
        self._clock = 1
        self._evicted_for_memory = 0
        self._evicted_at_close = 0
        self._recomputed_tokens = 0
        self._prefix_evictions = 0
        self._reused_tokens = 0

    def open_stream(self, *, reuses: bool = True) -> ScoredStream:
        """A stream without tokens; its memory goes with `close`, or with the object."""
        stream = ScoredStream(self._open_kv(), reuses=reuses)
        with self._lock:
            self._pool = stream.kv.pool
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

    def admits(self, source: OwnForward) -> bool:
        """Whether the stream with its new tokens fits beside those begun; alone it does."""
        needed = (source.stream.length + source.n_tokens) * self._row_bytes
        return not self._begun or sum(self._begun.values()) + needed <= self.max_bytes

    def begin(self, source: OwnForward) -> Continuation:
        """Takes new tokens as the continuation of their stream, which stays until `end`."""
        stream, token_ids = source.stream, source.token_ids
        with self._lock:
            self._begun[stream] = (stream.length + len(token_ids)) * self._row_bytes
        continuation = Continuation(stream, token_ids)
        if self._key is not None and stream.reuses:
            chain = stream.chain
            del chain[stream.length // BLOCK_TOKENS :]
            named = len(chain) * BLOCK_TOKENS
            extend_chain(chain, self._key, [*stream.token_ids[named:], *token_ids])
            first = stream.kv.length // BLOCK_TOKENS
            continuation.blocks = self._blocks.find(chain[first:])
            if continuation.blocks:
                self._blocks.touch(chain[: first + len(continuation.blocks)], self._clock)
        return continuation

    def take(self, continuation: Continuation, segment: Segment, scores: SegmentScores) -> None:
        """Gives a continuation what a step made of its segment, and keeps the blocks now whole."""
        continuation.take(segment, scores)
        stream = continuation.stream
        if self._key is None or not stream.reuses:
            return
        stream.tail.append(stream.kv.length - len(segment.token_ids), scores)
        n_whole = stream.kv.length // BLOCK_TOKENS
        for index in range(stream.tail.start // BLOCK_TOKENS, n_whole):
            name = stream.chain[index]
            block_scores = None if name in self._blocks else stream.tail.block(index)
            if block_scores is not None:
                start = index * BLOCK_TOKENS
                try:
                    rows = stream.kv.copy_rows(start, start + BLOCK_TOKENS)
                except (MemoryError, torch.OutOfMemoryError):
                    break  # the scores are there: only the next caller has to compute them
                self._blocks.add(name, Block(rows, block_scores, self._clock))
        # As young as their stream, so that they outlive it and bring it back.
        self._blocks.touch(stream.chain[:n_whole], self._clock)
        # One whole block stays for a text that goes back a few tokens.
        stream.tail.drop_before((n_whole - 1) * BLOCK_TOKENS)

    def end(self, continuation: Continuation) -> None:
        """Lets go of the stream, whether or not all its tokens were scored."""
        stream = continuation.stream
        with self._lock:
            del self._begun[stream]
            self._recomputed_tokens += continuation.n_recomputed
            self._reused_tokens += continuation.n_reused
            stream.n_bytes = stream.kv.cache_bytes  # a step that failed has taken some too
            if stream.closed:
                self._release(stream)

    def settle(self, used: Iterable[ScoredStream]) -> None:
        """After a step over `used`: drops what was unused for longest until all fits."""
        with self._lock:
            for stream in used:
                stream.last_use = self._clock
                stream.n_bytes = stream.kv.cache_bytes
                self._row_bytes = stream.kv.row_bytes or self._row_bytes
            self._clock += 1
            self._evict(self.max_bytes)

    def drop_idle(self) -> None:
        """Gives back all that can be recomputed: the memory is needed for a step."""
        with self._lock:
            self._evict(0)

    def _evict(self, max_bytes: int) -> None:
        streams = sum(stream.n_bytes for stream in self._open)
        if self._held(streams) <= max_bytes:
            return
        idle = [s for s in self._open if s.n_bytes and s not in self._begun]
        idle.sort(key=lambda s: s.last_use, reverse=True)
        while self._held(streams) > max_bytes and (idle or len(self._blocks)):
            # At a tie the stream goes: its blocks bring it back, and others too.
            if idle and idle[-1].last_use <= self._blocks.oldest_use():
                streams -= idle[-1].n_bytes
                self._release(idle.pop())
                self._evicted_for_memory += 1
            else:
                self._blocks.drop_oldest()
                self._prefix_evictions += 1

    def counts(self) -> CacheCounts:
        """For metrics."""
        with self._lock:
            pool = self._pool
            streams = sum(stream.n_bytes for stream in self._open)
            shared = 0 if pool is None else pool.shared_bytes
            return CacheCounts(
                sessions=len(self._open),
                session_bytes=self._held(streams) - self._blocks.n_bytes - shared,
                evicted_for_memory=self._evicted_for_memory,
                evicted_at_close=self._evicted_at_close,
                recomputed_tokens=self._recomputed_tokens,
                prefix_blocks=len(self._blocks),
                prefix_bytes=self._blocks.n_bytes + shared,
                prefix_evictions=self._prefix_evictions,
                reused_tokens=self._reused_tokens,
                pages=None if pool is None else pool.counts(),
            )

    def _held(self, stream_bytes: int) -> int:
        """Memory of streams and blocks; pages that several of them hold count once."""
        held = stream_bytes if self._pool is None else self._pool.n_bytes
        return held + self._blocks.n_bytes

    @staticmethod
    def _release(stream: ScoredStream) -> None:
        stream.kv.release()
        stream.n_bytes = 0
