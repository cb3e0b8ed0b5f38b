"""The client for asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from numpy.typing import NDArray

from monitor.audit_log.checkpoint import Statement
from monitor.client import audit, calls
from monitor.client.asynchronous_stream import AsyncScoreStream
from monitor.client.call_end import CallEnd
from monitor.client.stream_book import StreamBook
from monitor.client.uploads import Upload
from monitor.errors import MonitorError
from monitor.records import ClusterInfo, Decision, ServerInfo, Severity, Stage, StreamOpen, Verdict
from monitor.rpc import status
from monitor.rpc.convert import decisions, registry
from protos.saemonitor.v1 import monitor_pb2 as pb
from protos.saemonitor.v1 import monitor_pb2_grpc as pb_grpc

Reply = TypeVar("Reply")


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
        self._audit: pb_grpc.AuditServiceAsyncStub = pb_grpc.AuditServiceStub(self._channel)
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
            lambda left: _uploaded(self._monitor.ScoreActivations(upload.messages(), timeout=left)),
            timeout,
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
        resumable: bool = False,
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
            resumable=resumable,
        )
        return AsyncScoreStream(
            self._monitor,
            StreamBook(opening),
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

    async def audit_record(
        self, decision_id: str, *, timeout: float | None = None
    ) -> audit.StoredRecord:
        """One decision's record in the audit log; NotFoundError where there is none."""
        request = pb.GetRecordRequest(decision_id=decision_id)
        reply = await self._call(lambda left: self._audit.GetRecord(request, timeout=left), timeout)
        return audit.record_from_wire(reply.record)

    def audit_records(
        self,
        *,
        verdict: Verdict | str | None = None,
        severity: Severity | str | None = None,
        cluster: str | None = None,
        caller_hmac: str | None = None,
        since: float | None = None,
        until: float | None = None,
        limit: int | None = None,
        newest_first: bool = False,
        timeout: float = calls.DEFAULT_STREAM_TIMEOUT_SECONDS,
    ) -> AsyncIterator[audit.StoredRecord]:
        """The decisions' records that match, as `MonitorClient.audit_records`."""
        request = audit.query_request(
            verdict=verdict,
            severity=severity,
            cluster=cluster,
            caller_hmac=caller_hmac,
            since=since,
            until=until,
            limit=limit,
            newest_first=newest_first,
        )
        call = self._audit.QueryRecords(request, timeout=timeout)
        return _records(call)

    async def audit_checkpoint(
        self,
        chain: str | None = None,
        *,
        public_key: str | None = None,
        timeout: float | None = None,
    ) -> Statement:
        """A chain's last checkpoint, as `MonitorClient.audit_checkpoint`."""
        request = pb.GetCheckpointRequest(chain=chain or "")
        reply = await self._call(
            lambda left: self._audit.GetCheckpoint(request, timeout=left), timeout
        )
        return audit.checkpoint_from_wire(reply, public_key)

    async def verify_audit(
        self,
        chain: str | None = None,
        *,
        first_sequence: int | None = None,
        last_sequence: int | None = None,
        timeout: float | None = None,
    ) -> audit.VerifiedRange:
        """Has the server verify a chain or part of it, as `MonitorClient.verify_audit`."""
        request = audit.range_request(chain, first_sequence, last_sequence)
        reply = await self._call(
            lambda left: self._audit.VerifyRange(request, timeout=left), timeout
        )
        return audit.range_from_wire(reply)

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
            except MonitorError as failed:
                error = failed
            delay = self._retry.delay_seconds(error, n_attempts)
            if delay is None or time.monotonic() + delay >= deadline:
                raise error
            await asyncio.sleep(delay)


async def _uploaded(call: Any) -> pb.ScoreActivationsResponse:
    """The reply to messages that may be refused before all of them are written."""
    end = CallEnd(call)
    try:
        reply: pb.ScoreActivationsResponse = await call
    except grpc.RpcError:
        raise await end.error() from None
    return reply


async def _records(call: Any) -> AsyncIterator[audit.StoredRecord]:
    try:
        async for reply in call:
            yield audit.record_from_wire(reply.record)
    except grpc.RpcError as error:
        raise status.from_wire(error) from None
    finally:
        call.cancel()
