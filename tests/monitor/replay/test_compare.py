from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from monitor.audit_log.record import Observed, decision_record
from monitor.audit_log.trace import TokenTrace, decode_trace, encode_trace
from monitor.pipeline import Traced
from monitor.records import (
    Action,
    AuditLevel,
    ClusterResult,
    Coverage,
    Decision,
    Overall,
    RuleResult,
    Severity,
    Stage,
    Verdict,
)
from monitor.replay.compare import FACTS, Comparison, compare, differing, tolerance_between
from monitor.replay.rows import Original, ReplayClass
from monitor.replay.summary import Summary

NAN = float("nan")
FACTS_NOW: dict[str, Any] = {key: key for key in FACTS.values()} | {"dtype": "float32"}


def traced(
    make_record: Callable[..., Any], fused: float = 2.5, tokens: float = 0.0, **changes: Any
) -> Traced:
    """A decision of two clusters over three tokens; `tokens` is added to the logits."""

    def result(cluster: str, score: float, verdict: Verdict) -> ClusterResult:
        return ClusterResult(
            cluster=cluster,
            fused=score,
            dense=NAN,
            sae=0.5,
            verdict=verdict,
            severity=Severity.WARNING,
            stage=Stage.PROMPT,
            first_crossing=None if verdict is Verdict.PASS else 1,
            calibrated=True,
        )

    decision = replace(
        make_record(Decision, 3),
        verdict=Verdict.FLAG,
        action=Action.FLAG,
        overall=Overall(fused=0.5, dense=NAN, sae=0.1),
        clusters=(result("a", fused, Verdict.FLAG), result("b", -1.0, Verdict.PASS)),
        rules=(),
        alerts=(),
        coverage=Coverage(received=3, scored=2),
    )
    logits = np.array([[[NAN] * 3] * 2, [[2.5, 1, 0.5]] * 2, [[-1, 0.3, 8.0]] * 2], np.float32)
    trace = TokenTrace(
        clusters=("a", "b"),
        stages=(None, Stage.PROMPT, Stage.PROMPT),
        logits=logits + np.float32(tokens),
    )
    return Traced(decision=replace(decision, **changes), trace=trace)


def original(then: Traced, **facts: Any) -> Original:
    """As the audit log has it."""
    record = decision_record(
        then.decision,
        level=AuditLevel.TOKENS,
        time_us=0,
        input_digest=None,
        observed=Observed(trace=then.trace, token_ids=[1, 2, 3]),
    )
    assert record.trace is not None
    return Original(
        decision_id="d",
        time_us=0,
        body=record.body("main", 1),
        facts=FACTS_NOW | facts,
        trace=decode_trace(record.trace),
    )


def compared(then: Original, now: Traced) -> Comparison:
    return compare(then, now, encode_trace(now.trace), FACTS_NOW)


def with_cluster(now: Traced, index: int, **changes: Any) -> Traced:
    clusters = list(now.decision.clusters)
    clusters[index] = replace(clusters[index], **changes)
    return replace(now, decision=replace(now.decision, clusters=tuple(clusters)))


def test_the_same_numbers_are_bitwise(make_record: Callable[..., Any]) -> None:
    now = traced(make_record)
    found = compared(original(now), now)
    assert (found.replay_class, found.differs) == (ReplayClass.BITWISE, ())
    assert (found.score_difference, found.trace_error) == (0.0, 2**-12)
    assert found.token_difference == pytest.approx(abs(0.3 - round(0.3 * 4096) / 4096), abs=1e-7)


@pytest.mark.parametrize(
    ("fused", "tokens", "expected"),
    [
        (2.5 + 2e-4, 0.0, ReplayClass.NUMERIC),  # 1e-4 * 2.5 is the bound
        (2.5 + 3e-4, 0.0, ReplayClass.DECISION),
        (2.5, 2e-4, ReplayClass.NUMERIC),  # half a step of 2**-12, and 1e-4 at least
        (2.5, 4e-4, ReplayClass.DECISION),
        (NAN, 0.0, ReplayClass.DECISION),
    ],
)
def test_scores_within_the_bound_are_numerically_equal(
    make_record: Callable[..., Any], fused: float, tokens: float, expected: ReplayClass
) -> None:
    then = original(traced(make_record))
    assert compared(then, traced(make_record, fused, tokens)).replay_class is expected


def test_the_bound_is_that_of_the_coarser_dtype(make_record: Callable[..., Any]) -> None:
    now = traced(make_record, 2.5 + 0.05)
    assert compared(original(traced(make_record)), now).replay_class is ReplayClass.DECISION
    found = compared(original(traced(make_record), dtype="bfloat16"), now)
    assert (found.replay_class, found.differs) == (ReplayClass.NUMERIC, ("dtype",))
    assert tolerance_between("int8", "float32") is None
    found = compared(original(traced(make_record), dtype="int8"), now)
    assert found.replay_class is ReplayClass.DECISION


def test_verdicts_decide_between_equal_and_flipped(make_record: Callable[..., Any]) -> None:
    now = traced(make_record)
    then = original(now)
    assert compared(then, traced(make_record, verdict=Verdict.ALERT)).replay_class is (
        ReplayClass.FLIPPED
    )
    assert compared(then, with_cluster(now, 1, verdict=Verdict.FLAG)).replay_class is (
        ReplayClass.FLIPPED
    )
    for other in (
        traced(make_record, action=Action.BLOCK),
        traced(make_record, rules=(RuleResult(rule="r", severity=Severity.INFO),)),
        with_cluster(now, 0, stage=Stage.COMPLETION),
    ):
        assert compared(then, other).replay_class is ReplayClass.DECISION
    assert compared(then, with_cluster(now, 0, first_crossing=2)).replay_class is (
        ReplayClass.NUMERIC
    )


def test_clusters_that_come_or_go_count_as_passed(make_record: Callable[..., Any]) -> None:
    then = original(traced(make_record))
    renamed = with_cluster(traced(make_record), 1, cluster="c")
    assert compared(then, renamed).replay_class is ReplayClass.DECISION
    renamed = with_cluster(traced(make_record), 0, cluster="c")
    assert compared(then, renamed).replay_class is ReplayClass.FLIPPED


def test_other_coverage_is_a_difference(make_record: Callable[..., Any]) -> None:
    now = traced(make_record, coverage=Coverage(received=3, scored=3))
    found = compared(original(traced(make_record)), now)
    assert (found.replay_class, found.differs) == (ReplayClass.DECISION, ("coverage",))


def test_what_differs_and_what_is_not_on_record() -> None:
    then = {key: value for key, value in FACTS_NOW.items() if key != "torch"}
    assert differing(then | {"bundle_digest": "x"}, FACTS_NOW) == (("bundle",), ("torch",))


def test_summaries_join_by_what_made_the_records() -> None:
    def one(made_by: str, n: int) -> Summary:
        group = {
            "then": {"bundle": made_by},
            "differs": ["bundle"],
            "not_recorded": [],
            "classes": {"flipped": n},
            "score_difference": float(n),
            "token_difference": 0.0,
            "trace_error": 0.0,
        }
        return Summary.from_json(
            {
                "rows": n,
                "tokens": n,
                "classes": {"flipped": n},
                "reasons": {},
                "groups": [group],
            }
        )

    joined = Summary.joined([one("a", 1), one("b", 2), one("a", 4)])
    assert [(g.then["bundle"], g.classes, g.score_difference) for g in joined.groups] == [
        ("a", {"flipped": 5}, 4.0),
        ("b", {"flipped": 2}, 2.0),
    ]
    assert joined.n_below(ReplayClass.DECISION) == 7
