"""A stream of the client for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

import grpc

from monitor.client import calls
from monitor.client.call_end import CallEnd
from monitor.client.stream_book import END, FLUSH, StreamBook
from monitor.errors import MonitorError, StreamNotFoundError
from monitor.records import Decision, StreamUpdate
from protos.saemonitor.v1 import monitor_pb2 as pb
from protos.saemonitor.v1 import monitor_pb2_grpc as pb_grpc

UNREAD_UPDATES = 64
"""Updates kept for a reader; while it is behind, the server merges what is new into one."""


class AsyncScoreStream:
    """An open stream: `send` tokens, iterate over updates, `finish` for the decision.

    Updates may be read by another task, or with `pending` between two sends. Leaving the context
    without `finish` cancels the stream.
    """

    def __init__(
        self,
        stub: pb_grpc.MonitorServiceAsyncStub,
        book: StreamBook,
        *,
        timeout: float,
        open_timeout: float,
        retry: calls.RetryPolicy,
    ) -> None:
        self._stub = stub
        self._book = book
        self._timeout = timeout
        self._open_timeout = open_timeout
        self._retry = retry
        self._ends_at = 0.0
        self._writing = asyncio.Lock()
        """Held by who sends, and while the stream is reopened."""
        self._call: Any = None
        self._end: CallEnd
        self._updates: asyncio.Queue[StreamUpdate | None] = asyncio.Queue(UNREAD_UPDATES)
        self._reader: asyncio.Task[None] | None = None

    @property
    def session_id(self) -> str:
        """The stream's name."""
        return self._book.session_id

    @property
    def n_resumed(self) -> int:
        """Times that the stream went on where it had broken off."""
        return self._book.n_resumed

    @property
    def n_restarted(self) -> int:
        """Times that it was sent anew from its beginning, under another decision."""
        return self._book.n_restarted

    async def __aenter__(self) -> Self:
        self._ends_at = time.monotonic() + self._timeout
        self._end, _, _ = await self._connected(resume=False)
        self._call = self._end.call
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._call.cancel()
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader

    async def send(
        self, *, token_ids: Sequence[int] | None = None, text: str | None = None
    ) -> None:
        """Sends what was generated since the last call; one kind throughout the stream.

        Raises:
            MonitorError: why the server ended the stream, if it did.
        """
        async with self._writing:
            await self._write(self._book.chunk(token_ids, text))

    async def flush(self) -> None:
        """Asks for an update on everything that was sent."""
        async with self._writing:
            await self._write(FLUSH)

    def pending(self) -> list[StreamUpdate]:
        """The updates that have arrived and were not read; does not wait."""
        updates = []
        while not self._updates.empty():
            update = self._updates.get_nowait()
            if update is None:
                self._updates.put_nowait(None)
                break
            updates.append(update)
        return updates

    async def __aiter__(self) -> AsyncIterator[StreamUpdate]:
        """Updates as they come, until the stream has ended; raises why if it ended badly."""
        while (update := await self._updates.get()) is not None:
            yield update
        self._updates.put_nowait(None)
        self._book.decision()

    async def end(self) -> None:
        """Ends the input; what is left to read then ends too."""
        async with self._writing:
            self._book.ended = True
            if not self._call.done():
                with contextlib.suppress(asyncio.InvalidStateError, grpc.RpcError):
                    await self._call.write(END)
            await self._done_writing()

    async def finish(self) -> Decision:
        """Ends the input and waits for the decision.

        Updates that nobody read are dropped: every alert is in the decision too.
        """
        await self.end()
        while await self._updates.get() is not None:
            pass
        self._updates.put_nowait(None)
        return self._book.decision()

    async def _connected(self, *, resume: bool) -> tuple[CallEnd, int, bool]:
        """An open call, the index to send from, and whether it goes on where the stream stood."""
        deadline = time.monotonic() + self._open_timeout
        n_attempts = 0
        while True:
            n_attempts += 1
            try:
                return *(await self._open(resume)), resume
            except MonitorError as failed:
                error = failed
            if resume and isinstance(error, StreamNotFoundError) and self._book.restart():
                resume = False
                continue
            delay = self._retry.delay_seconds(error, n_attempts)
            if delay is None or time.monotonic() + delay >= deadline:
                raise error
            await asyncio.sleep(delay)

    async def _open(self, resume: bool) -> tuple[CallEnd, int]:
        call: Any = self._stub.ScoreStream(timeout=max(0.0, self._ends_at - time.monotonic()))
        end = CallEnd(call)
        try:
            with contextlib.suppress(asyncio.InvalidStateError):  # ended already: read says why
                await call.write(self._book.opening(resume=resume))
            opened = await call.read()
        except grpc.RpcError:
            raise await end.error() from None
        except BaseException:
            call.cancel()
            raise
        if opened is grpc.aio.EOF:
            raise MonitorError("the stream ended before it was open")
        self._book.reply(opened)
        return end, opened.opened.next_index

    async def _write(self, message: pb.ScoreStreamRequest) -> None:
        try:
            await self._call.write(message)
        except (asyncio.InvalidStateError, grpc.RpcError):
            error = await self._end.error()
            if not self._book.may_resume(error):
                raise error from None

    async def _done_writing(self) -> None:
        if not self._call.done():
            with contextlib.suppress(asyncio.InvalidStateError, grpc.RpcError):
                await self._call.done_writing()

    async def _read(self) -> None:
        try:
            while not await self._read_to_end():
                await self._reopen()
        except MonitorError as error:
            self._book.error = error
        await self._updates.put(None)

    async def _read_to_end(self) -> bool:
        """Takes the replies of one call; False where it broke off and may be reopened."""
        end = self._end
        try:
            while (reply := await self._call.read()) is not grpc.aio.EOF:
                update = self._book.reply(reply)
                if update is not None:
                    await self._updates.put(update)
        except grpc.RpcError:
            error = await end.error()
            if self._book.may_resume(error):
                return False
            raise error from None
        return True

    async def _reopen(self) -> None:
        async with self._writing:
            self._end, next_index, resumed = await self._connected(resume=True)
            self._call = self._end.call
            for message in self._book.reopened(next_index, resumed=resumed):
                await self._write(message)
            if self._book.ended:
                await self._done_writing()
