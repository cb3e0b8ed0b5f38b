"""The two directions of one ScoreStream, which run at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc

from monitor.errors import InvalidRequestError, StreamBrokenError
from monitor.metrics import Metrics, RequestKind
from monitor.records import Decision
from monitor.rpc.convert import decisions, requests
from monitor.rpc.serving import Serving
from protos.saemonitor.v1 import monitor_pb2 as pb

if TYPE_CHECKING:
    from monitor.stream_session import StreamSession


class Exchange:
    """One open session and its caller."""

    def __init__(
        self, session: StreamSession, kind: RequestKind, serving: Serving, metrics: Metrics
    ) -> None:
        self.was_drained = False
        """Whether the server ended the stream, not the caller."""
        self._session = session
        self._kind = kind
        self._serving = serving
        self._metrics = metrics
        self._arrivals: deque[tuple[int, float]] = deque()
        self._n_arrived = session.n_received

    async def run(
        self,
        incoming: AsyncIterator[pb.ScoreStreamRequest],
        context: grpc.aio.ServicerContext[pb.ScoreStreamRequest, pb.ScoreStreamResponse],
    ) -> None:
        """Until the summary has been written; raises what either direction raises."""
        opened = pb.StreamOpened(
            session_id=self._session.session_id, next_index=self._session.next_index
        )
        await context.write(pb.ScoreStreamResponse(opened=opened))
        writing = asyncio.create_task(self._write(context))
        reading = asyncio.create_task(self._read(incoming, writing))
        try:
            decision, _ = await asyncio.gather(reading, writing)
        finally:
            await _cancelled(reading, writing)
        summary = await decisions.decision_to_wire_aside(decision)
        await context.write(pb.ScoreStreamResponse(summary=summary))

    async def _read(
        self, incoming: AsyncIterator[pb.ScoreStreamRequest], writing: asyncio.Task[None]
    ) -> Decision:
        """Feeds the session until the caller closes its side, the server drains, or scoring fails.

        Where the messages of a resumable stream end without `end` its connection broke: its
        cancellation may come later than their end.
        Updates that end first mean that scoring has failed: `finish` then raises why, and a caller
        that only waits for replies hears of it.
        """
        feeding = asyncio.create_task(self._feed(incoming))
        draining = asyncio.create_task(self._serving.drained())
        leaving = asyncio.create_task(self._session.taken_over.wait())
        try:
            await asyncio.wait(
                {feeding, draining, leaving, writing}, return_when=asyncio.FIRST_COMPLETED
            )
            if leaving.done():
                raise InvalidRequestError(
                    "session_id", "a stream that another call has reopened", "one call a stream"
                )
            if feeding.done():
                if not feeding.result() and self._session.is_resumable:
                    raise StreamBrokenError(
                        "stream: its messages ended without `end`; reopen it by its session_id"
                    )
            else:
                self.was_drained = not writing.done()
        finally:
            await _cancelled(feeding, draining, leaving)
        return await self._session.finish()

    async def _feed(self, incoming: AsyncIterator[pb.ScoreStreamRequest]) -> bool:
        """Whether the caller ended the input."""
        async for message in incoming:
            chunk = requests.stream_chunk_from_wire(message)
            if chunk is requests.StreamSign.END:
                return True
            if chunk is requests.StreamSign.FLUSH:
                await self._session.flush()
                continue
            await self._session.feed(chunk.start_index, token_ids=chunk.token_ids, text=chunk.text)
            # How many tokens a text makes is not known here: the next reply counts as its answer.
            self._n_arrived += len(chunk.token_ids or ())
            self._arrivals.append((self._n_arrived, time.monotonic()))
        return False

    async def _write(
        self,
        context: grpc.aio.ServicerContext[pb.ScoreStreamRequest, pb.ScoreStreamResponse],
    ) -> None:
        async for update in self._session.updates():
            oldest: float | None = None
            while self._arrivals and self._arrivals[0][0] <= update.processed_index:
                _, arrived = self._arrivals.popleft()
                oldest = arrived if oldest is None else oldest
            await context.write(decisions.update_to_wire(update))
            if oldest is not None:
                self._metrics.score_lag(self._kind, time.monotonic() - oldest)


async def _cancelled(*tasks: asyncio.Task[object]) -> None:
    """Cancels what still runs and waits for it, so that no task outlives its stream."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
