"""One stream's scoring: tokens or text come in pieces, news goes out, in the order of position.

Whatever waited while the engine was busy is scored as one piece, and news is merged while the
reader is slow, so a stream never costs more messages than its reader takes.

Where a new piece of text changes tokens that were already scored, the session goes back to the last
token that stands and scores on from there; the last few tokens wait for more text, which makes
that rare.

Under overload tokens wait for `gap_seconds` and then become a gap: they get no score, but they
stay part of the context, so that later scores are what they would have been.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from monitor.coverage import StageCount
from monitor.engine import Engine
from monitor.errors import (
    InvalidRequestError,
    MonitorError,
    PayloadTooLargeError,
    QueueFullError,
    StreamPositionError,
)
from monitor.evidence import Evidence
from monitor.inputs import InputReader, TokenInput
from monitor.policy import Crossing
from monitor.records import Alert, Coverage, Gap, Stage, StreamOpen, UnscoredReason
from monitor.stream_text import StreamText
from monitor.timing_sums import TimingSums
from monitor.work_queue import Priority
from sae_core.score_cache import OwnForward
from sae_core.vitals import FitSums

TEXT_HOLDBACK_TOKENS = 4
"""Tokens at the end of a text stream that wait for more text, a flush or the end."""


@dataclass(slots=True)
class News:
    """What happened since the reader last took news."""

    start_index: int | None = None
    """First position scored anew; None where no token was."""
    alerts: list[Alert] = field(default_factory=list)
    """Already recorded and counted."""
    gaps: list[Gap] = field(default_factory=list)
    flushed: bool = False

    def __bool__(self) -> bool:
        return bool(self.alerts or self.gaps or self.flushed) or self.start_index is not None


class StreamScoring:
    """The scoring of one stream; `monitor.pipeline` adds verdict records, audit and metrics.

    Args:
        caller: whose turns in the engine these are; empty for nobody else's.
        gap_seconds: how long tokens may wait under overload before they become a gap.
        on_progress: called on the event loop after every change of coverage.
        on_crossings: records what crossed an alert threshold and gives back the alerts; awaited
            before anything of it becomes news, whether or not anybody reads.
        on_fits: takes how well the SAEs fit some tokens, where the engine measured it.
    """

    def __init__(
        self,
        *,
        opened: StreamOpen,
        reader: InputReader,
        engine: Engine,
        caller: str,
        evidence: Evidence,
        gap_seconds: float,
        on_progress: Callable[[StreamScoring], None],
        on_crossings: Callable[[Sequence[Crossing]], Awaitable[Sequence[Alert]]],
        on_fits: Callable[[Mapping[str, FitSums]], None],
    ) -> None:
        self.evidence = evidence
        self.timings = TimingSums()
        self.first_position = 0
        self._opened = opened
        self._reader = reader
        self._engine = engine
        self._caller = caller or None
        self._gap_seconds = gap_seconds
        self._on_progress = on_progress
        self._on_crossings = on_crossings
        self._on_fits = on_fits
        self._kv = engine.open_stream()
        self._token_ids: list[int] = []
        self._stages: list[Stage | None] = []
        self._text: StreamText | None = None
        self._context = TokenInput(token_ids=[], stages=[])
        self._n_sent = 0
        self._n_refused = 0
        self._flush_asked = False
        self._closing = False
        self._error: Exception | None = None
        self._alerts: list[Alert] = []
        self._gaps: list[Gap] = []
        self._news = News()
        self._wake = asyncio.Event()
        self._arrived = asyncio.Event()
        self._urgent = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Reads the context that precedes the stream and begins to score.

        Raises:
            InvalidRequestError, PayloadTooLargeError: as `InputReader.messages`.
        """
        if self._opened.context_messages:
            self._context = self._reader.messages(
                self._opened.context_messages, open_completion=True
            )
            self._reader.check_length(len(self._context.token_ids))
            self.first_position = len(self._context.token_ids)
            self._token_ids += self._context.token_ids
            self._stages += self._context.stages
            self._wake.set()
        self._worker = asyncio.create_task(self._work())

    def feed(self, start_index: int, *, token_ids: Sequence[int] | None, text: str | None) -> None:
        """Queues the next piece and returns at once.

        Args:
            start_index: tokens (for text: characters) sent before in this stream.

        Raises:
            StreamPositionError: a gap or a rewind in `start_index`.
            InvalidRequestError, FingerprintError, PayloadTooLargeError: as `InputReader`.
        """
        if self._error is not None:
            raise self._error
        if self._closing:
            raise InvalidRequestError("tokens", "more after the end of the stream", "none")
        if (token_ids is None) == (text is None):
            raise InvalidRequestError("tokens", "both or neither", "exactly one of ids, text")
        if self._n_sent and (text is None) != (self._text is None):
            raise InvalidRequestError("tokens", "ids and text in one stream", "one kind a stream")
        piece: Sequence[int] | str = text if text is not None else token_ids or ()
        try:
            if start_index != self._n_sent:
                raise StreamPositionError(
                    f"start_index: found {start_index}, expected {self._n_sent} "
                    f"(the {'characters' if text is not None else 'tokens'} sent so far)"
                )
            if text is not None:
                self._feed_text(text)
            else:
                self._feed_ids(token_ids or ())
        except MonitorError:
            self._n_refused += len(piece) if text is None else 0
            self._on_progress(self)
            raise
        self._n_sent += len(piece)
        self._wake.set()
        self._on_progress(self)

    def flush(self) -> None:
        """Scores text that waits for more; the reader gets news when all is scored."""
        self._flush_asked = True
        self._wake.set()

    async def drain(self) -> None:
        """Ends the input; returns when everything received is scored or a gap.

        Raises whatever stopped the scoring.
        """
        self._closing = True
        self._wake.set()
        if self._worker is not None:
            await asyncio.shield(self._worker)
        if self._error is not None:
            raise self._error

    async def abort(self, reason: UnscoredReason) -> None:
        """Stops at once; what waits is counted as unscored for `reason`."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        self._give_up(reason)

    async def news(self, interval_seconds: float) -> AsyncIterator[News]:
        """News as it comes: alerts, gaps and flushes at once, the rest at most every interval.

        Ends when the stream has been drained or aborted, or has failed.
        """
        last = float("-inf")
        while True:
            done = self._worker is not None and self._worker.done()
            if not done:
                await self._arrived.wait()
                waiting = last + interval_seconds - time.monotonic()
                if waiting > 0 and not self._urgent.is_set():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._urgent.wait(), waiting)
            self._arrived.clear()
            self._urgent.clear()
            news = self.take_news()
            if news:
                last = time.monotonic()
                yield news
            elif self._worker is not None and self._worker.done():
                return

    def coverage(self) -> Coverage:
        """The evidence's coverage, tokens that still wait or were refused included."""
        covered = self.evidence.coverage()
        unscored = dict(covered.unscored)
        received = max(len(self._token_ids), covered.received) + self._n_refused
        if self._n_refused:
            invalid = unscored.get(UnscoredReason.INVALID, 0)
            unscored[UnscoredReason.INVALID] = invalid + self._n_refused
        return Coverage(received=received, scored=covered.scored, unscored=unscored)

    def stage_coverage(self) -> dict[Stage, StageCount]:
        """The same by stage, for the metrics; excluded tokens are left out."""
        counts = self.evidence.stage_coverage()
        for stage in Stage:
            waiting = self._stages[self.evidence.n_tokens :].count(stage)
            if waiting:
                counts.setdefault(stage, StageCount()).received += waiting
        if self._n_refused:
            count = counts.setdefault(self._opened.stage, StageCount())
            count.received += self._n_refused
            invalid = count.unscored.get(UnscoredReason.INVALID, 0)
            count.unscored[UnscoredReason.INVALID] = invalid + self._n_refused
        return counts

    def take_news(self) -> News:
        """What no reader has taken yet."""
        news, self._news = self._news, News()
        return news

    def catch_up(self, processed_index: int, n_alerts: int) -> None:
        """Makes news for a new reader of what one may have missed that had got so far.

        Args:
            processed_index: tokens whose update arrived; gaps are told from there on too.
            n_alerts: alerts that arrived.
        """
        self._news.flushed = True  # the answer to a flush may be among it
        self._news.alerts = self._alerts[n_alerts:]
        self._news.gaps = [gap for gap in self._gaps if gap.stop_index > processed_index]
        if processed_index < self.evidence.n_tokens:
            first = self.evidence.n_tokens
            start = first if self._news.start_index is None else self._news.start_index
            self._news.start_index = min(start, processed_index)
        self._arrived.set()
        self._urgent.set()

    @property
    def next_index(self) -> int:
        """What has been received after the context: tokens, or characters of text."""
        return self._n_sent

    @property
    def has_failed(self) -> bool:
        """Whether an error has ended the scoring."""
        return self._error is not None

    @property
    def token_ids(self) -> list[int]:
        """Every token received, context included."""
        return self._token_ids

    def _feed_ids(self, token_ids: Sequence[int]) -> None:
        self._reader.check_fingerprint(self._opened.tokenizer_fingerprint)
        tokens = self._reader.ids(token_ids, self._opened.stage)
        self._reader.check_length(len(self._token_ids) + len(token_ids))
        self._token_ids += tokens.token_ids
        self._stages += tokens.stages

    def _feed_text(self, text: str) -> None:
        if not text:
            raise InvalidRequestError("tokens.text", "an empty string", "at least one character")
        if self._text is None:
            self._text = StreamText(self._reader, self._opened.stage, self._context)
        self._text.append(text)

    async def _work(self) -> None:
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                flush = self._flush_asked or self._closing
                if self._text is not None and self._text.is_unread:
                    await self._read_text(self._text)
                await self._score_up_to(self._target(flush))
                if (self._text is not None and self._text.is_unread) or (
                    self._closing and not flush
                ):
                    self._wake.set()
                    continue
                if flush and self._flush_asked:
                    self._flush_asked = False
                    self._tell(urgent=True, flushed=True)
                if self._closing:
                    return
        except Exception as error:
            self._error = error
            self._give_up(UnscoredReason.ERROR)
        finally:
            self._engine.close_stream(self._kv)
            self._arrived.set()
            self._urgent.set()

    def _target(self, flush: bool) -> int:
        holdback = 0 if flush or self._text is None else TEXT_HOLDBACK_TOKENS
        return max(len(self._token_ids) - holdback, self.first_position)

    async def _read_text(self, text: StreamText) -> None:
        """Brings the tokens up to the text; goes back where scored tokens changed."""
        started = time.monotonic()
        tokens, n_kept = await text.read()
        self._token_ids, self._stages = tokens.token_ids, tokens.stages
        self.timings.tokenize_seconds += time.monotonic() - started
        if len(self._token_ids) > self._reader.max_request_tokens:
            raise PayloadTooLargeError(
                f"tokens: found {len(self._token_ids)}, "
                f"expected at most {self._reader.max_request_tokens}"
            )
        n_scored = self.evidence.n_tokens
        kept = min(n_kept, n_scored)
        pairs = zip(self.evidence.token_ids(kept), self._token_ids[kept:], strict=False)
        stands = next(
            (i for i, (a, b) in enumerate(pairs, kept) if a != b),
            min(n_scored, len(self._token_ids)),
        )
        if stands < n_scored:
            self.evidence.truncate(stands)
        if stands < self._kv.length:
            self._kv.truncate(stands)
        self._on_progress(self)

    async def _score_up_to(self, target: int) -> None:
        waited_since = time.monotonic()
        while self.evidence.n_tokens < target:
            start = self.evidence.n_tokens
            stages = self._stages[start:target]
            # Tokens of an earlier gap are still to be read: the model's context has no holes.
            piece = self._token_ids[self._kv.length : target]
            completion = Stage.COMPLETION in stages
            try:
                result = await self._engine.score(
                    OwnForward(self._kv, piece),
                    priority=Priority.COMPLETION if completion else Priority.PROMPT,
                    caller=self._caller,
                )
            except QueueFullError as error:
                if time.monotonic() - waited_since < self._gap_seconds:
                    await asyncio.sleep(min(error.retry_seconds, self._gap_seconds / 4))
                    continue
                self._make_gap(start, target, str(error))
                return
            began = time.monotonic()
            self.timings.add(result)
            self._on_fits(result.fits)
            new = target - start
            crossings = await self.evidence.add_in_slices(
                self._token_ids[start:target],
                stages,
                result.logits[-new:],
                result.latent_acts[-new:],
            )
            self.timings.score_seconds += time.monotonic() - began
            alerts = await self._on_crossings(crossings) if crossings else ()
            if self._news.start_index is None or start < self._news.start_index:
                self._news.start_index = start
            self._alerts += alerts
            self._news.alerts += alerts
            self._tell(urgent=bool(alerts))

    def _make_gap(self, start: int, stop: int, message: str) -> None:
        self.evidence.skip(
            self._token_ids[start:stop], self._stages[start:stop], UnscoredReason.OVERLOAD
        )
        gap = Gap(
            start_index=start, stop_index=stop, reason=UnscoredReason.OVERLOAD, message=message
        )
        self._gaps.append(gap)
        self._news.gaps.append(gap)
        self._tell(urgent=True)

    def _give_up(self, reason: UnscoredReason) -> None:
        if self._text is not None and self._text.is_unread:
            # Text that the worker never came to was received all the same.
            tokens = self._text.read_at_once().tokens
            known = len(self._token_ids)
            self._token_ids = self._token_ids + tokens.token_ids[known:]
            self._stages = self._stages + tokens.stages[known:]
        start = self.evidence.n_tokens
        if start < len(self._token_ids):
            self.evidence.skip(self._token_ids[start:], self._stages[start:], reason)
        self._on_progress(self)

    def _tell(self, *, urgent: bool, flushed: bool = False) -> None:
        self._news.flushed = self._news.flushed or flushed
        self._on_progress(self)
        self._arrived.set()
        if urgent:
            self._urgent.set()
