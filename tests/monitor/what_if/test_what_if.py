from __future__ import annotations

import dataclasses
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from monitor.audit_log.query import Filter
from monitor.audit_log.schema import database_path
from monitor.bundle import Bundle
from monitor.bundle_spec import BundleSpec
from monitor.errors import AuditError
from monitor.records import Verdict
from monitor.what_if.changes import mcnemar, paired_interval
from monitor.what_if.run import WhatIf, what_if
from monitor.what_if.settings import changed_spec, unanswerable
from tests.monitor.what_if.conftest import (
    AGGREGATES,
    Case,
    random_cases,
    spec_content,
    write_bundle,
    write_log,
)

CHANGES: dict[str, dict[str, Any]] = {
    "thresholds": {"clusters": {"*": {"thresholds": {"alert": 1.5, "flag": 1.25}}}},
    "windows": {
        "clusters": {
            "rolling": {"aggregate": {"window": 2}},
            "whole": {"aggregate": {"window": 12}},
            "ema": {"stages": ["prompt"]},
        }
    },
    "kinds": {"clusters": {"mean": {"aggregate": {"kind": "top_k_mean", "k": 2}}}},
    "gates": {"clusters": {"*": {"aggregate": {"min_evidence_tokens": 5, "evidence_floor": 0.25}}}},
    "fusion": {"clusters": {"*": {"fusion": {"sae": 1.25, "dense": 0.25, "bias": 0.1}}}},
    "dense only": {"clusters": {"highest": {"fusion": {"sae": 0.0, "dense": 1.5}}}},
    "rules": {
        "rules": [{"id": "new", "severity": "info", "all": [{"cluster": "top", "below": 0}]}]
    },
    "moments": {
        "rules": [
            {
                "id": "new",
                "severity": "info",
                "all": [{"cluster": "whole", "above": 0.25}, {"cluster": "rolling", "below": 1.0}],
            }
        ]
    },
    "policies": {"policies": {"narrow": {"clusters": ["mean", "highest"]}}},
}


def truth(
    cases: list[Case], champion: BundleSpec, challenger: BundleSpec
) -> dict[str, Counter[tuple[bool, bool]]]:
    """What really changes, decision by decision, from logits that were never rounded."""
    found: dict[str, Counter[tuple[bool, bool]]] = {
        name: Counter() for name in ("overall", *AGGREGATES, "rule:both", "rule:new")
    }
    for case in cases:
        before, after = case.alerts(champion), case.alerts(challenger)
        found["overall"][before[0] is Verdict.ALERT, after[0] is Verdict.ALERT] += 1
        for name in AGGREGATES:
            found[name][name in before[1], name in after[1]] += 1
        for rule in ("both", "new"):
            found[f"rule:{rule}"][rule in before[2], rule in after[2]] += 1
    return found


def check(result: WhatIf, expected: dict[str, Counter[tuple[bool, bool]]], n: int) -> None:
    assert result.compared == n
    assert result.not_reproduced.count == 0
    found = {"overall": result.overall["alert"]}
    found |= {name: levels["alert"] for name, levels in result.clusters.items()}
    found |= {f"rule:{name}": change for name, change in result.rules.items()}
    for name, change in found.items():
        appeared, vanished = expected[name][False, True], expected[name][True, False]
        assert change.appeared <= appeared, name
        assert change.vanished <= vanished, name
        missed = appeared + vanished - change.appeared - change.vanished
        assert 0 <= missed <= change.uncertain, name
        assert change.uncertain <= 0.02 * n, name
        then = vanished + expected[name][True, True]
        assert abs(change.champion - then) <= change.uncertain, name


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_claimed_is_what_the_server_would_have_said(
    many: Bundle, cases: list[Case], log: str, name: str
) -> None:
    challenger = changed_spec(many.spec, [CHANGES[name]])
    expected = truth(cases, many.spec, challenger)
    check(what_if(log, many, challenger, label="x"), expected, len(cases))
    changed = sum(
        n for counts in expected.values() for pair, n in counts.items() if len({*pair}) > 1
    )
    assert changed >= 2, "a change that changes nothing proves nothing"


