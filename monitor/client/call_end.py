"""Why a call of grpc.aio ended."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import grpc

from monitor.errors import MonitorError, NotReadyError
from monitor.rpc import status

Value = TypeVar("Value")

REPLACED_STATUS = "Internal error from Core"
"""The details that grpc.aio puts in place of the status where a write meets an ended call."""

STATUS_WAIT_SECONDS = 1.0
"""How long a status that has not arrived yet is waited for after a write has failed."""

_POLL_SECONDS = 0.01


class CallEnd:
    """Remembers the status that the server gave to a call.

    A write to a call that has ended, but whose end the event loop has not seen, makes grpc.aio
    overwrite the server's status, or report an invented one before the server's arrives
    (https://github.com/grpc/grpc/issues/36066).

    Args:
        call: a call of grpc.aio that may still be in progress.
    """

    def __init__(self, call: Any) -> None:
        self.call = call
        self._first: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._record)

    async def error(self) -> MonitorError:
        """What the call failed with; NotReadyError where the connection broke without a status."""
        ends_at = asyncio.get_running_loop().time() + STATUS_WAIT_SECONDS
        while True:
            for failed in (self._first, await self._current()):
                if failed is not None and failed.details() != REPLACED_STATUS:
                    return status.from_wire(failed)
            if asyncio.get_running_loop().time() >= ends_at:
                return NotReadyError("the connection broke while a message was written")
            await asyncio.sleep(_POLL_SECONDS)

    async def _current(self) -> grpc.aio.AioRpcError:
        call = self.call
        return grpc.aio.AioRpcError(
            await call.code(),
            await call.initial_metadata(),
            await call.trailing_metadata(),
            await call.details(),
        )

    def _record(self, _: Any) -> None:
        self._first = _without_waiting(self._current())


def _without_waiting(coroutine: Coroutine[Any, Any, Value]) -> Value | None:
    """The result of a coroutine that has nothing to wait for; None if it does wait."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        value: Value = done.value
        return value
    coroutine.close()
    return None
