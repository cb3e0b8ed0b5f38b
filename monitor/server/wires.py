"""The two wires: the gRPC server with health and reflection, and HTTP for operators."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from starlette.applications import Starlette

from monitor.config import ListenAddress, ServeSettings
from monitor.errors import SettingsError
from monitor.metrics import Metrics
from monitor.rpc import servicers
from monitor.rpc.interceptors import Edge
from monitor.rpc.serving import Serving
from monitor.server.addresses import bind_tcp, make_free

HEALTH_SERVICES = ("", *servicers.SERVICES)
"""What grpc.health.v1 knows: the server over all, and each service."""


class GrpcWire:
    """The gRPC server on all its addresses. Health starts as NOT_SERVING."""

    def __init__(self, settings: ServeSettings, serving: Serving, metrics: Metrics) -> None:
        self._server = grpc.aio.server(
            interceptors=[Edge(metrics)],
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # two servers on one port would share its callers
                ("grpc.keepalive_time_ms", 60_000),  # notices callers that vanished
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ],
        )
        servicers.register(self._server, serving, metrics)
        self._health: Any = health.aio.HealthServicer()
        self._serves: bool | None = None
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if settings.reflection:
            names = [*servicers.SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(names, self._server)
        self._addresses = settings.listen_addresses()

    async def start(self) -> tuple[ListenAddress, ...]:
        """Listens; gives the addresses with the ports that were taken.

        Raises:
            SettingsError: an address that cannot be had.
        """
        await self.tell_health(False)
        listening = []
        for address in self._addresses:
            make_free(address, "listen")
            try:
                port = self._server.add_insecure_port(str(address))
            except RuntimeError:  # taken since a moment ago
                raise SettingsError(f"listen: cannot listen on {address}") from None
            listening.append(
                address if address.unix_path else ListenAddress(host=address.host, port=port)
            )
        await self._server.start()
        return tuple(listening)

    async def tell_health(self, serves: bool) -> None:
        """Sets grpc.health.v1 of the server and of every service."""
        if serves is self._serves:
            return
        self._serves = serves
        response = health_pb2.HealthCheckResponse
        status = response.SERVING if serves else response.NOT_SERVING
        for service in HEALTH_SERVICES:
            await self._health.set(service, status)

    async def drain_health(self) -> None:
        """NOT_SERVING from now on."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_seconds: float) -> None:
        """Refuses new RPCs, gives running ones the grace, then cancels them."""
        await self._server.stop(grace_seconds)


class _QuietUvicorn(uvicorn.Server):
    """Uvicorn as a guest: the signals are the process's own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class OpsWire:
    """HTTP for operators, in the same event loop."""

    def __init__(self, address: ListenAddress, app: Starlette) -> None:
        self._socket = bind_tcp(address, "ops_listen")
        host, port = self._socket.getsockname()[:2]
        self.address = ListenAddress(host=address.host or host, port=port)
        self._server = _QuietUvicorn(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=1,
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when it answers."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Ends open requests and lets go of the port."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task
        self._socket.close()
