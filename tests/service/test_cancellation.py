"""Ten thousand callers that go away: nothing of them is left."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from monitor.live_stream import LiveStream
from monitor.work_queue import Work
from protos.saemonitor.v1 import monitor_pb2 as pb
from protos.saemonitor.v1 import monitor_pb2_grpc as pb_grpc
from sae_core.language_model.freed_memory import give_back_freed_memory
from sae_core.score_cache import ScoredStream

N_CALLS = 10_000
WAVE = 100
SLACK_BYTES = 48 * 1024**2
"""Arenas and thread stacks come and go; one stream's keys and values alone are 16 KiB and more."""

TEXT = "please tell me about the weather in the north and how to bake bread with flour"


async def eventually(claim: Callable[[], bool]) -> bool:
    for _ in range(2000):
        if await asyncio.to_thread(claim):
            return True
        await asyncio.sleep(0.01)
    return False


def resident_bytes() -> int:
    """Without what was freed and is kept for the next step."""
    give_back_freed_memory()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def alive() -> list[object]:
    gc.collect()
    kinds = (LiveStream, Work, ScoredStream)
    return [thing for thing in gc.get_objects() if issubclass(type(thing), kinds)]


async def leave(stub: Any, number: int) -> None:
    """One caller that goes away, each in another moment of its call."""
    kind, text = number % 5, TEXT[: 10 + number % 60]
    if kind == 0:
        call = stub.Score(pb.ScoreRequest(text=text))
        await asyncio.sleep(0.001 * (number % 7))
        call.cancel()
        return
    if kind == 1:
        with contextlib.suppress(grpc.RpcError):
            await stub.Score(pb.ScoreRequest(text=text), timeout=0.002 * (1 + number % 5))
        return
    call = stub.ScoreStream()
    with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
        opening = pb.StreamOpen(caller=f"caller {number % 9}")
        await call.write(pb.ScoreStreamRequest(open=opening))
        if kind > 2:
            await call.write(pb.ScoreStreamRequest(tokens=pb.StreamTokens(text=text)))
        if kind > 3:
            await call.write(pb.ScoreStreamRequest(flush=pb.StreamFlush()))
            await call.read()
            await call.read()
    call.cancel()


async def waves(channel: grpc.aio.Channel, n_calls: int) -> None:
    stub = pb_grpc.MonitorServiceStub(channel)
    numbers = iter(range(n_calls))
    while wave := list(itertools.islice(numbers, WAVE)):
        await asyncio.gather(*(leave(stub, number) for number in wave))


@pytest.mark.timeout(600)
def test_ten_thousand_callers_that_go_away_leave_nothing_behind(serve: Any) -> None:
    with serve(audit_level="none") as server:
        pipeline = server.server.pipeline
        engine = pipeline.engine
        tasks_before = server.run(lambda: len(asyncio.all_tasks()))
        alive_before = len(alive())

        def is_quiet() -> bool:
            running = pipeline.n_streams + pipeline.n_requests + engine.queue_tokens
            return running + engine.cache().sessions + engine.cache().session_bytes == 0

        async def come_and_go() -> int:
            async with grpc.aio.insecure_channel(server.address) as channel:
                await waves(channel, N_CALLS // 5)
                assert await eventually(is_quiet)
                resident_before = resident_bytes()
                await waves(channel, N_CALLS - N_CALLS // 5)
                assert await eventually(is_quiet)
            assert await eventually(
                lambda: server.run(lambda: len(asyncio.all_tasks())) <= tasks_before
            )
            # The step that ran when the last one left may still have its tokens.
            assert await eventually(lambda: len(alive()) == alive_before)
            return resident_bytes() - resident_before

        grown = asyncio.run(come_and_go())
        assert grown < SLACK_BYTES
        model = {"model": pipeline.served.provenance.model}
        for name in ("streams_active", "streams_detached", "queue_tokens", "requests_in_flight"):
            assert server.value(f"saemonitor_{name}", **model) == 0
        families = {
            metric.name: metric.samples for metric in server.server.metrics.registry.collect()
        }
        total = {
            name: sum(s.value for s in families[f"saemonitor_tokens_{name}"] if "_total" in s.name)
            for name in ("received", "scored", "unscored")
        }
        assert total["received"] == total["scored"] + total["unscored"]
        assert total["scored"] > 0
        assert total["unscored"] > 0
        with server.client() as client:
            assert client.score(text=TEXT).coverage.scored > 0