def test_a_rule_that_held_for_a_moment_of_a_stream_is_seen(
    many: Bundle, cases: list[Case], log: str, exported: Path
) -> None:
    challenger = changed_spec(many.spec, [CHANGES["moments"]])
    fires = {c.decision_id for c in cases if "new" in c.alerts(challenger)[2]}
    at_its_end = {
        c.decision_id
        for c in cases
        if "new" in dataclasses.replace(c, session_id="").alerts(challenger)[2]
    }
    passing = fires - at_its_end
    assert len(passing) >= 5
    assert passing <= {c.decision_id for c in cases if c.session_id}
    for place in (log, exported):
        found = what_if(place, many, challenger, label="x").rules["new"]
        assert (found.challenger, found.uncertain) == (len(fires), 0)


@pytest.mark.parametrize("name", ["windows", "fusion", "moments"])
def test_an_export_gives_what_the_log_gives(
    many: Bundle, log: str, exported: Path, name: str
) -> None:
    challenger = changed_spec(many.spec, [CHANGES[name]])
    one, other = (what_if(place, many, challenger, label="x") for place in (log, exported))
    assert (one.overall, one.clusters, one.rules) == (other.overall, other.clusters, other.rules)
    assert one.compared == other.compared
    until = Filter(until=1_700_000_101.0)
    some = [what_if(place, many, challenger, label="x", wanted=until) for place in (log, exported)]
    assert some[0].compared == some[1].compared < 110


def test_the_same_bundle_changes_nothing_and_leaves_nothing_uncertain(
    many: Bundle, log: str
) -> None:
    result = what_if(log, many, many.spec, label="itself")
    for change in (*result.overall.values(), result.clusters["rolling"]["alert"]):
        assert (change.appeared, change.vanished, change.uncertain) == (0, 0, 0)
        assert (change.champion, change.p_value) == (change.challenger, 1.0)
        assert change.low < 0 < change.high


def test_a_score_within_the_error_of_a_threshold_is_uncertain(many: Bundle, tmp_path: Path) -> None:
    case = random_cases(many.spec, 2, seed=3)[1]
    case.is_scored[:] = True
    case.stages[:] = ["prompt"] * len(case.stages)  # type: ignore[list-item]
    case.logits[:] = -9.0  # steps of 2**-11
    case.logits[0] = 8.0 + 2.0**-13
    url = f"sqlite:///{tmp_path / 'audit.db'}"
    only = {"policies": {"default": {"clusters": ["highest"]}, "narrow": {"clusters": ["highest"]}}}
    bundle = write_bundle(tmp_path / "bundle", spec_content(rules=[], **only))
    fused = float(-0.25 + 1.25 * (8.0 + 2.0**-13))
    write_log(url, bundle, [case])
    for alert, uncertain, vanished in ((fused, 1, 0), (fused + 0.01, 0, 1)):
        change = {"clusters": {"highest": {"thresholds": {"alert": alert}}}}
        gate = {"clusters": {"highest": {"aggregate": {"min_evidence_tokens": 1}}}}
        champion = Bundle(**{**_fields(bundle), "spec": changed_spec(bundle.spec, [gate])})
        found = what_if(url, champion, changed_spec(champion.spec, [change]), label="x")
        alerts = found.clusters["highest"]["alert"]
        assert (alerts.uncertain, alerts.vanished, alerts.appeared) == (uncertain, vanished, 0)
        assert found.overall["alert"].uncertain == uncertain


