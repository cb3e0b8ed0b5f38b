from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from monitor.audit_log.query import query
from monitor.audit_log.verify import verify
from monitor.audit_log.writer import AuditLog
from monitor.engine import Engine
from monitor.errors import (
    AuditError,
    DeadlineError,
    FingerprintError,
    InvalidRequestError,
    NotFoundError,
    NotReadyError,
    PayloadTooLargeError,
    QueueFullError,
    StreamPositionError,
)
from monitor.local import load_local
from monitor.metrics import Metrics
from monitor.pipeline import Pipeline
from monitor.records import (
    Action,
    ActivationDtype,
    ActivationsChunk,
    ActivationsOpen,
    ActivationTensor,
    Decision,
    Message,
    ScoreRequest,
    ServerLimits,
    Stage,
    StreamOpen,
    StreamUpdate,
    UnscoredReason,
    Verdict,
)
from monitor.served import Served, calibration_facts
from monitor.testing import HOOK_POINT
from sae_core.language_model.model import Segment

CALM = "please tell me how to bake bread"
RISKY = "what is the danger of the attack in the north"
LIMITS = ServerLimits(
    max_message_bytes=1 << 22, max_request_tokens=300, max_queue_tokens=600, max_streams=8
)


@pytest.fixture(scope="session")
def served(tiny_bundle: Path) -> Served:
    return load_local(tiny_bundle, model=None, cache=tiny_bundle)


@pytest.fixture
def audit_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'audit.sqlite'}"


@pytest.fixture
async def pipeline(served: Served, audit_url: str) -> AsyncIterator[Pipeline]:
    engine = Engine(served.scorer, max_step_tokens=32, max_queue_tokens=LIMITS.max_queue_tokens)
    engine.start()
    audit_log = AuditLog.open(audit_url)
    audit_log.start()
    yield Pipeline(
        served=served,
        engine=engine,
        audit_log=audit_log,
        metrics=Metrics(model=served.provenance.model, clusters=served.cluster_infos()),
        limits=LIMITS,
        stream_interval_seconds=0.0,
    )
    await asyncio.to_thread(engine.stop)
    await audit_log.close()


def metric(pipeline: Pipeline, name: str, **labels: str) -> float:
    labels = {"model": "tiny/gemma3", **labels}
    value = pipeline.metrics.registry.get_sample_value(f"saemonitor_{name}", labels)
    assert value is not None, f"{name} {labels}"
    return value


def ids_of(pipeline: Pipeline, text: str) -> tuple[int, ...]:
    return tuple(pipeline.served.tokenizer.encode(text))


def ids_request(pipeline: Pipeline, ids: tuple[int, ...], **changes: Any) -> ScoreRequest:
    fingerprint = pipeline.served.tokenizer.fingerprint
    return ScoreRequest(token_ids=ids, tokenizer_fingerprint=fingerprint, **changes)


async def test_risky_text_alerts_and_calm_text_passes(pipeline: Pipeline) -> None:
    calm = await pipeline.score(ScoreRequest(text=CALM))
    assert (calm.verdict, calm.action, calm.alerts) == (Verdict.PASS, Action.ALLOW, ())
    risky = await pipeline.score(ScoreRequest(text=RISKY, want_tokens=True))
    assert (risky.verdict, risky.action) == (Verdict.ALERT, Action.FLAG)
    assert [alert.cluster for alert in risky.alerts] == ["danger"]
    first = risky.clusters[0].first_crossing
    assert first is not None
    assert risky.tokens[first].text.strip() == "danger"
    assert risky.overall.fused >= 1 > calm.overall.fused


async def test_enforcing_policy_blocks(pipeline: Pipeline) -> None:
    decision = await pipeline.score(ScoreRequest(text=RISKY, policy="strict"))
    assert decision.action is Action.BLOCK


async def test_whole_text_and_ids_are_the_same_request(pipeline: Pipeline) -> None:
    by_text = await pipeline.score(ScoreRequest(text=RISKY, want_tokens=True))
    ids = ids_of(pipeline, RISKY)
    by_ids = await pipeline.score(ids_request(pipeline, ids, want_tokens=True))
    assert by_text.tokens == by_ids.tokens
    assert by_text.clusters == by_ids.clusters


