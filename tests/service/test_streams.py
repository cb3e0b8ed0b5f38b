"""Streams on the real server: the same scores in any pieces, and nothing left behind."""

from __future__ import annotations

import asyncio
import random
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from monitor.client import MonitorClient
from monitor.errors import QueueFullError
from monitor.records import Decision, Stage, StreamUpdate, UnscoredReason, Verdict
from protos.saemonitor.v1 import monitor_pb2 as pb
from protos.saemonitor.v1 import monitor_pb2_grpc as pb_grpc

BENIGN = "please tell me how to bake bread"
RISKY = "what is the weather like today and please tell me about the attack in the north"


@pytest.fixture
def fingerprint(client: MonitorClient) -> str:
    return client.info().provenance.tokenizer_fingerprint


def ids_of(client: MonitorClient, text: str) -> list[int]:
    return [token.token_id for token in client.score(text=text, tokens=True).tokens]


def pieces(items: Sequence[Any], seed: int) -> list[Any]:
    rng = random.Random(seed)
    cut, out = 0, []
    while cut < len(items):
        size = rng.randrange(1, 5)
        out.append(items[cut : cut + size])
        cut += size
    return out


def assert_same(streamed: Decision, whole: Decision) -> None:
    assert streamed.verdict is whole.verdict
    assert len(streamed.tokens) == len(whole.tokens)
    for ours, theirs in zip(streamed.tokens, whole.tokens, strict=True):
        assert (ours.position, ours.token_id, ours.text) == (
            theirs.position,
            theirs.token_id,
            theirs.text,
        )
        assert ours.stage == theirs.stage
        assert ours.fused == pytest.approx(theirs.fused, rel=1e-4, abs=1e-5, nan_ok=True)
    for mine, other in zip(streamed.clusters, whole.clusters, strict=True):
        assert mine.fused == pytest.approx(other.fused, rel=1e-4)
        assert mine.first_crossing == other.first_crossing


def eventually(claim: Callable[[], bool]) -> bool:
    for _ in range(1000):
        if claim():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("text", [BENIGN, RISKY])
def test_ids_in_any_pieces_score_like_the_whole(
    client: MonitorClient, fingerprint: str, text: str, seed: int
) -> None:
    ids = ids_of(client, text)
    whole = client.score(
        token_ids=ids, stage="completion", tokenizer_fingerprint=fingerprint, tokens=True
    )
    chunks = [[token_id] for token_id in ids] if seed == 0 else pieces(ids, seed)
    with client.stream(tokenizer_fingerprint=fingerprint, tokens=True) as stream:
        for chunk in chunks:
            stream.send(token_ids=chunk)
        streamed = stream.finish()
    assert_same(streamed, whole)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("text", [BENIGN, RISKY])
def test_text_in_any_pieces_scores_like_the_whole(
    client: MonitorClient, text: str, seed: int
) -> None:
    whole = client.score(text=text, stage="completion", tokens=True)
    with client.stream(tokens=True) as stream:
        for piece in list(text) if seed == 0 else pieces(text, seed):
            stream.send(text=piece)
        streamed = stream.finish()
    assert_same(streamed, whole)


def test_the_updates_together_say_what_the_summary_says(
    client: MonitorClient, fingerprint: str
) -> None:
    ids = ids_of(client, RISKY)
    with client.stream(tokenizer_fingerprint=fingerprint, tokens=True) as stream:
        updates: list[StreamUpdate] = []
        reader = threading.Thread(target=lambda: updates.extend(stream))
        reader.start()
        for token_id in ids:
            stream.send(token_ids=[token_id])
        stream.flush()
        # What no update has told by the end of the input, the summary alone tells.
        assert eventually(lambda: bool(updates) and updates[-1].processed_index == len(ids))
        stream.end()
        reader.join()
        decision = stream.finish()
    assert {update.decision_id for update in updates} == {decision.decision_id}
    assert {update.session_id for update in updates} == {stream.session_id}
    watermarks = [update.processed_index for update in updates]
    assert watermarks == sorted(watermarks)
    scores = {token.position: token for update in updates for token in update.tokens}
    assert [scores[token.position] for token in decision.tokens] == list(decision.tokens)
    alerts = tuple(alert for update in updates for alert in update.new_alerts)
    assert alerts == decision.alerts
    assert [alert.cluster for alert in alerts] == ["danger"]
    assert updates[-1].verdict is decision.verdict is Verdict.ALERT
    for update in updates:
        assert update.coverage.received >= update.processed_index


