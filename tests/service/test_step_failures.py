"""Steps that fail on the real server: their own requests hear of it, everybody else goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from monitor.client import MonitorClient
from monitor.errors import ActivationError, ComputeMemoryError, MonitorError
from monitor.records import Decision, Verdict
from sae_core.errors import ScorerError
from sae_core.language_model.model import Segment

CALM = "please tell me how to bake bread"
RISKY = "what is the weather like today and please tell me about the attack in the north"
POISONED = "never share a password or a secret"


class Failing:
    """A scorer that raises where a step is of a certain kind."""

    def __init__(self, scorer: Any, error: Callable[[Sequence[Segment]], Exception | None]) -> None:
        self._scorer = scorer
        self._error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)

    def step(self, parts: Sequence[Segment]) -> Any:
        error = self._error(parts)
        if error is not None:
            raise error
        return self._scorer.step(parts)


def ask(client: MonitorClient, text: str) -> Decision | MonitorError:
    try:
        return client.score(text=text, tokens=True)
    except MonitorError as error:
        return error


def failures(server: Any, reason: str) -> float:
    model = server.server.pipeline.served.provenance.model
    found = server.value("saemonitor_step_failures_total", model=model, reason=reason)
    assert isinstance(found, float)
    return found


def ask_together(client: MonitorClient, texts: Sequence[str]) -> list[Decision | MonitorError]:
    with ThreadPoolExecutor(len(texts)) as pool:
        return list(pool.map(lambda text: ask(client, text), texts))


def test_requests_that_do_not_fit_into_memory_together_are_scored_in_smaller_steps(
    serve: Any, client: MonitorClient
) -> None:
    texts = [CALM, RISKY, POISONED] * 4
    expected = [ask(client, text) for text in texts]
    with serve(prefix_reuse=False) as server, server.client() as short:
        engine = server.server.pipeline.engine

        def no_memory(parts: Sequence[Segment]) -> Exception | None:
            n_tokens = sum(len(part.token_ids) for part in parts)
            return torch.OutOfMemoryError("CUDA out of memory") if n_tokens > 5 else None

        engine.scorer = Failing(engine.scorer, no_memory)
        answers = ask_together(short, texts)
        assert failures(server, "memory") > 0
        assert engine.queue_tokens == 0
    for answer, whole in zip(answers, expected, strict=True):
        assert isinstance(answer, Decision) and isinstance(whole, Decision)
        assert answer.verdict is whole.verdict
        for mine, other in zip(answer.tokens, whole.tokens, strict=True):
            assert mine.fused == pytest.approx(other.fused, rel=1e-4, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize(
    ("raised", "expected", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), ComputeMemoryError, "memory"),
        (ScorerError("segment 0, position 3: not finite"), ActivationError, "not_finite"),
        (ZeroDivisionError("a bug"), MonitorError, "error"),
    ],
    ids=["memory", "not finite", "bug"],
)
def test_a_request_whose_step_fails_fails_alone(
    serve: Any, raised: Exception, expected: type[MonitorError], reason: str
) -> None:
    with serve() as server, server.client() as client:
        pipeline = server.server.pipeline
        poison = pipeline.served.tokenizer.encode(POISONED, add_bos=False)[0]

        def poisoned(parts: Sequence[Segment]) -> Exception | None:
            return raised if any(poison in part.token_ids for part in parts) else None

        pipeline.engine.scorer = Failing(pipeline.engine.scorer, poisoned)
        answers = ask_together(client, [RISKY, POISONED, RISKY, CALM])
        assert type(answers[1]) is expected
        kept = [answer for answer in answers if isinstance(answer, Decision)]
        assert [answer.verdict for answer in kept] == [Verdict.ALERT, Verdict.ALERT, Verdict.PASS]
        assert failures(server, reason) > 0
        assert (pipeline.n_requests, pipeline.engine.queue_tokens) == (0, 0)
        assert pipeline.engine.cache().sessions == 0
        with client.stream() as stream:
            stream.send(text=POISONED)
            with pytest.raises(expected):
                stream.finish()
        assert client.health()
        assert client.score(text=RISKY).verdict is Verdict.ALERT
