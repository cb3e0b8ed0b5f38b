"""Given activations on their way here: they take their place in the queue's limit as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager

from monitor.activations import ActivationsBuffer
from monitor.engine import Engine
from monitor.errors import DeadlineError, QueueFullError
from monitor.records import ActivationsChunk, ActivationsOpen
from sae_core.hook_points import HookPoint

MAX_CHUNK_WAIT_SECONDS = 30.0
"""How long given activations keep their place of the queue while nothing of them arrives."""

CANCELLATION_SECONDS = 0.05
"""How long a cancellation may take to follow the end of what was sent."""


class ActivationUploads:
    """Receives the activations of many requests. Call from one event loop.

    Args:
        max_queue_tokens: rows that may arrive or wait in the engine, all requests together.
    """

    def __init__(self, engine: Engine, *, max_queue_tokens: int) -> None:
        self._engine = engine
        self._max_queue_tokens = max_queue_tokens
        self._arriving_tokens = 0

    async def receive(
        self,
        opened: ActivationsOpen,
        chunks: AsyncIterator[ActivationsChunk],
        widths: Mapping[HookPoint, int],
    ) -> ActivationsBuffer:
        """Every row of one request.

        Raises:
            QueueFullError: as many rows wait or arrive as may.
            DeadlineError: the next chunk does not come.
            MonitorError: as `ActivationsBuffer`.
        """
        buffer = ActivationsBuffer(opened, widths)
        with self._room_for(opened.n_tokens):
            await _fill(buffer, chunks)
        return buffer

    @contextmanager
    def _room_for(self, n_tokens: int) -> Iterator[None]:
        waiting = self._engine.queue_tokens + self._arriving_tokens
        limit = self._max_queue_tokens
        if waiting and waiting + n_tokens > limit:
            raise QueueFullError(
                f"queue: {waiting} tokens wait or arrive and {n_tokens} more were announced, "
                f"expected at most {limit}",
                retry_seconds=1.0,
            )
        self._arriving_tokens += n_tokens
        try:
            yield
        finally:
            self._arriving_tokens -= n_tokens


async def _fill(buffer: ActivationsBuffer, chunks: AsyncIterator[ActivationsChunk]) -> None:
    """Takes every chunk; DeadlineError where the next one does not come."""
    try:
        while True:
            async with asyncio.timeout(MAX_CHUNK_WAIT_SECONDS):
                chunk = await anext(chunks, None)
            if chunk is None:
                break
            buffer.take(chunk)
    except TimeoutError:
        raise DeadlineError(
            f"chunk: none came for {MAX_CHUNK_WAIT_SECONDS:g} seconds, expected the next one"
        ) from None
    if not buffer.is_full:
        # A caller that went away looks like one that stopped early, until its cancellation comes.
        await asyncio.sleep(CANCELLATION_SECONDS)
