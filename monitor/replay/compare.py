"""What was decided then against what is decided now.

Two runs of the same tokens under the same numbers differ by rounding where tokens share their steps
with others, and so may a verdict whose score lies that near a threshold. The bound for "numerically
equal" is

    |now - then| <= TOLERANCE[dtype] * max(1, |then|)                  of every cluster's scores
    |now - then| <= TOLERANCE[dtype] * max(1, |then|) + half a step    of every token's logits

where half a step is what the stored trace rounds by (`trace.DecodedTrace.max_error`: 1/32767 of the
column's largest score, or 1/8192 if that is more); clusters' scores are stored as they were. The
dtype is the coarser one of then and now.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monitor.audit_log.trace import DecodedTrace, decode_trace
from monitor.pipeline import Traced
from monitor.records import ClusterResult, Decision, Verdict
from monitor.replay.rows import Original, ReplayClass

TOLERANCE: Mapping[str, float] = {"bfloat16": 0.1, "float32": 1e-4}
"""By dtype: how far scores of the same tokens may lie apart and still be called equal. That of
float32 is what the tests of every model family hold against float64; other steps move scores by a
seventh of it. In bfloat16 they can move a latent across its gate, and a score by more than this:
such records are `decision` (LOG.md, 2026-11-24). int8 is not here: what it rounds depends on all
that share a step."""

FACTS: Mapping[str, str] = {
    "bundle": "bundle_digest",
    "model": "model_digest",
    "tokenizer": "tokenizer_fingerprint",
    "saes": "sae_digests",
    "heads": "heads_digest",
    "dtype": "dtype",
    "backend": "backend",
    "version": "server_version",
    "torch": "torch",
    "transformers": "transformers",
    "batch": "max_step_tokens",
}
"""What may differ between then and now, and its name in `run_facts`."""
COVERAGE = "coverage"
"""Also in `differs`: other tokens were scored, for want of time or room, say."""

_SOURCES = ("fused", "dense", "sae")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How a decision now stands to the one on record."""

    replay_class: ReplayClass
    differs: tuple[str, ...]
    """Keys of `FACTS`, and COVERAGE."""
    not_recorded: tuple[str, ...]
    """Keys of `FACTS` that the log does not tell."""
    score_difference: float | None = None
    """Largest of the clusters' scores, in logits; None where there are none in common."""
    token_difference: float | None = None
    """Largest of the tokens' logits; None where the tokens or clusters are not the same."""
    trace_error: float | None = None
    """Largest half step of the stored trace."""


def compare(original: Original, now: Traced, stored: bytes, facts: Mapping[str, Any]) -> Comparison:
    """The class of a record, and what differs.

    Args:
        stored: the trace of `now`, encoded.
        facts: of this run, as `run_facts` gives them.
    """
    body, decision = original.body, now.decision
    differs, unknown = differing(original.facts, facts)
    if body["coverage"]["scored"] != decision.coverage.scored:
        differs += (COVERAGE,)
    then = original.trace
    tolerance = tolerance_between(original.facts.get("dtype"), facts["dtype"])
    score_difference, scores_hold = _scores(body["clusters"], decision.clusters, tolerance)
    token_difference, tokens_hold = _tokens(then, now, tolerance)
    if not _verdicts_equal(body, decision):
        found = ReplayClass.FLIPPED
    elif not _outcomes_equal(body, decision):
        found = ReplayClass.DECISION
    elif _bitwise(original, decision, decode_trace(stored)):
        found = ReplayClass.BITWISE
    elif scores_hold and tokens_hold:
        found = ReplayClass.NUMERIC
    else:
        found = ReplayClass.DECISION
    return Comparison(
        replay_class=found,
        differs=differs,
        not_recorded=unknown,
        score_difference=score_difference,
        token_difference=token_difference,
        trace_error=None if then is None else float(then.max_error.max(initial=0.0)),
    )