async def test_ids_can_each_have_a_stage(pipeline: Pipeline) -> None:
    ids = ids_of(pipeline, RISKY)
    stages = [None, *[Stage.PROMPT] * 3, *[Stage.COMPLETION] * (len(ids) - 4)]
    traced = await pipeline.score_traced(ids_request(pipeline, ids), stages=stages)
    assert traced.trace.stages == tuple(stages)
    assert traced.decision.coverage.scored == len(ids) - 1
    assert traced.trace.logits.shape == (len(ids), 2, 3)
    with pytest.raises(InvalidRequestError, match=f"stages: found 1 entries, expected {len(ids)}"):
        await pipeline.score_traced(ids_request(pipeline, ids), stages=[None])


async def test_roles_decide_the_stage(pipeline: Pipeline) -> None:
    turns = (
        Message(role="system", content="danger danger"),
        Message(role="user", content="hello there"),
        Message(role="assistant", content="an attack"),
    )
    decision = await pipeline.score(ScoreRequest(messages=turns, want_tokens=True))
    assert decision.clusters[0].stage is Stage.COMPLETION
    stages = {token.text.strip(): token.stage for token in decision.tokens}
    assert stages["attack"] is Stage.COMPLETION
    assert stages["danger"] is None
    only_system = replace(ScoreRequest(), messages=(turns[0], turns[1]))
    assert (await pipeline.score(only_system)).verdict is Verdict.PASS


