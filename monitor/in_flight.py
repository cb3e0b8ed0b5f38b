"""Work side by side, results in the order of the items, and only so much of it at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

IN_FLIGHT = 64
"""Texts handed to the engine at a time: enough for full batches, bounded in memory."""


async def in_order(
    items: Iterable[Item],
    work: Callable[[Item], Awaitable[Result]],
    *,
    budget: int = IN_FLIGHT,
    size: Callable[[Item], int] = lambda item: 1,
) -> AsyncIterator[tuple[Item, Result]]:
    """Each item with what `work` gave for it; what is left undone at the end is cancelled.

    Args:
        budget: items are begun while the sizes of those begun and not yet given back are below.
    """
    waiting: deque[tuple[Item, int, asyncio.Future[Result]]] = deque()
    begun = 0
    try:
        for item in items:
            n = size(item)
            waiting.append((item, n, asyncio.ensure_future(work(item))))
            begun += n
            while waiting and begun >= budget:
                first, n_first, future = waiting[0]
                result = await future
                waiting.popleft()
                begun -= n_first
                yield first, result
        while waiting:
            first, _, future = waiting[0]
            result = await future
            waiting.popleft()
            yield first, result
    finally:
        for _, _, future in waiting:
            future.cancel()
