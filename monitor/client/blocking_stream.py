"""A stream of the client for threads."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self

import grpc

from monitor.client import calls
from monitor.client.stream_book import END, FLUSH, StreamBook
from monitor.errors import MonitorError, StreamNotFoundError
from monitor.records import Decision, StreamUpdate
from monitor.rpc import status
from protos.saemonitor.v1 import monitor_pb2 as pb
from protos.saemonitor.v1 import monitor_pb2_grpc as pb_grpc

UNREAD_UPDATES = 64
"""Updates kept for a reader; while it is behind, the server merges what is new into one."""

POLL_SECONDS = 0.05
"""How often a thread that waits for room looks whether the stream has ended."""

UNSENT_MESSAGES = 256
"""Messages kept for the network; `send` waits while it is behind."""


class ScoreStream:
    """An open stream: `send` tokens, read updates, `finish` for the decision.

    Updates may be read from another thread, or with `pending` between two sends. Leaving the
    context without `finish` cancels the stream.
    """

    def __init__(
        self,
        stub: pb_grpc.MonitorServiceStub,
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
        self._updates: queue.Queue[StreamUpdate | None] = queue.Queue(UNREAD_UPDATES)
        self._closed = threading.Event()
        self._writing = threading.Lock()
        """Held by who sends, and while the stream is reopened."""
        self._ends_at = 0.0
        self._line = _Line(stub, timeout)

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

    def __enter__(self) -> Self:
        self._ends_at = time.monotonic() + self._timeout
        self._line, _, _ = self._connected(resume=False)
        threading.Thread(target=self._read, name="score-stream", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._line.close()

    def send(self, *, token_ids: Sequence[int] | None = None, text: str | None = None) -> None:
        """Sends what was generated since the last call; one kind throughout the stream.

        Raises:
            MonitorError: why the server ended the stream, if it did.
        """
        with self._writing:
            self._write(self._book.chunk(token_ids, text))

    def flush(self) -> None:
        """Asks for an update on everything that was sent."""
        with self._writing:
            self._write(FLUSH)

    def pending(self) -> list[StreamUpdate]:
        """The updates that have arrived and were not read; does not wait."""
        updates = []
        while not self._updates.empty():
            update = self._updates.get()
            if update is None:
                self._updates.put(None)
                break
            updates.append(update)
        return updates

    def __iter__(self) -> Iterator[StreamUpdate]:
        """Updates as they come, until the stream has ended; raises why if it ended badly."""
        while (update := self._updates.get()) is not None:
            yield update
        self._updates.put(None)
        self._book.decision()

    def end(self) -> None:
        """Ends the input; what is left to read then ends too."""
        with self._writing:
            self._book.ended = True
            self._line.write(END)
            self._line.write(None)

    def finish(self) -> Decision:
        """Ends the input and waits for the decision.

        Updates that nobody read are dropped: every alert is in the decision too.
        """
        self.end()
        while self._updates.get() is not None:
            pass
        self._updates.put(None)
        return self._book.decision()

    def _write(self, message: pb.ScoreStreamRequest) -> None:
        if not self._line.write(message) and self._book.error is not None:
            raise self._book.error

    def _connected(self, *, resume: bool) -> tuple[_Line, int, bool]:
        """An open call, the index to send from, and whether it goes on where the stream stood."""
        deadline = time.monotonic() + self._open_timeout
        n_attempts = 0
        while True:
            n_attempts += 1
            line = _Line(self._stub, max(0.0, self._ends_at - time.monotonic()))
            try:
                return line, line.open(self._book, resume=resume), resume
            except StreamNotFoundError:
                line.close()
                if not resume or not self._book.restart():
                    raise
                resume = False
            except MonitorError as error:
                line.close()
                delay = self._retry.delay_seconds(error, n_attempts)
                if delay is None or time.monotonic() + delay >= deadline:
                    raise
                if self._closed.wait(delay):
                    raise

    def _read(self) -> None:
        try:
            while True:
                try:
                    for reply in self._line.replies():
                        update = self._book.reply(reply)
                        if update is not None:
                            self._hand_over(update)
                    return
                except MonitorError as error:
                    self._line.ended.set()
                    if self._closed.is_set() or not self._book.may_resume(error):
                        raise
                    self._reopen()
        except MonitorError as error:
            self._book.error = error
        finally:
            self._line.ended.set()
            self._hand_over(None)

    def _reopen(self) -> None:
        with self._writing:
            line, next_index, resumed = self._connected(resume=True)
            for message in self._book.reopened(next_index, resumed=resumed):
                line.write(message)
            if self._book.ended:
                line.write(None)
            self._line = line
        if self._closed.is_set():
            line.close()

    def _hand_over(self, update: StreamUpdate | None) -> None:
        while not self._closed.is_set():
            try:
                return self._updates.put(update, timeout=POLL_SECONDS)
            except queue.Full:
                continue
        return None


class _Line:
    """One call of ScoreStream and the queue that feeds it."""

    def __init__(self, stub: pb_grpc.MonitorServiceStub, timeout: float) -> None:
        self.ended = threading.Event()
        self._stub = stub
        self._timeout = timeout
        self._outgoing: queue.Queue[pb.ScoreStreamRequest | None] = queue.Queue(UNSENT_MESSAGES)
        self._call: Any = None

    def open(self, book: StreamBook, *, resume: bool) -> int:
        """Sends `open`; waits for the index to send from, or raises why there is none."""
        self._outgoing.put(book.opening(resume=resume))
        self._call = self._stub.ScoreStream(iter(self._outgoing.get, None), timeout=self._timeout)
        opened = next(self.replies(), None)
        if opened is None:
            raise MonitorError("the stream ended before it was open")
        book.reply(opened)
        return opened.opened.next_index

    def write(self, message: pb.ScoreStreamRequest | None) -> bool:
        """Queues a message, None for the end; False where the stream has ended."""
        while not self.ended.is_set():
            try:
                self._outgoing.put(message, timeout=POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def replies(self) -> Iterator[pb.ScoreStreamResponse]:
        """The server's messages; MonitorError where it ends with a status."""
        try:
            yield from self._call
        except grpc.RpcError as error:
            raise status.from_wire(error) from None

    def close(self) -> None:
        """Cancels the call if it runs, and lets go of gRPC's sending thread."""
        if self._call is not None:
            self._call.cancel()
        self.ended.set()
        while True:
            try:
                return self._outgoing.put_nowait(None)
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._outgoing.get_nowait()
