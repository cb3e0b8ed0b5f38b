"""The calls that hold streams, and the streams that wait for a caller to come back.

A resumable stream whose call breaks off stays, with its scores, and its keys and values in the
cache's budget, until it is reopened, or until nobody came for too long: then it ends as cancelled.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Sequence
from types import TracebackType

from monitor.errors import (
    InvalidRequestError,
    MonitorError,
    QueueFullError,
    StreamBrokenError,
    StreamNotFoundError,
    StreamPositionError,
)
from monitor.live_stream import LiveStream
from monitor.metrics import Metrics
from monitor.metrics.labels import Outcome, Rejection, Resume
from monitor.records import Decision, StreamOpen, StreamUpdate, UnscoredReason


class OpenStreams:
    """Every stream that is open. Call from one event loop.

    Args:
        max_streams: streams that calls may hold at the same time.
        resume_seconds: how long a resumable stream waits to be reopened; 0 for not at all.
        max_detached: streams that may wait so; the one that has waited for longest gives way.
    """

    def __init__(
        self, metrics: Metrics, *, max_streams: int, resume_seconds: float, max_detached: int
    ) -> None:
        self.n_open = 0
        """Streams that a call holds now."""
        self._metrics = metrics
        self._max_streams = max_streams
        self._resume_seconds = resume_seconds
        self._max_detached = max_detached
        self._resumable: dict[str, LiveStream] = {}
        self._holders: dict[str, StreamSession] = {}
        self._coming: Counter[str] = Counter()
        """Calls that wait for a stream's holder to leave, by the stream's name."""
        self._detached: OrderedDict[str, asyncio.TimerHandle] = OrderedDict()
        self._ending: set[asyncio.Task[None]] = set()

    def check_room(self) -> None:
        """Raises QueueFullError where as many streams are held as may be."""
        if self.n_open >= self._max_streams:
            self._metrics.rejected(Rejection.CONCURRENCY)
            raise QueueFullError(
                f"streams: {self.n_open} are open, expected at most {self._max_streams}",
                retry_seconds=1.0,
            )

    def reopened(self, opened: StreamOpen) -> StreamSession:
        """A call's hold on a stream that is to be reopened.

        Raises:
            StreamNotFoundError: there is no such stream of this caller.
            StreamPositionError: the caller cannot send what has not been received.
        """
        assert opened.resume is not None
        stream = self._resumable.get(opened.session_id)
        if stream is None or stream.opened.caller != opened.caller:
            raise self._not_found(opened.session_id)
        received = stream.scoring.next_index
        if opened.resume.start_index > received:
            raise StreamPositionError(
                f"resume.start_index: found {opened.resume.start_index}, expected at most "
                f"{received} (what was received of the stream)"
            )
        return StreamSession(stream, self, opened)

    async def enter(self, session: StreamSession, opened: StreamOpen) -> None:
        """Gives a stream to a call, in place of the one that holds it."""
        stream = session.stream
        if opened.resume is None:
            self._start(stream)
        else:
            await self._take_over(stream, opened.session_id)
            stream.scoring.catch_up(opened.resume.processed_index, opened.resume.n_alerts)
            self._metrics.stream_resume(Resume.RESUMED)
        if stream.session_id in self._resumable:
            self._holders[stream.session_id] = session
        self.n_open += 1
        self._metrics.stream_opened()

    async def leave(self, session: StreamSession, error: BaseException | None) -> None:
        """Takes a stream from a call that ends: to wait, to be forgotten, or to another call."""
        stream, name = session.stream, session.session_id
        self.n_open -= 1
        self._metrics.stream_closed()
        if self._holders.get(name) is session:
            del self._holders[name]
        session.left.set()
        is_broken = error is not None and (
            session.taken_over.is_set()
            or isinstance(error, StreamBrokenError)
            or not isinstance(error, MonitorError)
        )
        if self._resumable.get(name) is stream:
            if self._coming[name]:
                return
            if is_broken and not stream.scoring.has_failed:
                self._detach(stream)
                return
            del self._resumable[name]
        if stream.is_finished:
            return
        if isinstance(error, MonitorError) and not isinstance(error, StreamBrokenError):
            await stream.break_off(UnscoredReason.INVALID, Outcome.REJECTED)
        else:
            await stream.break_off(UnscoredReason.CANCELLED, Outcome.CANCELLED)

    async def end_detached(self) -> None:
        """Ends every stream that waits to be reopened, and returns when all are on record."""
        for name in list(self._detached):
            self._expire(name)
        await asyncio.gather(*self._ending)

    def _start(self, stream: LiveStream) -> None:
        keeps = stream.opened.resumable and self._resume_seconds > 0
        if keeps and stream.session_id in self._resumable:
            raise InvalidRequestError(
                "session_id", "one of a resumable stream that is open", "another, or `resume`"
            )
        stream.scoring.start()
        if keeps:
            self._resumable[stream.session_id] = stream

    async def _take_over(self, stream: LiveStream, name: str) -> None:
        self._coming[name] += 1
        try:
            while (holder := self._holders.get(name)) is not None:
                # A caller often comes back before its broken connection is noticed here.
                holder.taken_over.set()
                await holder.left.wait()
        except asyncio.CancelledError:
            is_last = self._coming[name] == 1 and name not in self._holders
            if is_last and self._resumable.get(name) is stream:
                self._detach(stream)  # the holder left it to this call
            raise
        finally:
            self._coming[name] -= 1
            if not self._coming[name]:
                del self._coming[name]
        if self._resumable.get(name) is not stream:
            raise self._not_found(name)
        timer = self._detached.pop(name, None)
        if timer is not None:
            timer.cancel()
            self._metrics.streams_detached(len(self._detached))

    def _detach(self, stream: LiveStream) -> None:
        while len(self._detached) >= self._max_detached:
            self._expire(next(iter(self._detached)))
        loop = asyncio.get_running_loop()
        name = stream.session_id
        self._detached[name] = loop.call_later(self._resume_seconds, self._expire, name)
        self._metrics.streams_detached(len(self._detached))

    def _expire(self, name: str) -> None:
        self._detached.pop(name).cancel()
        self._metrics.streams_detached(len(self._detached))
        self._metrics.stream_resume(Resume.EXPIRED)
        stream = self._resumable.pop(name)
        if not stream.is_finished:
            end = stream.break_off(UnscoredReason.CANCELLED, Outcome.CANCELLED)
            task = asyncio.create_task(end)
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    def _not_found(self, name: str) -> StreamNotFoundError:
        self._metrics.stream_resume(Resume.NOT_FOUND)
        return StreamNotFoundError(
            f"session_id: found no stream {name!r:.80} to reopen here, expected one that broke off "
            f"at most {self._resume_seconds:g} seconds ago; open it anew and send it from index 0"
        )


class StreamSession:
    """One call's hold on a stream. Leaving the context without `finish` cancels the stream.

    A resumable one waits to be reopened where the context is left by a StreamBrokenError, or by
    anything but a MonitorError.
    """

    def __init__(self, stream: LiveStream, streams: OpenStreams, opened: StreamOpen) -> None:
        self.decision_id = stream.decision_id
        self.session_id = stream.session_id
        self.stream = stream
        self.taken_over = asyncio.Event()
        """Set when another call reopens the stream; this one has to end."""
        self.left = asyncio.Event()
        """Set when this call has ended."""
        self._streams = streams
        self._opened = opened

    @property
    def n_received(self) -> int:
        """Positions known so far: the context, and the tokens of earlier calls."""
        return len(self.stream.scoring.token_ids)

    @property
    def is_resumable(self) -> bool:
        """Whether the caller asked for it, and so ends the stream by saying so."""
        return self.stream.opened.resumable

    @property
    def next_index(self) -> int:
        """The `start_index` of the next piece."""
        return self.stream.scoring.next_index

    async def __aenter__(self) -> StreamSession:
        await self._streams.enter(self, self._opened)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._streams.leave(self, error)

    async def feed(
        self,
        start_index: int,
        *,
        token_ids: Sequence[int] | None = None,
        text: str | None = None,
    ) -> None:
        """Queues the next piece; see `StreamScoring.feed` for what it raises."""
        self.stream.scoring.feed(start_index, token_ids=token_ids, text=text)

    async def flush(self) -> None:
        """Scores text that waits for more; an update follows when all is scored."""
        self.stream.scoring.flush()

    def updates(self) -> AsyncIterator[StreamUpdate]:
        """Running results, merged while nobody reads; an alert is on disk before it is yielded.

        Ends when `finish` or the end of the context has ended the stream.
        """
        return self.stream.updates()

    async def finish(self) -> Decision:
        """Ends the input, waits for the last score, records and returns the decision."""
        return await self.stream.finish()
