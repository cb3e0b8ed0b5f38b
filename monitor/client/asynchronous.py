"""The client for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
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


class AsyncMonitorClient:
    """One connection to a server, for one event loop.

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
        self._channel = grpc.aio.insecure_channel(address, options=list(calls.CHANNEL_OPTIONS))
        self._monitor: pb_grpc.MonitorServiceAsyncStub = pb_grpc.MonitorServiceStub(self._channel)
        self._info: pb_grpc.InfoServiceAsyncStub = pb_grpc.InfoServiceStub(self._channel)
        self._registry: pb_grpc.RegistryServiceAsyncStub = pb_grpc.RegistryServiceStub(
            self._channel
        )
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)
        self._timeout_seconds = timeout_seconds
        self._retry = calls.RetryPolicy() if retry is None else retry
        self._caller = caller

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; calls in progress are cancelled."""
        await self._channel.close()

    async def score(
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
        """Scores one text, conversation, or list of token ids, as `MonitorClient.score`."""
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
        reply = await self._call(lambda left: self._monitor.Score(request, timeout=left), timeout)
        return decisions.decision_from_wire(reply.decision)

    async def score_activations(
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
        """Scores activations of your own forward pass, as `MonitorClient.score_activations`."""
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
        reply = await self._call(
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
    ) -> AsyncScoreStream:
        """A stream of tokens to score as they are made, as `MonitorClient.stream`."""
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
        return AsyncScoreStream(
            self._monitor,
            calls.StreamBook(opening),
            timeout=timeout,
            open_timeout=self._timeout_seconds,
            retry=self._retry,
        )

    async def info(self, *, timeout: float | None = None) -> ServerInfo:
        """What the server is: digests, limits, policies, clusters, tokenizer fingerprint."""
        request = pb.GetServerInfoRequest()
        reply = await self._call(
            lambda left: self._info.GetServerInfo(request, timeout=left), timeout
        )
        return registry.server_info_from_wire(reply)

    async def clusters(self, *, timeout: float | None = None) -> tuple[ClusterInfo, ...]:
        """Every registered cluster, in bundle order."""
        request = pb.ListClustersRequest()
        reply = await self._call(
            lambda left: self._registry.ListClusters(request, timeout=left), timeout
        )
        return tuple(registry.cluster_info_from_wire(cluster) for cluster in reply.clusters)

    async def cluster(self, cluster_id: str, *, timeout: float | None = None) -> ClusterInfo:
        """One registered cluster; NotFoundError where there is none."""
        request = pb.GetClusterRequest(cluster=cluster_id)
        reply = await self._call(
            lambda left: self._registry.GetCluster(request, timeout=left), timeout
        )
        return registry.cluster_info_from_wire(reply.cluster)

    async def health(self, service: str = "", *, timeout: float | None = None) -> bool:
        """Whether the server, or one of its services, takes work now; asks once."""
        request = health_pb2.HealthCheckRequest(service=service)
        seconds = self._timeout_seconds if timeout is None else timeout
        try:
            reply = await self._health.Check(request, timeout=seconds)
        except grpc.RpcError as error:
            raise status.from_wire(error) from None
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    async def _call(
        self, attempt: Callable[[float], Awaitable[Reply]], timeout: float | None
    ) -> Reply:
        deadline = time.monotonic() + (self._timeout_seconds if timeout is None else timeout)
        n_attempts = 0
        while True:
            n_attempts += 1
            try:
                return await attempt(max(deadline - time.monotonic(), 0.0))
            except grpc.RpcError as failed:
                error = status.from_wire(failed)
            delay = self._retry.delay_seconds(error, n_attempts)
            if delay is None or time.monotonic() + delay >= deadline:
                raise error
            await asyncio.sleep(delay)


class AsyncScoreStream:
    """An open stream: `send` tokens, iterate over updates, `finish` for the decision.

    Updates may be read by another task, or with `pending` between two sends. Leaving the context
    without `finish` cancels the stream.
    """

    def __init__(
        self,
        stub: pb_grpc.MonitorServiceAsyncStub,
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
        self._call: Any = None
        self._updates: asyncio.Queue[StreamUpdate | None] = asyncio.Queue(UNREAD_UPDATES)
        self._reader: asyncio.Task[None] | None = None

    @property
    def session_id(self) -> str:
        """The stream's name."""
        return self._book.session_id

    async def __aenter__(self) -> Self:
        deadline = time.monotonic() + self._open_timeout
        n_attempts = 0
        while True:
            n_attempts += 1
            try:
                await self._open()
                break
            except grpc.RpcError as failed:
                error = status.from_wire(failed)
            delay = self._retry.delay_seconds(error, n_attempts)
            if delay is None or time.monotonic() + delay >= deadline:
                raise error
            await asyncio.sleep(delay)
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
        await self._write(self._book.chunk(token_ids, text))

    async def flush(self) -> None:
        """Asks for an update on everything that was sent."""
        await self._write(calls.FLUSH)

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
        if not self._call.done():
            with contextlib.suppress(asyncio.InvalidStateError, grpc.RpcError):
                await self._call.done_writing()

    async def finish(self) -> Decision:
        """Ends the input and waits for the decision.

        Updates that nobody read are dropped: every alert is in the decision too.
        """
        await self.end()
        while await self._updates.get() is not None:
            pass
        self._updates.put_nowait(None)
        return self._book.decision()

    async def _open(self) -> None:
        self._call = self._stub.ScoreStream(timeout=self._timeout)
        with contextlib.suppress(asyncio.InvalidStateError):  # ended already: read says why
            await self._call.write(self._book.opening)
        opened = await self._call.read()
        if opened is grpc.aio.EOF:
            raise MonitorError("the stream ended before it was open")
        self._book.reply(opened)

    async def _write(self, message: pb.ScoreStreamRequest) -> None:
        try:
            await self._call.write(message)
        except (asyncio.InvalidStateError, grpc.RpcError):
            raise await self._why_ended() from None

    async def _why_ended(self) -> MonitorError:
        """The call's own status: the reader may still be behind."""
        ended = grpc.aio.AioRpcError(
            await self._call.code(),
            await self._call.initial_metadata(),
            await self._call.trailing_metadata(),
            await self._call.details(),
        )
        return status.from_wire(ended)

    async def _read(self) -> None:
        try:
            while (reply := await self._call.read()) is not grpc.aio.EOF:
                update = self._book.reply(reply)
                if update is not None:
                    await self._updates.put(update)
        except grpc.RpcError as error:
            self._book.error = status.from_wire(error)
        except MonitorError as error:
            self._book.error = error
        await self._updates.put(None)
