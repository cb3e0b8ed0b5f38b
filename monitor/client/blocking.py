"""The client for threads."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray

from monitor.client import calls
from monitor.client.uploads import Upload
from monitor.errors import MonitorError
from monitor.records import ClusterInfo, Decision, ServerInfo, Stage, StreamOpen, StreamUpdate
from monitor.rpc import status
from monitor.rpc.convert import decisions, registry
from protos.saemonitor.v1 import monitor_pb2 as pb
from protos.saemonitor.v1 import monitor_pb2_grpc as pb_grpc

Reply = TypeVar("Reply")

UNREAD_UPDATES = 64
"""Updates kept for a reader; while it is behind, the server merges what is new into one."""

POLL_SECONDS = 0.05
"""How often a thread that waits for room looks whether the stream has ended."""

UNSENT_MESSAGES = 256
"""Messages kept for the network; `send` waits while it is behind."""


class MonitorClient:
    """One connection to a server; may be shared by threads.

    Args:
        address: HOST:PORT or unix:PATH.
        timeout_seconds: deadline of every call that states none, attempts and waits included.
        retry: when a call is made again.
        caller: who calls, in every request; the server stores a hash.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_seconds: float = calls.DEFAULT_TIMEOUT_SECONDS,
        retry: calls.RetryPolicy | None = None,
        caller: str | None = None,
    ) -> None:
        self._channel = grpc.insecure_channel(address, options=list(calls.CHANNEL_OPTIONS))
        self._monitor = pb_grpc.MonitorServiceStub(self._channel)
        self._info = pb_grpc.InfoServiceStub(self._channel)
        self._registry = pb_grpc.RegistryServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)
        self._timeout_seconds = timeout_seconds
        self._retry = calls.RetryPolicy() if retry is None else retry
        self._caller = caller

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; calls in progress are cancelled."""
        self._channel.close()

    def score(
        self,
        *,
        text: str | None = None,
        messages: calls.Messages | None = None,
        token_ids: Sequence[int] | None = None,
        stage: Stage | str = Stage.PROMPT,
        tokens: bool = False,
        attribution: bool = False,
        policy: str = "default",
        timeout: float | None = None,
        tokenizer_fingerprint: str | None = None,
        model: str | None = None,
    ) -> Decision:
        """Scores one text, conversation, or list of token ids: give exactly one of the three.

        Args:
            stage: which side of a conversation `text` or `token_ids` is; messages know theirs.
            tokens: ask for per-token logits.
            attribution: ask for the exact terms of every score.
            timeout: deadline in seconds, waits and retries included.
            tokenizer_fingerprint: required with `token_ids`; see `info`.

        Raises:
            MonitorError: what the server raised, by its own class.
        """
        request = calls.score_request(
            text=text,
            messages=messages,
            token_ids=token_ids,
            stage=stage,
            tokens=tokens,
            attribution=attribution,
            policy=policy,
            tokenizer_fingerprint=tokenizer_fingerprint,
            caller=self._caller,
            model=model,
        )
        reply = self._call(lambda left: self._monitor.Score(request, timeout=left), timeout)
        return decisions.decision_from_wire(reply.decision)

    def score_activations(
        self,
        activations: Mapping[str, NDArray[Any]],
        *,
        model_digest: str,
        token_ids: Sequence[int] | None = None,
        tokenizer_fingerprint: str | None = None,
        stage: Stage | str = Stage.PROMPT,
        stages: Sequence[Stage | str | None] = (),
        tokens: bool = False,
        attribution: bool = False,
        policy: str = "default",
        timeout: float | None = None,
    ) -> Decision:
        """Scores activations that your own forward pass made: no other one is run.

        Args:
            activations: for each of the server's hook points (see `info`), the raw activations of a
                Hugging Face model there, one row a token from the first of the text on: float32,
                float16, or uint16 with the bits of bfloat16.
            model_digest: of the model that made them; the server refuses another than its own.
            token_ids: the rows' ids, if known; control tokens are then left out of scores.
            tokenizer_fingerprint: required with `token_ids`.
            stage: which side of a conversation the rows are.
            stages: in place of it, one a row; None leaves a row (BOS, template) out of scores.
            tokens, attribution, policy, timeout: as in `score`.

        Raises:
            MonitorError: what the server raised, by its own class.
        """
        upload = Upload(
            activations,
            model_digest=model_digest,
            token_ids=token_ids,
            tokenizer_fingerprint=tokenizer_fingerprint,
            stage=stage,
            stages=stages,
            tokens=tokens,
            attribution=attribution,
            policy=policy,
            caller=self._caller,
        )
        reply = self._call(
            lambda left: self._monitor.ScoreActivations(upload.messages(), timeout=left), timeout
        )
        return decisions.decision_from_wire(reply.decision)

    def stream(
        self,
        *,
        session_id: str = "",
        stage: Stage | str = Stage.COMPLETION,
        policy: str = "default",
        tokenizer_fingerprint: str | None = None,
        context: calls.Messages = (),
        tokens: bool = False,
        attribution: bool = False,
        timeout: float = calls.DEFAULT_STREAM_TIMEOUT_SECONDS,
        model: str | None = None,
    ) -> ScoreStream:
        """A stream of tokens to score as they are made; use it as a context manager.

        Args:
            session_id: your name for it; the server chooses one where it is empty.
            context: turns that precede it, scored first.
            timeout: longest life of the stream, seconds.
        """
        opening = StreamOpen(
            session_id=session_id,
            stage=calls.stage_record(stage),
            policy=policy,
            tokenizer_fingerprint=tokenizer_fingerprint,
            context_messages=calls.message_records(context),
            want_tokens=tokens,
            want_attribution=attribution,
            caller=self._caller,
            model=model,
        )
        return ScoreStream(
            self._monitor,
            calls.StreamBook(opening),
            timeout=timeout,
            open_timeout=self._timeout_seconds,
            retry=self._retry,
        )

    def info(self, *, timeout: float | None = None) -> ServerInfo:
        """What the server is: digests, limits, policies, clusters, tokenizer fingerprint."""
        request = pb.GetServerInfoRequest()
        reply = self._call(lambda left: self._info.GetServerInfo(request, timeout=left), timeout)
        return registry.server_info_from_wire(reply)

    def clusters(self, *, timeout: float | None = None) -> tuple[ClusterInfo, ...]:
        """Every registered cluster, in bundle order."""
        request = pb.ListClustersRequest()
        reply = self._call(lambda left: self._registry.ListClusters(request, timeout=left), timeout)
        return tuple(registry.cluster_info_from_wire(cluster) for cluster in reply.clusters)

    def cluster(self, cluster_id: str, *, timeout: float | None = None) -> ClusterInfo:
        """One registered cluster; NotFoundError where there is none."""
        request = pb.GetClusterRequest(cluster=cluster_id)
        reply = self._call(lambda left: self._registry.GetCluster(request, timeout=left), timeout)
        return registry.cluster_info_from_wire(reply.cluster)

    def health(self, service: str = "", *, timeout: float | None = None) -> bool:
        """Whether the server, or one of its services, takes work now; asks once."""
        request = health_pb2.HealthCheckRequest(service=service)
        seconds = self._timeout_seconds if timeout is None else timeout
        try:
            reply = self._health.Check(request, timeout=seconds)
        except grpc.RpcError as error:
            raise status.from_wire(error) from None
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    def _call(self, attempt: Callable[[float], Reply], timeout: float | None) -> Reply:
        deadline = time.monotonic() + (self._timeout_seconds if timeout is None else timeout)
        n_attempts = 0
        while True:
            n_attempts += 1
            try:
                return attempt(max(deadline - time.monotonic(), 0.0))
            except grpc.RpcError as failed:
                error = status.from_wire(failed)
            delay = self._retry.delay_seconds(error, n_attempts)
            if delay is None or time.monotonic() + delay >= deadline:
                raise error
            time.sleep(delay)


class ScoreStream:
    """An open stream: `send` tokens, read updates, `finish` for the decision.

    Updates may be read from another thread, or with `pending` between two sends. Leaving the
    context without `finish` cancels the stream.
    """

    def __init__(
        self,
        stub: pb_grpc.MonitorServiceStub,
        book: calls.StreamBook,
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
        self._line = _Line(stub, timeout)

    @property
    def session_id(self) -> str:
        """The stream's name."""
        return self._book.session_id

    def __enter__(self) -> Self:
        deadline = time.monotonic() + self._open_timeout
        n_attempts = 0
        while True:
            n_attempts += 1
            self._line = _Line(self._stub, self._timeout)
            try:
                self._line.open(self._book)
                break
            except MonitorError as error:
                self._line.close()
                delay = self._retry.delay_seconds(error, n_attempts)
                if delay is None or time.monotonic() + delay >= deadline:
                    raise
                time.sleep(delay)
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
        self._write(self._book.chunk(token_ids, text))

    def flush(self) -> None:
        """Asks for an update on everything that was sent."""
        self._write(calls.FLUSH)

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

    def _read(self) -> None:
        try:
            for reply in self._line.replies():
                update = self._book.reply(reply)
                if update is not None:
                    self._hand_over(update)
        except MonitorError as error:
            self._book.error = error
        finally:
            self._line.ended.set()
            self._hand_over(None)

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

    def open(self, book: calls.StreamBook) -> None:
        """Sends `open` and waits for its answer; raises why there is none."""
        self._outgoing.put(book.opening)
        self._call = self._stub.ScoreStream(iter(self._outgoing.get, None), timeout=self._timeout)
        opened = next(self.replies(), None)
        if opened is None:
            raise MonitorError("the stream ended before it was open")
        book.reply(opened)

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