def differing(
    then: Mapping[str, Any], now: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys of `FACTS` that are not the same, and those that are not on record."""
    differs = [name for name, key in FACTS.items() if key in then and then[key] != now.get(key)]
    unknown = [name for name, key in FACTS.items() if key not in then]
    return tuple(differs), tuple(unknown)


def tolerance_between(then: str | None, now: str) -> float | None:
    """The tolerance of the coarser dtype; None where one of them has none."""
    tolerances = [TOLERANCE.get(dtype or "") for dtype in (then, now)]
    known = [tolerance for tolerance in tolerances if tolerance is not None]
    return max(known) if len(known) == len(tolerances) else None


def _verdicts_equal(body: Mapping[str, Any], decision: Decision) -> bool:
    """A cluster that one of the two does not have counts as passed there."""
    then = {name: result["verdict"] for name, result in body["clusters"].items()}
    now = {result.cluster: result.verdict.value for result in decision.clusters}
    passed = Verdict.PASS.value
    return body["verdict"] == decision.verdict.value and all(
        then.get(name, passed) == now.get(name, passed) for name in then.keys() | now.keys()
    )


def _outcomes_equal(body: Mapping[str, Any], decision: Decision) -> bool:
    """Whether what else was decided is the same, numbers aside."""
    return (
        body["clusters"].keys() == {result.cluster for result in decision.clusters}
        and body["action"] == decision.action.value
        and {rule["rule"] for rule in body["rules"]} == {rule.rule for rule in decision.rules}
        and body["coverage"]["scored"] == decision.coverage.scored
        and all(
            body["clusters"][result.cluster]["stage"]
            == (None if result.stage is None else result.stage.value)
            for result in decision.clusters
        )
    )


def _bitwise(original: Original, decision: Decision, trace: DecodedTrace) -> bool:
    """Whether every number on record is the same; the outcomes are known to be."""
    body, then = original.body, original.trace
    return (
        then is not None
        and trace.trace.clusters == then.trace.clusters
        and np.array_equal(trace.max_error, then.max_error)
        and np.array_equal(trace.trace.logits, then.trace.logits, equal_nan=True)
        and _same(body["overall"], decision.overall)
        and all(
            _same(body["clusters"][result.cluster], result)
            and body["clusters"][result.cluster]["first_crossing"] == result.first_crossing
            for result in decision.clusters
        )
    )


def _same(then: Mapping[str, Any], now: object) -> bool:
    return all(_number(then[name]) == _number(getattr(now, name)) for name in _SOURCES)


def _number(value: float | None) -> float | None:
    """As records have it: what is not finite is None."""
    return None if value is None or not np.isfinite(value) else float(value)


def _scores(
    then: Mapping[str, Any], now: tuple[ClusterResult, ...], tolerance: float | None
) -> tuple[float | None, bool]:
    """The largest difference of clusters that both have, and whether all lie within the bound."""
    largest, hold = None, tolerance is not None
    for result in now:
        if result.cluster not in then:
            continue
        for name in _SOURCES:
            a, b = _number(then[result.cluster][name]), _number(getattr(result, name))
            if a is None or b is None:
                hold = hold and a is b
                continue
            difference = abs(a - b)
            largest = max(difference, largest or 0.0)
            hold = hold and difference <= (tolerance or 0.0) * max(1.0, abs(a))
    return largest, hold


def _tokens(
    then: DecodedTrace | None, now: Traced, tolerance: float | None
) -> tuple[float | None, bool]:
    """As `_scores`, of every token's logits."""
    if then is None or then.trace.clusters != now.trace.clusters:
        return None, False
    a: NDArray[np.float64] = then.trace.logits.astype(np.float64)
    b = now.trace.logits.astype(np.float64)
    if a.shape != b.shape:
        return None, False
    known = np.isfinite(a) & np.isfinite(b)
    difference = np.where(known, np.abs(a - b), 0.0)
    bound = (tolerance or 0.0) * np.maximum(1.0, np.abs(a)) + then.max_error[None]
    hold = np.array_equal(np.isfinite(a), np.isfinite(b)) and bool(
        (difference[known] <= bound[known]).all()
    )
    return float(difference.max(initial=0.0)), hold and tolerance is not None
