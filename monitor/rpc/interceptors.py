"""The edge of every RPC: counts it, and turns what was raised into a status.

Nothing but a status leaves: errors of ours with their message, everything else as an error id
whose story is in the log.
"""

from __future__ import annotations

import asyncio
import inspect
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from monitor.errors import InvalidRequestError
from monitor.metrics import Metrics
from monitor.metrics.labels import GRPC_CODES, RpcMethod
from monitor.rpc import status

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class Edge(grpc.aio.ServerInterceptor):
    """Wraps every registered method; unknown ones pass, so that callers cannot make series."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The handler with the edge around it."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        _, service, method = handler_call_details.method.split("/", 2)
        if handler.unary_unary:
            kind, make = "unary", grpc.unary_unary_rpc_method_handler
        elif handler.unary_stream:
            kind, make = "server_stream", grpc.unary_stream_rpc_method_handler
        elif handler.stream_unary:
            kind, make = "client_stream", grpc.stream_unary_rpc_method_handler
        else:
            kind, make = "bidi_stream", grpc.stream_stream_rpc_method_handler
        behaviour = (
            handler.unary_unary
            or handler.unary_stream
            or handler.stream_unary
            or handler.stream_stream
        )
        rpc = RpcMethod(kind=kind, service=service, method=method)
        wrap = self._generator if inspect.isasyncgenfunction(behaviour) else self._coroutine
        return make(
            wrap(rpc, behaviour),
            request_deserializer=_counted(
                handler.request_deserializer, lambda: self._metrics.rpc_message_received(rpc)
            ),
            response_serializer=_counted(
                handler.response_serializer, lambda: self._metrics.rpc_message_sent(rpc)
            ),
        )

    def _coroutine(self, rpc: RpcMethod, behaviour: Any) -> Any:
        async def call(request: Any, context: Context) -> Any:
            with _Call(self._metrics, rpc, context) as call:
                try:
                    return await behaviour(_readable(request), context)
                except Exception as error:
                    await call.end(error)

        return call

    def _generator(self, rpc: RpcMethod, behaviour: Any) -> Any:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            with _Call(self._metrics, rpc, context) as call:
                try:
                    async for reply in behaviour(_readable(request), context):
                        yield reply
                except Exception as error:
                    await call.end(error)

        return call


class _Call:
    """One RPC in progress; counted in on entry, out on exit."""

    def __init__(self, metrics: Metrics, rpc: RpcMethod, context: Context) -> None:
        self._metrics = metrics
        self._rpc = rpc
        self._context = context
        self._code = grpc.StatusCode.OK
        self._started = time.monotonic()

    def __enter__(self) -> _Call:
        self._metrics.rpc_started(self._rpc)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            left = self._context.time_remaining()
            expired = left is not None and left <= 0
            self._code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED
        self._metrics.rpc_handled(
            self._rpc, GRPC_CODES[self._code.value[0]], time.monotonic() - self._started
        )

    async def end(self, error: Exception) -> None:
        """Ends the RPC with the error's status, and raises for gRPC to see."""
        if isinstance(error, grpc.aio.AbortError):  # a servicer of gRPC's own chose its status
            self._code = _status_code(self._context.code())
            raise error
        error_id = uuid.uuid4().hex
        wire = status.to_wire(error, error_id)
        self._code = wire.code
        if wire.is_internal:
            log.error(
                "rpc_failed",
                error_id=error_id,
                method=f"{self._rpc.service}/{self._rpc.method}",
                # Rendered here: some renderers add local variables, which hold what people wrote.
                traceback="".join(traceback.format_exception(error)),
            )
        await self._context.abort(wire.code, wire.details, wire.trailing_metadata)


def _status_code(code: Any) -> grpc.StatusCode:
    """grpc.aio gives a number where it means a member."""
    if isinstance(code, grpc.StatusCode):
        return code
    return next((c for c in grpc.StatusCode if c.value[0] == code), grpc.StatusCode.UNKNOWN)


class _Unreadable:
    """Stands for bytes that are no message: gRPC itself would answer UNKNOWN and a class name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def error(self) -> InvalidRequestError:
        return InvalidRequestError("message", "bytes that cannot be decoded", self.name)


def _readable(request: Any) -> Any:
    """A request, or an iterator of them, that raises where there is an unreadable one."""
    if isinstance(request, _Unreadable):
        raise request.error()
    return _readable_each(request) if hasattr(request, "__aiter__") else request


async def _readable_each(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if isinstance(request, _Unreadable):
            raise request.error()
        yield request


def _counted(
    convert: Callable[[Any], Any] | None, count: Callable[[], None]
) -> Callable[[Any], Any]:
    """A (de)serializer that counts: every message goes through exactly one, whatever the API."""

    def convert_and_count(message: Any) -> Any:
        count()
        if convert is None:
            return message
        try:
            return convert(message)
        except DecodeError:
            owner = getattr(convert, "__self__", None)
            return _Unreadable(
                getattr(getattr(owner, "DESCRIPTOR", None), "full_name", "a message")
            )

    return convert_and_count
