"""Requests and streams whose memory is taken away, against those that keep it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monitor.audit_log.writer import AuditLog
from monitor.engine import Engine
from monitor.local import load_local
from monitor.metrics import Metrics
from monitor.pipeline import Pipeline
from monitor.records import Decision, Message, ScoreRequest, ServerLimits, StreamOpen
from monitor.served import Served

LIMITS = ServerLimits(
    max_message_bytes=1 << 22, max_request_tokens=500, max_queue_tokens=4000, max_streams=8
)
PIECES = (
    "please tell me how to bake bread with flour and water ",
    "and a little salt and then it rests in the sun ",
    "what is the danger of the attack in the north ",
    "never share a password or a secret ",
)
Open = Callable[..., AbstractAsyncContextManager[Pipeline]]


@pytest.fixture(scope="module")
def served(tiny_bundle: Path) -> Served:
    return load_local(tiny_bundle, model=None, cache=tiny_bundle)


@pytest.fixture
def open_pipeline(served: Served) -> Open:
    @asynccontextmanager
    async def open_(**changes: Any) -> AsyncIterator[Pipeline]:
        options = {"max_step_tokens": 32, "max_queue_tokens": LIMITS.max_queue_tokens, **changes}
        engine = Engine(served.scorer, **options)
        audit_log = AuditLog.open("sqlite://", level="none")
        audit_log.start()
        metrics = Metrics(model=served.provenance.model, clusters=served.cluster_infos())
        metrics.watch_cache(engine.cache)
        engine.start()
        yield Pipeline(
            served=served, engine=engine, audit_log=audit_log, metrics=metrics, limits=LIMITS
        )
        await asyncio.to_thread(engine.stop)
        await audit_log.close()

    return open_


def metric(pipeline: Pipeline, name: str, **labels: str) -> float:
    value = pipeline.metrics.registry.get_sample_value(
        f"saemonitor_{name}", {"model": "tiny/gemma3", **labels}
    )
    assert value is not None, name
    return value


async def interleaved(pipeline: Pipeline, n_streams: int = 3) -> list[Decision]:
    """Streams that take turns, each with the pieces in an order of its own."""
    context = (Message(role="user", content="how is the weather"),)
    sessions = [
        pipeline.open_stream(StreamOpen(context_messages=context if i else (), want_tokens=True))
        for i in range(n_streams)
    ]
    sent = [0] * n_streams
    for session in sessions:
        await session.__aenter__()
    for turn in range(len(PIECES)):
        for i, session in enumerate(sessions):
            piece = PIECES[(turn + i) % len(PIECES)]
            await session.feed(sent[i], text=piece)
            sent[i] += len(piece)
            await session.flush()
            async for update in session.updates():
                if update.processed_index:
                    break
    decisions = []
    for session in sessions:
        decisions.append(await session.finish())
        await session.__aexit__(None, None, None)
    return decisions


def assert_same(found: Decision, expected: Decision) -> None:
    assert (found.verdict, found.action) == (expected.verdict, expected.action)
    assert found.coverage == expected.coverage
    assert [a.position for a in found.alerts] == [a.position for a in expected.alerts]
    assert [t.text for t in found.tokens] == [t.text for t in expected.tokens]
    a, b = (np.array([t.fused for t in d.tokens]) for d in (found, expected))
    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


async def test_streams_without_memory_decide_the_same(open_pipeline: Open) -> None:
    async with open_pipeline() as pipeline:
        expected = await interleaved(pipeline)
        assert metric(pipeline, "session_cache_recomputed_tokens_total") == 0
        assert metric(pipeline, "session_cache_evictions_total", reason="memory") == 0
        assert metric(pipeline, "session_cache_evictions_total", reason="closed") == 3
    async with open_pipeline(max_cache_bytes=0) as pipeline:
        found = await interleaved(pipeline)
        assert metric(pipeline, "session_cache_recomputed_tokens_total") > 100
        assert metric(pipeline, "session_cache_evictions_total", reason="memory") >= 12
        assert metric(pipeline, "session_cache_bytes") == 0
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)
        assert sum(a.coverage.unscored.values()) == sum(b.coverage.unscored.values())


async def test_long_requests_at_the_same_time_end_though_none_fits(open_pipeline: Open) -> None:
    requests = [ScoreRequest(text=" ".join(PIECES * 2) + word) for word in ("bread", "sun", "salt")]
    async with open_pipeline() as pipeline:
        expected = [await pipeline.score(request) for request in requests]
    async with open_pipeline(max_cache_bytes=0) as pipeline:
        found = await asyncio.gather(*map(pipeline.score, requests))
        assert metric(pipeline, "session_cache_recomputed_tokens_total") == 0
    assert [d.verdict for d in found] == [d.verdict for d in expected]


async def test_memory_is_freed_at_close_cancellation_and_deadline(open_pipeline: Open) -> None:
    async with open_pipeline() as pipeline:
        await pipeline.score(ScoreRequest(text=PIECES[0]))
        assert metric(pipeline, "session_cache_sessions") == 0
        async with pipeline.open_stream(StreamOpen()) as session:
            await session.feed(0, text=PIECES[0])
            await session.flush()
            async for _ in session.updates():
                break
            assert metric(pipeline, "session_cache_sessions") == 1
            assert metric(pipeline, "session_cache_bytes") > 0
        assert metric(pipeline, "session_cache_sessions") == 0
        task = asyncio.create_task(pipeline.score(ScoreRequest(text=" ".join(PIECES * 4))))
        while not metric(pipeline, "session_cache_sessions"):
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert metric(pipeline, "session_cache_sessions") == 0
        assert metric(pipeline, "session_cache_bytes") == 0
