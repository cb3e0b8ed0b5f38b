from __future__ import annotations

import asyncio

import pytest

from monitor.in_flight import in_order


async def test_results_come_in_order_whatever_ends_first() -> None:
    gates = [asyncio.Event() for _ in range(4)]

    async def work(index: int) -> int:
        await gates[index].wait()
        if index:
            gates[index - 1].set()
        return 10 * index

    gates[-1].set()
    assert [pair async for pair in in_order(range(4), work)] == [(i, 10 * i) for i in range(4)]


async def test_no_more_is_begun_than_the_budget_has_room_for() -> None:
    begun: list[int] = []
    most = 0

    async def work(size: int) -> None:
        nonlocal most
        begun.append(size)
        most = max(most, sum(begun))
        await asyncio.sleep(0)

    sizes = [3, 1, 1, 9, 1, 1, 1, 1]
    async for size, _ in in_order(sizes, work, budget=4, size=lambda n: n):
        begun.remove(size)
    assert begun == []
    assert 9 <= most <= 3 + 9  # below the budget one more is begun, whatever its size


async def test_what_is_left_when_one_fails_is_cancelled() -> None:
    ended: list[int] = []

    async def work(index: int) -> None:
        if index == 0:
            raise ValueError("the first")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append(index)
            raise

    with pytest.raises(ValueError, match="the first"):
        async for _ in in_order(range(3), work, budget=3):
            pass
    await asyncio.sleep(0)
    assert ended == [1, 2]
