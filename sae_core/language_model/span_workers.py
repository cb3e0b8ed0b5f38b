"""Threads for the attention of many single tokens.

A new token's query against its own keys and values is one small operation on one core, and a step
of many streams has hundreds of them: torch's own threads, which split an operation, have nothing to
do there. So whole operations are shared out. At most the last bits depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from threading import Barrier
from typing import TypeVar

import torch

Item = TypeVar("Item")


def shares_of(items: Sequence[Item], cost: Callable[[Item], int]) -> tuple[tuple[Item, ...], ...]:
    """Splits `items`, in their order, among as many threads as torch uses, by their cost."""
    n = min(torch.get_num_threads(), len(items))
    total, spent = sum(cost(item) for item in items), 0
    shares: list[list[Item]] = [[] for _ in range(n)]
    for item in items:
        shares[min(n - 1, spent * n // max(total, 1))].append(item)
        spent += cost(item)
    return tuple(tuple(share) for share in shares if share)


def run_shares(work: Callable[[Item], None], shares: Sequence[Sequence[Item]]) -> None:
    """Runs `work` on every item, each share in a thread of its own; raises what the first raised.

    Returns when all have ended. Items of different shares must not depend on each other.
    """

    @torch.inference_mode()
    def run(share: Sequence[Item]) -> None:
        for item in share:
            work(item)

    if not shares:
        return
    pool = _pool(torch.get_num_threads())
    errors = [future.exception() for future in [pool.submit(run, share) for share in shares]]
    for error in errors:
        if error is not None:
            raise error


def run_ranges(work: Callable[[int, int], None], bounds: Sequence[int]) -> None:
    """Runs `work(start, stop)` between every two bounds, the first in this thread.

    For work that holds no lock and uses no torch. Returns when all have ended, and raises what the
    first raised.
    """
    ranges = [(start, stop) for start, stop in pairwise(bounds) if start < stop]
    if len(ranges) < 2:
        for part in ranges:
            work(*part)
        return
    pool = _pool(torch.get_num_threads())
    others = [pool.submit(work, *part) for part in ranges[1:]]
    try:
        work(*ranges[0])
    finally:
        errors = [future.exception() for future in others]
    for error in errors:
        if error is not None:
            raise error


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    """Threads in which torch itself uses one thread."""
    before = torch.get_num_threads()
    started = Barrier(n_threads + 1)
    pool = ThreadPoolExecutor(n_threads, "attention", initializer=_use_one_thread)
    for _ in range(n_threads):
        pool.submit(started.wait)
    started.wait()
    # What a thread sets for itself, threads to come begin with.
    torch.set_num_threads(before)
    return pool


def _use_one_thread() -> None:
    torch.get_num_threads()  # the first call takes the process's number over, and would do so later
    torch.set_num_threads(1)
