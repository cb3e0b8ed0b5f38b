from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from monitor.bundle_spec import BundleSpec
from monitor.errors import NotFoundError
from monitor.policy import Policy
from monitor.records import Action, Severity, Stage, Verdict


def make_spec(**changes: Any) -> BundleSpec:
    cluster = {
        "severity": "critical",
        "title": "t",
        "latents": [{"sae": "a", "id": 0, "weight": 1.0}],
        "thresholds": {"flag": 1.0, "alert": 3.0, "clear": 0.5},
        "solo": {"sae": {"flag": 2.0, "alert": 4.0}},
    }
    content: dict[str, Any] = {
        "name": "s",
        "version": 1,
        "model": {"id": "m"},
        "saes": {"a": {"path": "a", "hook_point": "blocks.0.hook_resid_post"}},
        "clusters": [
            {**cluster, "id": "harm"},
            {**cluster, "id": "refusal", "stages": ["completion"], "severity": "info"},
        ],
        "policies": {"default": {}, "strict": {"mode": "enforce"}, "one": {"clusters": ["harm"]}},
    }
    return BundleSpec.model_validate({**content, **changes})


def running(*harm: float, refusal: float = -5.0) -> np.ndarray[Any, Any]:
    values = np.full((len(harm), 2, 3), -9.0)
    values[:, 0, :] = np.array(harm)[:, None]
    values[:, 1, :] = refusal
    return values


def test_unknown_policy_lists_the_known_ones() -> None:
    with pytest.raises(NotFoundError, match="default, one, strict"):
        Policy("nope", make_spec())


def test_score_at_a_threshold_reaches_it() -> None:
    policy = Policy("default", make_spec())
    state = policy.start()
    assert policy.advance(state, Stage.PROMPT, [0, 1, 2], running(0.9, 1.0, 2.9)) == []
    assert state.clusters[0].verdict is Verdict.FLAG
    assert state.clusters[0].first_crossing == 1
    crossings = policy.advance(state, Stage.PROMPT, [3], running(3.0))
    assert [(c.cluster, c.position, c.severity) for c in crossings] == [
        ("harm", 3, Severity.CRITICAL)
    ]
    assert state.clusters[0].verdict is Verdict.ALERT


def test_an_episode_alerts_once_and_again_only_after_clear() -> None:
    policy = Policy("default", make_spec())
    state = policy.start()
    scores = running(3.5, 4.0, 0.6, 3.5, 0.4, 3.2, 3.3)
    crossings = policy.advance(state, Stage.PROMPT, list(range(7)), scores)
    assert [c.position for c in crossings] == [0, 5]


def test_alerts_do_not_depend_on_chunks() -> None:
    policy = Policy("default", make_spec())
    rng = np.random.default_rng(0)
    scores = running(*rng.uniform(-1, 5, 200))
    whole = policy.advance(policy.start(), Stage.PROMPT, list(range(200)), scores)
    state = policy.start()
    pieces = []
    for start in range(0, 200, 7):
        stop = min(start + 7, 200)
        piece = scores[start:stop]
        pieces += policy.advance(state, Stage.PROMPT, list(range(start, stop)), piece)
    assert [c.position for c in whole] == [c.position for c in pieces]
    assert len(whole) > 3


def test_a_stage_that_the_cluster_does_not_watch_is_ignored() -> None:
    policy = Policy("default", make_spec())
    state = policy.start()
    policy.advance(state, Stage.PROMPT, [0], running(-5.0, refusal=9.0))
    assert state.clusters[1].verdict is Verdict.PASS
    policy.advance(state, Stage.COMPLETION, [1], running(-5.0, refusal=9.0))
    assert state.clusters[1].verdict is Verdict.ALERT


def test_policy_of_some_clusters_ignores_the_others() -> None:
    policy = Policy("one", make_spec())
    state = policy.start()
    policy.advance(state, Stage.COMPLETION, [0], running(-5.0, refusal=9.0))
    judgement = policy.judge(state, running(-5.0, refusal=9.0)[-1])
    assert judgement.verdict is Verdict.PASS
    assert judgement.overall.fused == pytest.approx(-3.0)


