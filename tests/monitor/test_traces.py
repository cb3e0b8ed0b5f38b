"""Traces: the logits that the pipeline makes, kept, and judged as the pipeline judges them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from monitor.errors import InvalidRequestError
from monitor.judged import Judged, judge
from monitor.local import load_local, local_pipeline
from monitor.records import ScoreRequest, Stage, Verdict
from monitor.served import Served
from monitor.traces import Trace, TraceStore, request_of, trace_texts
from sae_core.evaluation.data import LabelledText

TEXTS = (
    "please tell me how to bake bread",
    "an attack on the north",
    "the weather is danger and bread today",
)


@pytest.fixture(scope="module")
def served(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return load_local(tiny_bundle, model=None, cache=tmp_path_factory.mktemp("cache"))


async def traced(
    load: Callable[[], Served], store: TraceStore, texts: tuple[str, ...] = TEXTS
) -> list[Trace]:
    async with local_pipeline(load) as pipeline:
        requests = [ScoreRequest(text=text) for text in texts]
        return [trace async for _, trace in trace_texts(pipeline, requests, store)]


async def test_a_judged_trace_is_the_pipelines_decision(served: Served, tmp_path: Path) -> None:
    with TraceStore(tmp_path, served.logits_key) as store:
        traces = await traced(lambda: served, store)
    async with local_pipeline(lambda: served) as pipeline:
        decisions = [await pipeline.score(ScoreRequest(text=text)) for text in TEXTS]
    for trace, decision in zip(traces, decisions, strict=True):
        judged = judge(served, served.policies["default"], trace)
        assert judged.verdict is decision.verdict
        expected = [[c.fused, c.dense, c.sae] for c in decision.clusters]
        np.testing.assert_allclose(judged.scores, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(judged.overall[0], decision.overall.fused, rtol=1e-4)
        assert judged.n_scored == decision.coverage.scored
        np.testing.assert_array_equal(judged.peaks, judged.scores)  # both aggregates only rise


async def test_what_was_kept_is_not_computed_again(served: Served, tmp_path: Path) -> None:
    with TraceStore(tmp_path, "key") as store:
        first = await traced(lambda: served, store)
    async with local_pipeline(lambda: served) as pipeline:
        pipeline.engine.stop()  # whatever had to be computed would fail
        with TraceStore(tmp_path, "key") as store:
            requests = [ScoreRequest(text=text) for text in TEXTS]
            again = [trace async for _, trace in trace_texts(pipeline, requests, store)]
    for one, other in zip(first, again, strict=True):
        assert one.logits.tobytes() == other.logits.tobytes()
        assert (one.token_ids, one.stages) == (other.token_ids, other.stages)


async def test_a_stopped_run_leaves_what_it_had(served: Served, tmp_path: Path) -> None:
    async with local_pipeline(lambda: served) as pipeline:
        with TraceStore(tmp_path, "key") as store:
            requests = [ScoreRequest(text=text) for text in TEXTS]
            async for index, _ in trace_texts(pipeline, requests, store):
                if index == 1:
                    break
    with TraceStore(tmp_path, "key") as store:
        assert store.get(ScoreRequest(text=TEXTS[0])) is not None
        assert store.get(ScoreRequest(text="never scored")) is None


async def test_a_text_that_cannot_be_scored_is_named_by_its_place(
    served: Served, tmp_path: Path
) -> None:
    limit = served.scorer.language_model.config.max_positions
    async with local_pipeline(lambda: served) as pipeline:
        with TraceStore(tmp_path, "key") as store:
            requests = [ScoreRequest(text="bread " * (limit + 1))]
            with pytest.raises(InvalidRequestError, match="rows.jsonl line 7: found a text that"):
                async for _ in trace_texts(pipeline, requests, store, places=["rows.jsonl line 7"]):
                    pass


async def test_the_crossing_is_counted_in_scored_tokens(served: Served, tmp_path: Path) -> None:
    with TraceStore(tmp_path, "key") as store:
        trace = (await traced(lambda: served, store, ("bread bread attack bread",)))[0]
    judged: Judged = judge(served, served.policies["default"], trace)
    texts = served.tokenizer.token_texts(list(trace.token_ids))
    last_of_word = max(i for i, t in enumerate(texts) if t.strip() and t.strip() in "attack")
    n_excluded = sum(s is None for s in trace.stages[: last_of_word + 1])
    assert judged.verdict is Verdict.ALERT
    assert judged.alerted_at is not None
    assert judged.alerted_at <= last_of_word + 1 - n_excluded
    assert judged.flagged_at == judged.alerted_at


def test_stages_left_out_do_not_count(served: Served) -> None:
    logits = np.full((4, 2, 3), 9.0, np.float32)
    stages = (None, Stage.PROMPT, Stage.PROMPT, Stage.COMPLETION)
    trace = Trace(token_ids=(0, 1, 2, 3), stages=stages, logits=logits, compute_seconds=0.0)
    judged = judge(served, served.policies["default"], trace, (Stage.COMPLETION,))
    assert judged.n_scored == 1
    assert judged.flagged_at == 1


def test_a_row_is_sent_in_the_stage_of_its_kind() -> None:
    row = LabelledText(text="yes", is_harmful=True, kind="completion", prompt="may I?")
    assert request_of(row).stage is Stage.COMPLETION
    turns = request_of(row, with_prompt=True).messages
    assert turns is not None
    assert [(m.role, m.content) for m in turns] == [("user", "may I?"), ("assistant", "yes")]
    assert request_of(LabelledText(text="yes", is_harmful=True)).stage is Stage.PROMPT
