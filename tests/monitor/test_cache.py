"""Requests and streams whose memory is taken away, against those that keep it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from monitor.audit_log.writer import AuditLog
from monitor.engine import Engine
from monitor.local import load_local
from monitor.metrics import Metrics
from monitor.pipeline import Pipeline
from monitor.records import Decision, Message, ScoreRequest, ServerLimits, StreamOpen
from monitor.served import Served
from sae_core.language_model.model import LanguageModel, Segment

LIMITS = ServerLimits(
    max_message_bytes=1 << 22, max_request_tokens=500, max_queue_tokens=4000, max_streams=8
)
PIECES = (
    "please tell me how to bake bread with flour and water ",
    "and a little salt and then it rests in the sun ",
    "what is the danger of the attack in the north ",
    "never share a password or a secret ",
)
NAMES = ("received", "scored")
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
    async with open_pipeline(reuse_key="k", max_cache_bytes=40_000) as pipeline:
        for a, b in zip(await interleaved(pipeline), expected, strict=True):
            assert_same(a, b)
        assert metric(pipeline, "session_cache_evictions_total", reason="memory") > 0
        assert metric(pipeline, "prefix_cache_evictions_total") > 0
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


async def test_a_second_request_runs_what_it_does_not_share(
    open_pipeline: Open, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.random.default_rng(0).integers(3, 300, 430).tolist()
    requests = [
        ScoreRequest(
            token_ids=tuple(text),
            tokenizer_fingerprint=served.tokenizer.fingerprint,
            want_tokens=True,
        )
        for text in (ids[:420], [*ids[:410], 9, 8, 7], ids[:416])
    ]
    ran: list[int] = []
    step = LanguageModel.step

    def counted(self: LanguageModel, segments: Sequence[Segment]) -> Any:
        ran.append(sum(len(segment.token_ids) for segment in segments))
        return step(self, segments)

    monkeypatch.setattr(LanguageModel, "step", counted)
    found, n_run = [], []
    async with open_pipeline(reuse_key=served.reuse_key) as pipeline:
        for request in requests:
            ran.clear()
            found.append(await pipeline.score(request))
            n_run.append(sum(ran))
        assert n_run == [420, 413 - 384, 0]
        assert metric(pipeline, "prefix_cache_reused_tokens_total") == 384 + 416
        assert metric(pipeline, "prefix_cache_blocks") == 13
        assert metric(pipeline, "prefix_cache_bytes") > 0
        assert pipeline.engine.queue_tokens == 0
    async with open_pipeline() as pipeline:
        for request, decision in zip(requests, found, strict=True):
            assert_same(decision, await pipeline.score(request))
        assert metric(pipeline, "prefix_cache_reused_tokens_total") == 0
    whole, again = ([t.fused for t in d.tokens[:384]] for d in found[:2])
    assert whole == again


async def test_a_growing_text_sent_anew_costs_linear_forwards(
    open_pipeline: Open, served: Served
) -> None:
    text = " ".join(PIECES * 6)
    n_sent = 0
    async with open_pipeline(reuse_key=served.reuse_key) as pipeline:
        for stop in range(20, len(text) + 20, 20):
            decision = await pipeline.score(ScoreRequest(text=text[:stop]))
            n_sent += decision.coverage.received
        n_run = n_sent - metric(pipeline, "prefix_cache_reused_tokens_total")
        whole = decision.coverage.received
        assert n_run <= whole + 40 * (len(text) // 20 + 1) < n_sent / 2
        counts = [metric(pipeline, f"tokens_{name}_total", stage="prompt") for name in NAMES]
        assert counts[0] == counts[1] > whole


async def test_another_bundle_of_the_same_model_shares_nothing(
    tiny_bundle: Path, tmp_path: Path, served: Served
) -> None:
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    spec = yaml.safe_load((folder / "bundle.yaml").read_text())
    spec["clusters"][0]["fusion"]["bias"] += 0.5
    (folder / "bundle.yaml").write_text(yaml.safe_dump(spec))
    changed = load_local(folder, model=None, cache=tmp_path)
    assert changed.provenance.model_digest == served.provenance.model_digest
    assert changed.reuse_key != served.reuse_key
    again = load_local(tiny_bundle, model=None, cache=tmp_path)
    assert again.reuse_key == served.reuse_key


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