async def test_coverage_adds_up_in_reply_and_metrics(pipeline: Pipeline) -> None:
    decision = await pipeline.score(ScoreRequest(text=CALM))
    n = len(ids_of(pipeline, CALM))
    assert decision.coverage.received == n
    assert decision.coverage.scored == n - 1
    assert decision.coverage.unscored == {UnscoredReason.EXCLUDED: 1}
    assert metric(pipeline, "tokens_received_total", stage="prompt") == n - 1
    assert metric(pipeline, "tokens_scored_total", stage="prompt") == n - 1


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (ScoreRequest(text=""), InvalidRequestError, "text: found an empty string"),
        (ScoreRequest(), InvalidRequestError, "exactly one of text, messages, token_ids"),
        (ScoreRequest(text="a", messages=()), InvalidRequestError, "found text and messages"),
        (ScoreRequest(messages=()), InvalidRequestError, "at least one message"),
        (
            ScoreRequest(messages=(Message(role="pope", content="hi"),)),
            InvalidRequestError,
            r"messages\[0\].role: found 'pope', expected one of assistant",
        ),
        (
            ScoreRequest(messages=(Message(role="user", content=" "),)),
            InvalidRequestError,
            r"messages\[0\].content",
        ),
        (ScoreRequest(text="a" * 3000), PayloadTooLargeError, "expected at most 300"),
        (ScoreRequest(text="a", policy="nope"), NotFoundError, "expected one of default, strict"),
        (ScoreRequest(text="a", model="gpt-5"), NotFoundError, "expected tiny/gemma3"),
        (ScoreRequest(token_ids=(1, 2)), FingerprintError, "found none"),
        (
            ScoreRequest(token_ids=(1, 2), tokenizer_fingerprint="beef"),
            FingerprintError,
            "found beef",
        ),
    ],
)
async def test_bad_requests_are_named_and_serving_goes_on(
    pipeline: Pipeline, request_: ScoreRequest, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        await pipeline.score(request_)
    assert (await pipeline.score(ScoreRequest(text=RISKY))).verdict is Verdict.ALERT


async def test_ids_out_of_vocabulary_are_counted_as_unscored(pipeline: Pipeline) -> None:
    bad = ids_request(pipeline, (1, 2, 400))
    with pytest.raises(InvalidRequestError, match=r"token_ids\[2\]: found 400, expected 0 <= id"):
        await pipeline.score(bad)
    assert metric(pipeline, "tokens_received_total", stage="prompt") == 3
    unscored = metric(pipeline, "tokens_unscored_total", stage="prompt", reason="invalid")
    assert unscored == 3


async def test_attribution_sums_to_the_score(pipeline: Pipeline) -> None:
    decision = await pipeline.score(ScoreRequest(text=RISKY, want_attribution=True))
    for result in decision.clusters:
        explained = result.attribution
        assert explained is not None
        total = explained.dense + explained.bias + explained.gate
        total += sum(latent.contribution for latent in explained.latents)
        assert total == pytest.approx(result.fused, rel=1e-5, abs=1e-5)


async def test_callers_deadline_is_an_error_the_policys_an_answer(
    pipeline: Pipeline, served: Served
) -> None:
    with pytest.raises(DeadlineError):
        await pipeline.score(ScoreRequest(text=CALM), deadline_seconds=0.0)
    hurried = served.bundle.spec.policies["default"].model_copy(update={"deadline_ms": 0})
    pipeline.served.policies["default"].model = hurried
    try:
        decision = await pipeline.score(ScoreRequest(text=RISKY), deadline_seconds=5.0)
    finally:
        pipeline.served.policies["default"].model = served.bundle.spec.policies["default"]
    assert decision.verdict is Verdict.PASS
    assert math.isnan(decision.overall.fused)
    assert decision.coverage.scored == 0
    assert decision.coverage.unscored[UnscoredReason.DEADLINE] == decision.coverage.received - 1
    assert metric(pipeline, "fail_open_total", reason="deadline") == 1


def given(pipeline: Pipeline, ids: tuple[int, ...], **changes: Any) -> ActivationsOpen:
    (width,) = pipeline.served.scorer.language_model.widths.values()
    tensor = ActivationTensor(hook_point=HOOK_POINT, dtype=ActivationDtype.FLOAT32, width=width)
    opened = ActivationsOpen(
        model_digest=pipeline.served.provenance.model_digest,
        n_tokens=len(ids),
        tensors=(tensor,),
        token_ids=ids,
        tokenizer_fingerprint=pipeline.served.tokenizer.fingerprint,
    )
    return replace(opened, **changes)


async def chunks(
    pipeline: Pipeline, ids: tuple[int, ...], n_rows: int
) -> AsyncIterator[ActivationsChunk]:
    """What the served model's own forward pass makes of the ids."""
    model = pipeline.served.scorer.language_model
    (read,) = model.step([Segment(model.open_stream(), ids)]).values()
    for start in range(0, len(ids), n_rows):
        rows = read[start : start + n_rows].numpy()
        yield ActivationsChunk(tensor=0, start_row=start, n_rows=len(rows), data=rows.tobytes())


async def test_long_given_activations_end_as_the_same_ids(pipeline: Pipeline) -> None:
    ids = ids_of(pipeline, f"{CALM} and {RISKY}, " * 6)
    assert len(ids) > 2 * 32, "several steps of the engine"
    own = await pipeline.score(ids_request(pipeline, ids, want_tokens=True))
    opened = given(pipeline, ids, want_tokens=True)
    found = await pipeline.score_activations(opened, chunks(pipeline, ids, 50))
    close(own, found)
    assert found.coverage == own.coverage
    assert found.timings.forward_seconds < own.timings.forward_seconds
    assert metric(pipeline, "tokens_scored_total", stage="prompt") == 2 * own.coverage.scored


async def test_the_policys_deadline_counts_from_the_last_chunk(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, sent, deadlines = ids_of(pipeline, RISKY), [], []
    real = pipeline.engine.score

    async def score(*args: Any, **named: Any) -> Any:
        deadlines.append(named["deadline"])
        return await real(*args, **named)

    async def slowly() -> AsyncIterator[ActivationsChunk]:
        async for chunk in chunks(pipeline, ids, 4):
            await asyncio.sleep(0.02)
            sent.append(time.monotonic())
            yield chunk

    monkeypatch.setattr(pipeline.engine, "score", score)
    found = await pipeline.score_activations(given(pipeline, ids), slowly())
    assert found.verdict is Verdict.ALERT
    assert len(sent) > 1
    assert deadlines[0] >= sent[-1] + pipeline.served.policies["default"].model.deadline_ms / 1000


async def test_deadlines_of_given_activations_are_those_of_score(
    pipeline: Pipeline, served: Served
) -> None:
    ids = ids_of(pipeline, RISKY)
    opened = given(pipeline, ids, token_ids=None, want_tokens=True)
    with pytest.raises(DeadlineError):
        await pipeline.score_activations(opened, chunks(pipeline, ids, 4), deadline_seconds=0.0)
    policy = pipeline.served.policies["default"]
    usual = served.bundle.spec.policies["default"]
    policy.model = usual.model_copy(update={"deadline_ms": 0})
    try:
        late = await pipeline.score_activations(opened, chunks(pipeline, ids, 4))
    finally:
        policy.model = usual
    assert late.coverage.unscored == {UnscoredReason.DEADLINE: len(ids)}
    assert [token.token_id for token in late.tokens] == [None] * len(ids)
    assert metric(pipeline, "fail_open_total", reason="deadline") == 1


def test_a_calibration_covers_given_activations_where_it_was_made_with_them(
    served: Served,
) -> None:
    spec = served.bundle.spec
    danger = spec.clusters[0].model_copy(update={"calibration": "c.json"})
    artefact = {
        **calibration_facts(served.bundle, served.provenance, served.plan.heads),
        "dtype": "bfloat16",
        "backend": "caller",
        "calibrated": True,
        "clusters": {
            "danger": {
                "thresholds": danger.thresholds.model_dump(),
                "aggregate": danger.aggregate.model_dump(),
                "benign_scores": [0.0, 1.0],
            }
        },
    }
    clusters = (danger, *spec.clusters[1:])
    bundle = replace(
        served.bundle,
        spec=spec.model_copy(update={"clusters": clusters}),
        calibration={"c.json": artefact},
    )
    calibrated = replace(served, bundle=bundle)
    covered, other = calibrated.as_given("bfloat16"), calibrated.as_given("float32")
    assert covered.plan.calibrated == (True, False)
    assert covered.plan.benign_p(0, 0.5) == pytest.approx(2 / 3)
    assert other.plan.calibrated == (False, False)
    assert other.uncalibrated_reasons["danger"] == "dtype: found float32, calibrated on bfloat16"
    assert other.scorer is served.scorer
    swapped = {**artefact, "sae_digests": {"l1": "another"}}
    foreign = replace(calibrated, bundle=replace(bundle, calibration={"c.json": swapped}))
    reason = foreign.as_given("bfloat16").uncalibrated_reasons["danger"]
    assert reason.startswith("sae_digests.l1: found ")
    assert reason.endswith("calibrated on another")


async def test_draining_refuses_new_work(pipeline: Pipeline) -> None:
    pipeline.draining = True
    with pytest.raises(NotReadyError, match="draining"):
        await pipeline.score(ScoreRequest(text=CALM))
    with pytest.raises(NotReadyError, match="draining"):
        pipeline.open_stream(StreamOpen())


async def test_every_decision_is_recorded_and_the_chain_holds(
    pipeline: Pipeline, audit_url: str
) -> None:
    calm = await pipeline.score(ScoreRequest(text=CALM, caller="alice"))
    risky = await pipeline.score(ScoreRequest(text=RISKY))
    assert risky.sequence is not None
    await pipeline.audit_log.close()
    records = {r["decision_id"]: r for r in query(audit_url)}
    assert set(records) == {calm.decision_id, risky.decision_id}
    assert records[risky.decision_id]["sequence"] == risky.sequence
    text = str(records)
    assert "danger of the" not in text
    assert "alice" not in text
    assert verify(audit_url).records == 2


async def test_unwritable_audit_log_is_counted_or_blocks(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*args: object, **kwargs: object) -> None:
        raise AuditError("disk full")

    monkeypatch.setattr(pipeline.audit_log, "append_decision", refuse)
    decision = await pipeline.score(ScoreRequest(text=RISKY))
    assert decision.action is Action.FLAG
    assert decision.sequence is None
    assert metric(pipeline, "fail_open_total", reason="audit") == 1
    blocked = await pipeline.score(ScoreRequest(text=CALM, policy="strict"))
    assert blocked.action is Action.BLOCK


async def stream_text(
    pipeline: Pipeline, pieces: list[str], **changes: Any
) -> tuple[Decision, list[StreamUpdate]]:
    updates: list[StreamUpdate] = []
    async with pipeline.open_stream(StreamOpen(want_tokens=True, **changes)) as session:

        async def read() -> None:
            async for update in session.updates():
                updates.append(update)

        reading = asyncio.create_task(read())
        sent = 0
        for piece in pieces:
            await session.feed(sent, text=piece)
            sent += len(piece)
            await asyncio.sleep(0)
        decision = await session.finish()
        await reading
    return decision, updates


def close(left: Decision, right: Decision) -> None:
    """The same verdicts, and per-token logits within 1e-4 relative."""
    assert [t.token_id for t in left.tokens] == [t.token_id for t in right.tokens]
    for a, b in zip(left.tokens, right.tokens, strict=True):
        assert a.fused == pytest.approx(b.fused, rel=1e-4, abs=1e-4)
        assert a.stage == b.stage
    assert [c.verdict for c in left.clusters] == [c.verdict for c in right.clusters]
    assert [c.first_crossing for c in left.clusters] == [c.first_crossing for c in right.clusters]
    assert left.overall.fused == pytest.approx(right.overall.fused, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
async def test_streamed_text_ends_as_whole_text(pipeline: Pipeline, seed: int) -> None:
    text = f"{CALM} and {RISKY}, café ☕ then {CALM}"
    rng = random.Random(seed)
    pieces, at = [], 0
    while at < len(text):
        step = 1 if seed == 0 else rng.randint(1, 9)
        pieces.append(text[at : at + step])
        at += step
    request = ScoreRequest(text=text, stage=Stage.COMPLETION, want_tokens=True)
    whole = await pipeline.score(request)
    streamed, updates = await stream_text(pipeline, pieces)
    close(whole, streamed)
    assert streamed.coverage == whole.coverage
    assert sum(len(update.new_alerts) for update in updates) == 1
    told = [alert.position for update in updates for alert in update.new_alerts]
    assert told == [whole.alerts[0].position]


@pytest.mark.parametrize("chunk", [1, 5, 1000])
async def test_streamed_ids_end_as_whole_ids(pipeline: Pipeline, chunk: int) -> None:
    ids = ids_of(pipeline, f"{CALM} and {RISKY}")
    request = ids_request(pipeline, ids, stage=Stage.COMPLETION, want_tokens=True)
    whole = await pipeline.score(request)
    opened = StreamOpen(
        want_tokens=True, tokenizer_fingerprint=pipeline.served.tokenizer.fingerprint
    )
    async with pipeline.open_stream(opened) as session:
        for start in range(0, len(ids), chunk):
            await session.feed(start, token_ids=ids[start : start + chunk])
            await asyncio.sleep(0)
        streamed = await session.finish()
    close(whole, streamed)


async def test_stream_after_a_conversation_scores_it_in_its_context(pipeline: Pipeline) -> None:
    turns = (Message(role="user", content=CALM), Message(role="assistant", content=RISKY))
    whole = await pipeline.score(ScoreRequest(messages=turns, want_tokens=True))
    streamed, updates = await stream_text(pipeline, [" ", *RISKY], context_messages=(turns[0],))
    assert streamed.verdict is whole.verdict is Verdict.ALERT
    assert streamed.clusters[0].stage is Stage.COMPLETION
    assert updates[0].start_index == 0


async def test_updates_tile_the_stream(pipeline: Pipeline) -> None:
    decision, updates = await stream_text(pipeline, list(RISKY))
    seen = [token.position for update in updates for token in update.tokens]
    assert sorted(set(seen)) == list(range(len(decision.tokens)))
    watermarks = [update.processed_index for update in updates]
    assert watermarks[-1] == len(decision.tokens)


@pytest.mark.parametrize("start", [0, 2, 7])
async def test_gap_or_rewind_in_a_stream_is_named(pipeline: Pipeline, start: int) -> None:
    async with pipeline.open_stream(StreamOpen()) as session:
        await session.feed(0, text="hello")
        with pytest.raises(StreamPositionError, match=f"found {start}, expected 5"):
            await session.feed(start, text="x")
        await session.feed(5, text=" there")
        assert (await session.finish()).verdict is Verdict.PASS


async def test_a_stream_takes_ids_or_text_not_both(pipeline: Pipeline) -> None:
    async with pipeline.open_stream(StreamOpen()) as session:
        await session.feed(0, text="hello")
        with pytest.raises(InvalidRequestError, match="one kind a stream"):
            await session.feed(5, token_ids=[1])
        await session.finish()


async def test_cancelled_stream_is_counted_and_recorded(pipeline: Pipeline, audit_url: str) -> None:
    async with pipeline.open_stream(StreamOpen()) as session:
        await session.feed(0, text=RISKY)
        decision_id = session.decision_id
    assert pipeline.n_streams == 0
    outcome = metric(pipeline, "requests_total", stage="completion", outcome="cancelled")
    assert outcome == 1
    await pipeline.audit_log.close()
    assert [r["decision_id"] for r in query(audit_url)] == [decision_id]


async def test_an_alert_is_recorded_and_counted_though_nobody_reads(
    pipeline: Pipeline, audit_url: str
) -> None:
    async with pipeline.open_stream(StreamOpen()) as session:
        await session.feed(0, text=RISKY)
        await session.flush()
        labels = {"cluster": "danger", "stage": "completion", "severity": "critical"}
        recorded: list[str] = []
        for _ in range(200):
            recorded = [r["kind"] for r in query(audit_url, kind=None)]
            if recorded:
                break
            await asyncio.sleep(0.02)
        assert recorded == ["stream_alert"]
        assert metric(pipeline, "alerts_total", **labels) == 1
        await session.finish()
    assert metric(pipeline, "alerts_total", **labels) == 1


async def test_text_of_a_stream_cancelled_at_once_is_counted(pipeline: Pipeline) -> None:
    async with pipeline.open_stream(StreamOpen()) as session:
        await session.feed(0, text=CALM)
    n = len(ids_of(pipeline, CALM)) - 1
    received = metric(pipeline, "tokens_received_total", stage="completion")
    scored = metric(pipeline, "tokens_scored_total", stage="completion")
    lost = metric(pipeline, "tokens_unscored_total", stage="completion", reason="cancelled")
    assert received == n == scored + lost


async def test_too_many_streams_are_refused_with_a_hint(pipeline: Pipeline) -> None:
    async with OpenStreams(pipeline, LIMITS.max_streams):
        with pytest.raises(QueueFullError, match="8 are open"):
            pipeline.open_stream(StreamOpen())
    pipeline.open_stream(StreamOpen())


async def test_flush_scores_text_that_waits_for_more(pipeline: Pipeline) -> None:
    async with pipeline.open_stream(StreamOpen()) as session:
        await session.feed(0, text="an attack")
        await session.flush()
        async for update in session.updates():
            if update.verdict is Verdict.ALERT:
                break
        assert update.processed_index == len(ids_of(pipeline, "an attack"))
        await session.finish()


async def test_overload_in_a_stream_is_a_gap_and_later_scores_are_exact(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"{CALM} and {RISKY}"
    ids = ids_of(pipeline, text)
    request = ids_request(pipeline, ids, stage=Stage.COMPLETION, want_tokens=True)
    whole = await pipeline.score(request)
    policy = pipeline.served.policies["default"]
    usual, real = policy.model, pipeline.engine.score
    full = True

    async def sometimes(*args: Any, **kwargs: Any) -> Any:
        if full:
            raise QueueFullError("queue: full", retry_seconds=0.01)
        return await real(*args, **kwargs)

    monkeypatch.setattr(pipeline.engine, "score", sometimes)
    policy.model = usual.model_copy(update={"deadline_ms": 20})
    opened = StreamOpen(
        want_tokens=True, tokenizer_fingerprint=pipeline.served.tokenizer.fingerprint
    )
    try:
        async with pipeline.open_stream(opened) as session:
            updates = session.updates()
            await session.feed(0, token_ids=ids[:10])
            gap = (await anext(updates)).gap
            assert gap is not None
            assert (gap.start_index, gap.stop_index) == (0, 10)
            full = False
            await session.feed(10, token_ids=ids[10:])
            decision = await session.finish()
    finally:
        policy.model = usual
    assert decision.coverage.unscored[UnscoredReason.OVERLOAD] == 9
    assert all(math.isnan(v) for v in decision.tokens[5].fused)
    for a, b in zip(whole.tokens[10:], decision.tokens[10:], strict=True):
        assert a.fused == pytest.approx(b.fused, rel=1e-4, abs=1e-4)


class OpenStreams:
    """Keeps some streams open."""

    def __init__(self, pipeline: Pipeline, n: int) -> None:
        self._sessions = [pipeline.open_stream(StreamOpen()) for _ in range(n)]

    async def __aenter__(self) -> None:
        for session in self._sessions:
            await session.__aenter__()

    async def __aexit__(self, *args: object) -> None:
        for session in self._sessions:
            await session.__aexit__(None, None, None)
