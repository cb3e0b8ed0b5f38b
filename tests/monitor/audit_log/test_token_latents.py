from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from monitor.audit_log.chain import canonical_bytes
from monitor.audit_log.record import Asked, Observed, decision_record
from monitor.audit_log.token_latents import (
    MAX_LATENTS,
    MAX_TOKENS,
    TokenLatents,
    decode_token_latents,
    encode_token_latents,
)
from monitor.audit_log.trace import TokenTrace
from monitor.errors import AuditError
from monitor.records import AuditLevel, ClusterResult, Decision, Stage, Verdict
from monitor.work_queue import Priority


def random_latents(n_tokens: int, n_latents: int, scale: float, seed: int = 0) -> TokenLatents:
    chance = np.random.default_rng(seed)
    active = chance.random((n_tokens, n_latents)) < 0.4
    return TokenLatents(
        latents=tuple(("l9", 10 * i) for i in range(n_latents)),
        positions=np.arange(n_tokens) * 2 + 3,
        contributions=scale * chance.normal(0, 1, active.shape) * active,
    )


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0, 5e4])
def test_what_is_named_is_within_the_stated_error(scale: float) -> None:
    found = random_latents(40, 12, scale)
    stored = json.loads(canonical_bytes(encode_token_latents(found)))
    decoded = decode_token_latents(stored)
    largest = np.abs(found.contributions).max()
    assert decoded.max_error <= max(largest / 32767, 1 / 512)
    assert decoded.left_out == 0
    active = found.contributions.any(axis=1)
    assert [t.position for t in decoded.tokens] == found.positions[active].tolist()
    for token, row in zip(decoded.tokens, found.contributions[active], strict=True):
        named = {latent // 10: value for _, latent, value in token.latents}
        sizes = [abs(value) for value in named.values()]
        assert sizes == sorted(sizes, reverse=True)
        for latent, value in named.items():
            assert abs(value - row[latent]) <= decoded.max_error
        others = np.delete(row, list(named))
        assert abs(token.others - others.sum()) <= decoded.max_error
        # Nothing that is larger than what is named was left out.
        cut = min(sizes, default=np.inf) if len(named) == MAX_LATENTS else decoded.max_error
        assert np.abs(others).max(initial=0.0) <= cut + 2 * decoded.max_error


def test_it_is_bounded_and_says_what_it_left_out() -> None:
    found = random_latents(500, 40, 3.0)
    stored = encode_token_latents(found)
    decoded = decode_token_latents(json.loads(canonical_bytes(stored)))
    weights = np.abs(found.contributions).sum(axis=1)
    heaviest = set(found.positions[np.argsort(-weights)[:MAX_TOKENS]].tolist())
    assert {token.position for token in decoded.tokens} == heaviest
    assert decoded.left_out == 500 - MAX_TOKENS
    assert max(len(token.latents) for token in decoded.tokens) == MAX_LATENTS
    assert len(canonical_bytes(stored)) < 8000


def test_a_window_without_latents_is_stored_as_such() -> None:
    none = replace(random_latents(3, 2, 1.0), contributions=np.zeros((3, 2)))
    assert decode_token_latents(encode_token_latents(none)).tokens == ()
    no_latents = TokenLatents(
        latents=(), positions=np.arange(3), contributions=np.zeros((3, 0), np.float64)
    )
    assert decode_token_latents(encode_token_latents(no_latents)).tokens == ()


@pytest.mark.parametrize(
    "change",
    [
        {"exponent": None},
        {"tokens": [[0]]},
        {"tokens": [[7, 1]]},
        {"positions": [1, 2]},
        {"latents": [3]},
        {"exponent": 10**6},
    ],
)
def test_what_is_no_stored_form_is_refused(change: dict[str, Any]) -> None:
    stored = {
        "exponent": -8,
        "latents": [["l", 1]],
        "positions": [1],
        "tokens": [[0, 5]],
        "others": [0],
        "left_out": 0,
    }
    assert decode_token_latents(stored).tokens[0].latents == (("l", 1, 5 / 256),)
    with pytest.raises(AuditError, match="token_latents: cannot be read"):
        decode_token_latents({**stored, **change})


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (AuditLevel.METADATA, None),
        (AuditLevel.SCORES, ["alerts"]),
        (AuditLevel.TOKENS, ["alerts", "flags"]),
        (AuditLevel.CONTENT, ["alerts", "flags"]),
    ],
)
def test_the_level_says_whose_tokens_are_explained(
    make_record: Callable[..., Any], level: AuditLevel, expected: list[str] | None
) -> None:
    names = {"alerts": Verdict.ALERT, "flags": Verdict.FLAG, "passes": Verdict.PASS}
    decision = replace(
        make_record(Decision, 3),
        clusters=tuple(
            replace(make_record(ClusterResult, 4), cluster=name, verdict=verdict)
            for name, verdict in names.items()
        ),
    )
    trace = TokenTrace(
        clusters=tuple(names),
        stages=(Stage.PROMPT,),
        logits=np.zeros((1, 3, 3), np.float32),
    )
    record = decision_record(
        decision,
        level=level,
        time_us=0,
        input_digest=None,
        observed=Observed(trace=trace, latents={name: random_latents(4, 3, 1.0) for name in names}),
        asked=Asked(stage="chat", priority=Priority.PROMPT),
    )
    found = record.content.get("token_latents")
    assert (None if found is None else sorted(found)) == expected  # type: ignore[arg-type]
    assert record.content["asked"] == {"stage": "chat", "priority": "prompt"}
