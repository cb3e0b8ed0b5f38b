from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.audit_log.query import query
from monitor.audit_report.heat import MAX_TOKENS, heat_of
from monitor.audit_report.summary import MAX_BINS, SCORE_STEP, Bins, Summary
from monitor.records import Verdict
from tests.monitor.audit_report.conftest import Log

TIMES = st.integers(0, 4 * 10**15)


@settings(deadline=None)
@given(TIMES, TIMES, TIMES)
def test_bins_cover_the_span_and_are_few(one: int, other: int, between: int) -> None:
    first, last = sorted((one, other))
    bins = Bins.over(first, last)
    assert 1 <= bins.n <= MAX_BINS + 1
    assert bins.of(first) == 0
    assert bins.of(last) == bins.n - 1
    place = bins.of(between)
    if first <= between <= last:
        assert 0 <= between - bins.start_us - place * bins.width_us < bins.width_us


def test_what_is_counted_is_what_was_decided(log: Log) -> None:
    summary = Summary(Bins.over(0, 10**15))
    for body in query(log.url):
        summary.add(body)
    assert summary.verdicts == Counter(d.verdict.value for d in log.decisions)
    assert {name: sum(counts) for name, counts in summary.by_bin.items()} == summary.verdicts
    unscored = Counter[str]()
    for decision in log.decisions:
        unscored.update({r.value: n for r, n in decision.coverage.unscored.items()})
    assert summary.unscored == unscored
    for index, name in enumerate(c.cluster for c in log.decisions[0].clusters):
        results = [d.clusters[index] for d in log.decisions]
        counts = summary.clusters[name]
        assert counts.alerts == sum(counts.alerts_by_bin)
        assert counts.alerts == sum(r.verdict is Verdict.ALERT for r in results)
        assert counts.flags == sum(r.verdict is not Verdict.PASS for r in results)
        scores = sorted(r.fused for r in results if r.fused == r.fused)
        stepped = sorted(step for step, n in counts.scores.items() for _ in range(n))
        assert len(stepped) == len(scores) == counts.scored
        for step, score in zip(stepped, scores, strict=True):
            assert step * SCORE_STEP <= score + 1e-9
            assert score < (step + 1) * SCORE_STEP + 1e-9
        if counts.alerts:
            assert counts.latents["l1", index].contribution == 2.5 * counts.alerts
    assert summary.latest_alerts[-1] == log.of(Verdict.ALERT)[-1].decision_id


def test_a_long_decision_is_cut_around_its_highest_token(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    decision = max(log.decisions, key=lambda d: d.coverage.received)
    assert decision.coverage.received < MAX_TOKENS
    whole = heat_of(log.url, decision.decision_id, {}, None)
    assert (len(whole.tokens), whole.is_cut) == (decision.coverage.received, False)
    monkeypatch.setattr("monitor.audit_report.heat.MAX_TOKENS", 5)
    cut = heat_of(log.url, decision.decision_id, {}, None)
    assert (len(cut.tokens), cut.is_cut) == (5, True)

    def highest(tokens: object) -> float:
        scores = [x for t in tokens if t.stage for x in t.fused if x is not None]  # type: ignore[attr-defined]
        return max(scores)

    assert highest(cut.tokens) == highest(whole.tokens)