def test_an_alert_does_not_wait_for_the_end(client: MonitorClient, fingerprint: str) -> None:
    with client.stream(tokenizer_fingerprint=fingerprint) as stream:
        stream.send(token_ids=ids_of(client, RISKY))
        update = next(update for update in stream if update.new_alerts)
        assert update.verdict is Verdict.ALERT
        assert update.new_alerts[0].decision_id == update.decision_id
        stream.send(token_ids=ids_of(client, BENIGN)[1:])
        decision = stream.finish()
    assert decision.decision_id == update.decision_id
    assert decision.alerts == update.new_alerts


def test_flush_brings_what_text_was_held_back(client: MonitorClient) -> None:
    whole = client.score(text="bread and an attack", stage="completion")
    with client.stream() as stream:
        stream.send(text="bread and an attack")
        stream.flush()
        update = next(u for u in stream if u.processed_index == whole.coverage.received)
        assert update.verdict is whole.verdict is Verdict.ALERT
        stream.finish()


def test_replies_are_coalesced(client: MonitorClient, fingerprint: str) -> None:
    ids = ids_of(client, BENIGN)[1:]
    sent = 0
    with client.stream(tokenizer_fingerprint=fingerprint) as stream:
        updates: list[StreamUpdate] = []
        reader = threading.Thread(target=lambda: updates.extend(stream))
        reader.start()
        for _ in range(40):
            for token_id in ids[:5]:
                stream.send(token_ids=[token_id])
                sent += 1
        stream.end()
        reader.join()
        decision = stream.finish()
    assert decision.coverage.received == sent == 200
    assert len(updates) < sent / 2


def test_context_is_scored_first_in_its_own_stage(client: MonitorClient) -> None:
    with client.stream(context=[("user", RISKY)], tokens=True) as stream:
        stream.send(text=BENIGN)
        decision = stream.finish()
    danger = decision.clusters[0]
    assert danger.verdict is Verdict.ALERT
    assert danger.stage is Stage.PROMPT
    stages = [token.stage for token in decision.tokens if token.stage is not None]
    assert stages == sorted(stages, key=list(Stage).index)
    assert set(stages) == set(Stage)


def test_a_stream_without_tokens_passes_with_nothing_covered(client: MonitorClient) -> None:
    with client.stream() as stream:
        decision = stream.finish()
    assert decision.verdict is Verdict.PASS
    assert decision.coverage.received == decision.coverage.scored == 0


def test_streams_do_not_mix(client: MonitorClient) -> None:
    texts = [BENIGN, RISKY, "bread", f"the {RISKY}"] * 4

    def score(text: str) -> Decision:
        with client.stream(session_id=text[:9]) as stream:
            for piece in pieces(text, len(text)):
                stream.send(text=piece)
            return stream.finish()

    with ThreadPoolExecutor(max_workers=len(texts)) as pool:
        decisions = list(pool.map(score, texts))
    for text, decision in zip(texts, decisions, strict=True):
        assert decision.session_id == text[:9]
        expected = Verdict.ALERT if "attack" in text else Verdict.PASS
        assert decision.verdict is expected


def test_a_stream_that_ends_is_recorded_and_counted(
    client: MonitorClient, shared_server: Any
) -> None:
    model = {"model": client.info().provenance.model}
    flagged = {**model, "stage": "completion", "outcome": "flagged"}
    before = shared_server.value("saemonitor_requests_total", **flagged)
    lag_before = shared_server.value(
        "saemonitor_score_lag_seconds_count", **model, stage="completion"
    )
    with client.stream() as stream:
        stream.send(text=RISKY)
        decision = stream.finish()
    assert decision.sequence is not None
    assert shared_server.value("saemonitor_requests_total", **flagged) == before + 1
    lag = shared_server.value("saemonitor_score_lag_seconds_count", **model, stage="completion")
    assert lag > lag_before