def test_decisions_that_say_nothing_are_counted_by_reason_and_named(
    many: Bundle, tmp_path: Path
) -> None:
    url, path = f"sqlite:///{tmp_path / 'audit.db'}", tmp_path / "some.parquet"
    cases = [c for c in random_cases(many.spec, 60, seed=1) if len(c.stages)]
    other = write_bundle(tmp_path / "other", spec_content(name="other"))
    renamed = spec_content(policies={"default": {}, "narrow": {}}, rules=[])
    renamed["clusters"][0]["id"] = "renamed"
    strange = write_bundle(tmp_path / "strange", renamed)
    write_log(url, many, cases[:20])
    write_log(url, many, cases[20:21], level="metadata")
    write_log(url, other, cases[23:24])
    misnamed = next(c for c in cases[24:] if c.policy == "default")
    write_log(url, Bundle(**{**_fields(strange), "digest": many.digest}), [misnamed])
    cut = cases[2].decision_id
    with sqlite3.connect(database_path(url)) as database:
        database.execute(
            "UPDATE audit_records SET trace = substr(trace, 1, 60) WHERE decision_id = ?", (cut,)
        )
    database.close()
    from monitor.audit_log.export import export

    export(url, path, Filter())
    no_narrow = changed_spec(many.spec, [{}]).model_copy(
        update={"policies": {"default": many.spec.policies["default"]}}
    )
    narrow = [c.decision_id for c in cases[:20] if c.policy == "narrow" and c.decision_id != cut]
    for place in (url, path):
        left = what_if(place, many, no_narrow, label="x").left_out
        assert left["no_trace"].examples == [cases[20].decision_id]
        assert left["other_bundle"].examples == [cases[23].decision_id]
        assert left["unknown_policy"].count == len(narrow)
        assert left["unknown_policy"].examples == narrow[:5]
        named = {"unreadable": cut, "other_clusters": misnamed.decision_id}
        for reason, decision_id in named.items():
            assert left[reason].examples == [decision_id], reason
    with pytest.raises(AuditError, match="found no decision of bundle other@1 .*23 other_bundle"):
        what_if(url, Bundle(**{**_fields(other), "digest": "f" * 64}), other.spec, label="x")


def test_a_recorded_verdict_that_its_trace_does_not_give_is_named(
    many: Bundle, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'audit.db'}"
    write_log(url, many, random_cases(many.spec, 40, seed=2))
    with sqlite3.connect(database_path(url)) as database:
        (changed,) = database.execute(
            "SELECT decision_id FROM audit_records WHERE verdict = 'pass' AND sequence > 5 LIMIT 1"
        ).fetchone()
        database.execute(
            "UPDATE audit_records SET verdict = 'alert' WHERE decision_id = ?", (changed,)
        )
    database.close()
    result = what_if(url, many, many.spec, label="x")
    assert (result.not_reproduced.count, result.not_reproduced.examples) == (1, [changed])


def test_clusters_whose_scores_would_be_others_are_left_out_and_say_why(
    many: Bundle, log: str, tmp_path: Path
) -> None:
    content = spec_content()
    content["clusters"][0]["latents"][0]["weight"] = 2.0
    content["clusters"][1]["fusion"] = {"sae": 1.0, "dense": 0.0, "bias": 0.0}
    content["clusters"][6]["id"] = "newcomer"
    content["policies"] = {"default": {}, "narrow": {}}
    other = write_bundle(tmp_path / "other", content, head=2.0)
    reasons = unanswerable(many, other)
    assert reasons["rolling"] == "another set of latents, another dense head"
    assert reasons["newcomer"] == "the champion does not have it"
    assert reasons["top"] == "another dense head"
    assert "mean" not in reasons  # its head weighs nothing any more
    result = what_if(log, many, other.spec, label=other.label, unanswerable=reasons)
    assert set(result.clusters) == {"mean", "ranked"}
    assert result.clusters["ranked"]["alert"].challenger == 0  # it is gone
    assert result.rules == {}


def test_no_tensor_library_is_imported(many: Bundle, log: str) -> None:
    code = (
        "import sys\n"
        "from monitor.cli.app import app\n"
        f"app(['what-if', '--audit', {log!r}, '--bundle', {str(many.folder)!r}, '--json',\n"
        "     '--set', '*.thresholds.alert=1.5'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"compared": 150' in done.stdout


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_binomial_test_of_the_changes(appeared: int, vanished: int) -> None:
    n = appeared + vanished
    likely = binom.pmf(np.arange(n + 1), n, 0.5)
    as_rare = likely[likely <= likely[appeared] * (1 + 1e-7)].sum()
    assert mcnemar(appeared, vanished) == pytest.approx(as_rare)


def test_the_interval_covers_the_change() -> None:
    chance = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        up, down, _ = chance.multinomial(1000, [0.02, 0.005, 0.975])
        low, high = paired_interval(1000, int(up), int(down))
        hits += low <= 0.015 <= high
    assert hits >= 365  # 95 % of 400 are 380; three standard deviations are 13


def _fields(bundle: Bundle) -> dict[str, Any]:
    return {name: getattr(bundle, name) for name in bundle.__dataclass_fields__}
