"""The services but AuditService (`audit`); each method is convert, pipeline, convert."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import grpc

from monitor.errors import InvalidRequestError, NotReadyError
from monitor.metrics import Metrics, Rejection, RequestKind
from monitor.metrics.labels import RpcMethod
from monitor.records import ActivationsChunk
from monitor.rpc.audit import AuditService
from monitor.rpc.convert import activations, decisions, registry, requests
from monitor.rpc.serving import Serving
from monitor.rpc.stream import Exchange
from protos.saemonitor.v1 import monitor_pb2 as pb
from protos.saemonitor.v1 import monitor_pb2_grpc as pb_grpc

Message = TypeVar("Message")
Record = TypeVar("Record")

SERVICES = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())
"""Full names, for health and reflection."""

_KINDS = {
    (False, False): "unary",
    (True, False): "client_stream",
    (False, True): "server_stream",
    (True, True): "bidi_stream",
}
"""Whether the caller and the server stream, as the metrics name it."""


def register(server: grpc.aio.Server, serving: Serving, metrics: Metrics) -> None:
    """Adds the services to a server and makes the series of their methods."""
    pb_grpc.add_MonitorServiceServicer_to_server(MonitorService(serving, metrics), server)
    pb_grpc.add_InfoServiceServicer_to_server(InfoService(serving), server)
    pb_grpc.add_RegistryServiceServicer_to_server(RegistryService(serving), server)
    pb_grpc.add_AuditServiceServicer_to_server(AuditService(serving), server)
    for service in pb.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            kind = _KINDS[method.client_streaming, method.server_streaming]
            metrics.rpc_prepare(RpcMethod(kind=kind, service=service.full_name, method=method.name))


class MonitorService(pb_grpc.MonitorServiceServicer):
    """Scores requests and streams."""

    def __init__(self, serving: Serving, metrics: Metrics) -> None:
        self._serving = serving
        self._metrics = metrics

    async def Score(
        self,
        request: pb.ScoreRequest,
        context: grpc.aio.ServicerContext[pb.ScoreRequest, pb.ScoreResponse],
    ) -> pb.ScoreResponse:
        """One request whole, within the caller's deadline."""
        started = time.monotonic()
        pipeline = self._serving.pipeline
        record = self._read(requests.score_request_from_wire, request)
        decision = await pipeline.score(
            record, deadline_seconds=context.time_remaining(), peer=context.peer()
        )
        kind = RequestKind.CHAT if record.messages is not None else RequestKind(record.stage)
        self._metrics.score_lag(kind, time.monotonic() - started)
        return pb.ScoreResponse(decision=await decisions.decision_to_wire_aside(decision))

    async def ScoreStream(  # type: ignore[override]  # a coroutine that writes, not a generator
        self,
        request_iterator: AsyncIterator[pb.ScoreStreamRequest],
        context: grpc.aio.ServicerContext[pb.ScoreStreamRequest, pb.ScoreStreamResponse],
    ) -> None:
        """One stream; a coroutine, so that a cancellation always ends the session at once."""
        pipeline = self._serving.pipeline
        first = await anext(request_iterator, pb.ScoreStreamRequest())
        opened = self._read(requests.stream_open_from_wire, first)
        async with pipeline.open_stream(opened, peer=context.peer()) as session:
            exchange = Exchange(session, RequestKind(opened.stage), self._serving, self._metrics)
            await exchange.run(request_iterator, context)
        if exchange.was_drained:
            raise NotReadyError(
                "stream: ended after its summary, because the server is draining;"
                " open another on a server that takes new work"
            )

    async def ScoreActivations(
        self,
        request_iterator: AsyncIterator[pb.ScoreActivationsRequest],
        context: grpc.aio.ServicerContext[pb.ScoreActivationsRequest, pb.ScoreActivationsResponse],
    ) -> pb.ScoreActivationsResponse:
        """One request whole, from the caller's activations, within the caller's deadline."""
        pipeline = self._serving.pipeline
        first = await anext(request_iterator, pb.ScoreActivationsRequest())
        opened = self._read(activations.activations_open_from_wire, first)
        arrived = time.monotonic()

        async def chunks() -> AsyncIterator[ActivationsChunk]:
            nonlocal arrived
            async for message in request_iterator:
                yield activations.activations_chunk_from_wire(message)
                arrived = time.monotonic()

        decision = await pipeline.score_activations(
            opened, chunks(), deadline_seconds=context.time_remaining(), peer=context.peer()
        )
        kind = RequestKind.CHAT if opened.stages else RequestKind(opened.stage)
        self._metrics.score_lag(kind, time.monotonic() - arrived)
        return pb.ScoreActivationsResponse(
            decision=await decisions.decision_to_wire_aside(decision)
        )

    def _read(self, convert: Callable[[Message], Record], message: Message) -> Record:
        try:
            return convert(message)
        except InvalidRequestError:
            self._metrics.rejected(Rejection.INVALID)
            raise


class InfoService(pb_grpc.InfoServiceServicer):
    """Tells what the server is."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def GetServerInfo(
        self,
        request: pb.GetServerInfoRequest,
        context: grpc.aio.ServicerContext[pb.GetServerInfoRequest, pb.GetServerInfoResponse],
    ) -> pb.GetServerInfoResponse:
        """Versions, digests, limits and what is registered."""
        return registry.server_info_to_wire(self._serving.pipeline.info())


class RegistryService(pb_grpc.RegistryServiceServicer):
    """Reads the registered clusters."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def ListClusters(
        self,
        request: pb.ListClustersRequest,
        context: grpc.aio.ServicerContext[pb.ListClustersRequest, pb.ListClustersResponse],
    ) -> pb.ListClustersResponse:
        """Every cluster, in bundle order."""
        clusters = self._serving.pipeline.clusters()
        return pb.ListClustersResponse(
            clusters=[registry.cluster_info_to_wire(cluster) for cluster in clusters]
        )

    async def GetCluster(
        self,
        request: pb.GetClusterRequest,
        context: grpc.aio.ServicerContext[pb.GetClusterRequest, pb.GetClusterResponse],
    ) -> pb.GetClusterResponse:
        """One cluster."""
        cluster = self._serving.pipeline.cluster(request.cluster)
        return pb.GetClusterResponse(cluster=registry.cluster_info_to_wire(cluster))