def test_a_cancelled_stream_is_counted_recorded_and_forgotten(
    client: MonitorClient, shared_server: Any
) -> None:
    model = {"model": client.info().provenance.model}
    cancelled = {**model, "stage": "completion", "outcome": "cancelled"}
    rpc = {
        "grpc_type": "bidi_stream",
        "grpc_service": "saemonitor.v1.MonitorService",
        "grpc_method": "ScoreStream",
        "grpc_code": "Canceled",
    }
    before = shared_server.value("saemonitor_requests_total", **cancelled)
    rpc_before = shared_server.value("grpc_server_handled_total", **rpc)
    with client.stream() as stream:
        stream.send(text=RISKY)
        next(iter(stream))
        assert shared_server.value("saemonitor_streams_active", **model) == 1
    assert eventually(
        lambda: shared_server.value("saemonitor_requests_total", **cancelled) == before + 1
    )
    assert eventually(
        lambda: shared_server.value("grpc_server_handled_total", **rpc) == rpc_before + 1
    )
    assert shared_server.value("saemonitor_streams_active", **model) == 0


def test_a_storm_of_cancellations_leaves_nothing_behind(
    client: MonitorClient, shared_server: Any
) -> None:
    def start_and_leave(index: int) -> None:
        with client.stream() as stream:
            stream.send(text=RISKY * (index % 3))
            if index % 2:
                stream.flush()

    with ThreadPoolExecutor(max_workers=16) as pool:
        list(pool.map(start_and_leave, range(60)))
    pipeline = shared_server.server.pipeline
    assert eventually(lambda: pipeline.n_streams == 0)
    assert eventually(lambda: pipeline.engine.queue_tokens == 0)
    assert eventually(lambda: shared_server.run(lambda: len(asyncio.all_tasks())) < 20)
    assert client.score(text=BENIGN).verdict is Verdict.PASS


def test_a_caller_that_vanishes_ends_its_stream(shared_server: Any) -> None:
    channel = grpc.insecure_channel(shared_server.address)
    asked = threading.Event()

    def messages() -> Any:
        yield pb.ScoreStreamRequest(open=pb.StreamOpen())
        yield pb.ScoreStreamRequest(tokens=pb.StreamTokens(text=BENIGN))
        asked.wait()

    call = pb_grpc.MonitorServiceStub(channel).ScoreStream(messages())
    assert next(call).HasField("opened")
    pipeline = shared_server.server.pipeline
    assert pipeline.n_streams == 1
    channel.close()
    asked.set()
    assert eventually(lambda: pipeline.n_streams == 0)


def test_overload_in_a_stream_is_a_gap_and_the_stream_goes_on(
    serve: Any, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    spec = yaml.safe_load((bundle / "bundle.yaml").read_text())
    spec["policies"]["default"]["deadline_ms"] = 100
    (bundle / "bundle.yaml").write_text(yaml.safe_dump(spec))
    with serve(bundle) as server, server.client() as client:
        fingerprint = client.info().provenance.tokenizer_fingerprint
        ids = server.server.pipeline.served.tokenizer.encode(BENIGN, add_bos=False)
        engine = server.server.pipeline.engine
        score = engine.score

        async def full(*args: Any, **named: Any) -> Any:
            raise QueueFullError("queue: 9 tokens wait, expected at most 8", 0.01)

        with client.stream(tokenizer_fingerprint=fingerprint) as stream:
            engine.score = full
            stream.send(token_ids=ids[:4])
            gap = next(update.gap for update in stream if update.gap is not None)
            assert (gap.start_index, gap.stop_index) == (0, 4)
            assert gap.reason is UnscoredReason.OVERLOAD
            assert "queue: 9 tokens wait" in gap.message
            engine.score = score
            stream.send(token_ids=ids[4:])
            decision = stream.finish()
        assert decision.coverage.unscored[UnscoredReason.OVERLOAD] == 4
        assert decision.coverage.scored == len(ids) - 4
        unscored = server.value(
            "saemonitor_tokens_unscored_total",
            model=client.info().provenance.model,
            stage="completion",
            reason="overload",
        )
        assert unscored == 4