def test_only_enforcing_policies_block() -> None:
    for name, action in (("default", Action.FLAG), ("strict", Action.BLOCK)):
        policy = Policy(name, make_spec())
        state = policy.start()
        policy.advance(state, Stage.PROMPT, [0], running(5.0))
        assert policy.judge(state, running(5.0)[-1]).action is action


@pytest.mark.parametrize(
    ("score", "overall", "verdict"),
    [(1.0, 0.0, "flag"), (3.0, 1.0, "alert"), (2.0, 0.5, "flag"), (-1.0, -1.0, "pass")],
)
def test_overall_is_0_at_flag_and_1_at_alert(score: float, overall: float, verdict: str) -> None:
    policy = Policy("default", make_spec())
    state = policy.start()
    policy.advance(state, Stage.PROMPT, [0], running(score))
    judgement = policy.judge(state, running(score)[-1])
    assert judgement.overall.fused == pytest.approx(overall)
    assert judgement.overall.sae == pytest.approx((score - 2.0) / 2.0)
    assert math.isnan(judgement.overall.dense)
    assert judgement.verdict.value == verdict


@pytest.mark.parametrize(
    ("harm", "refusal", "overall"),
    [
        (-3.0, 0.9, -2.0),  # both below flag: as harm says, though refusal is higher
        (-3.0, 2.0, 0.5),  # refusal flags and harm does not
        (1.2, 2.8, 0.1),  # both flag
        (2.0, 5.0, 2.0),  # refusal alerts
    ],
)
def test_overall_is_the_score_of_one_cluster_as_far_as_the_verdict_agrees(
    harm: float, refusal: float, overall: float
) -> None:
    policy = Policy("default", make_spec(policies={"default": {"ranked_by": "harm"}}))
    state = policy.start()
    policy.advance(state, Stage.COMPLETION, [0], running(harm, refusal=refusal))
    judgement = policy.judge(state, running(harm, refusal=refusal)[-1])
    assert judgement.overall.fused == pytest.approx(overall)
    assert (overall >= 0) is (judgement.verdict is not Verdict.PASS)


def test_a_policy_is_ranked_by_a_cluster_that_it_looks_at() -> None:
    ranked = {"clusters": ["harm"], "ranked_by": "refusal"}
    with pytest.raises(ValueError, match=r"policies.default.ranked_by: found 'refusal'"):
        make_spec(policies={"default": ranked})


def test_overall_never_falls_below_a_verdict_that_was_reached() -> None:
    policy = Policy("default", make_spec())
    state = policy.start()
    policy.advance(state, Stage.PROMPT, [0, 1], running(4.0, 0.0))
    judgement = policy.judge(state, running(0.0)[-1])
    assert judgement.verdict is Verdict.ALERT
    assert judgement.overall.fused == 1.0


def test_nothing_scored_gives_no_overall_number() -> None:
    policy = Policy("default", make_spec())
    judgement = policy.judge(policy.start(), np.full((2, 3), np.nan))
    assert judgement.verdict is Verdict.PASS
    assert math.isnan(judgement.overall.fused)


def test_rule_fires_once_when_all_conditions_hold() -> None:
    rule = {
        "id": "jailbreak",
        "severity": "critical",
        "all": [
            {"cluster": "harm", "above": "flag"},
            {"cluster": "refusal", "below": "flag"},
            {"cluster": "harm", "below": 100.0},
        ],
    }
    policy = Policy("default", make_spec(rules=[rule]))
    state = policy.start()
    calm = policy.judge(state, running(0.9, refusal=-5.0)[-1])
    assert calm.rules == ()
    refused = policy.judge(state, running(2.0, refusal=4.0)[-1])
    assert refused.rules == ()
    fired = policy.judge(state, running(2.0, refusal=0.0)[-1])
    assert [r.rule for r in fired.rules] == ["jailbreak"]
    assert fired.verdict is Verdict.ALERT
    assert fired.overall.fused >= 1.0
    assert [c.cluster for c in policy.new_rules(state, fired)] == ["rule:jailbreak"]
    assert policy.new_rules(state, fired) == []
    assert policy.judge(state, running(0.0)[-1]).verdict is Verdict.ALERT
