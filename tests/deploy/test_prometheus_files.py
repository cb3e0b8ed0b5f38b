"""The shipped Prometheus and Alertmanager files, read by the programs they are for."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from monitor.metrics import Metrics
from monitor.records import ClusterInfo, Severity, Stage

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "prometheus"
RULE_FILES = ("recording_rules.yml", "alert_rules.yml")
TEST_FILES = ("alert_rules_test.yml", "alert_rules_long_test.yml")


def load(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def rules_of(name: str) -> list[dict[str, Any]]:
    return [rule for group in load(name)["groups"] for rule in group["rules"]]


ALERTS = sorted({rule["alert"] for rule in rules_of("alert_rules.yml")})


def run(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def exported_names() -> set[str]:
    """Every sample name that a server with one cluster shows."""
    cluster = ClusterInfo(
        cluster="weapons",
        title="Weapons",
        severity=Severity.CRITICAL,
        stages=tuple(Stage),
        latents=(),
        has_dense_head=False,
        aggregate="max",
        flag=0.0,
        alert=1.0,
        clear=-1.0,
        calibrated=False,
    )
    metrics = Metrics("tiny", [cluster])
    metrics.liveness.canary_judged("weapons", passed=True, deviation=0.0)
    metrics.liveness.watch_staleness(["weapons"], lambda cluster: False)
    metrics.liveness.drift(["registered_l0"])
    text = metrics.render().body.decode()
    return {re.split(r"[{ ]", line)[0] for line in text.splitlines() if not line.startswith("#")}


def test_promtool_accepts_the_configuration_and_the_rules(promtool: Path) -> None:
    run(promtool, "check", "config", "prometheus.yml")
    run(promtool, "check", "rules", *RULE_FILES)


@pytest.mark.parametrize("name", TEST_FILES)
def test_every_alert_fires_and_keeps_quiet_when_it_should(promtool: Path, name: str) -> None:
    run(promtool, "test", "rules", name)


def test_amtool_accepts_the_configuration(amtool: Path) -> None:
    run(amtool, "check-config", "alertmanager.yml")


@pytest.mark.parametrize(
    ("receiver", "labels"),
    [
        ("safety", ("alertname=SaeMonitorRiskClusterFiring", "severity=critical")),
        ("safety", ("alertname=SaeMonitorRestarting", "severity=warning")),
    ],
)
def test_alerts_are_routed(amtool: Path, receiver: str, labels: tuple[str, ...]) -> None:
    run(
        *(amtool, "config", "routes", "test", "--config.file=alertmanager.yml"),
        f"--verify.receivers={receiver}",
        *labels,
    )


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_a_firing_and_a_quiet_case(alert: str) -> None:
    tests = [test for name in TEST_FILES for test in load(name)["tests"]]
    expected = {
        bool(case["exp_alerts"])
        for test in tests
        for case in test["alert_rule_test"]
        if case["alertname"] == alert
    }
    assert expected == {True, False}


def test_every_variant_of_an_alert_has_a_firing_case() -> None:
    fired = [
        (case["alertname"], expectation["exp_labels"])
        for name in TEST_FILES
        for test in load(name)["tests"]
        for case in test["alert_rule_test"]
        for expectation in case["exp_alerts"]
    ]
    for rule in rules_of("alert_rules.yml"):
        plain = {key: text for key, text in rule.get("labels", {}).items() if "{{" not in text}
        assert any(
            name == rule["alert"] and plain.items() <= labels.items() for name, labels in fired
        ), rule["alert"]


@pytest.mark.parametrize("rule", rules_of("alert_rules.yml"), ids=lambda rule: rule["alert"])
def test_every_alert_says_what_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    file, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^## (\w+)$", (FOLDER.parents[1] / file).read_text(), re.MULTILINE)
    assert anchor in [heading.lower() for heading in headings]


def test_severities_are_from_a_closed_set_and_risk_keeps_the_cluster_s_own() -> None:
    for rule in rules_of("alert_rules.yml"):
        severity = rule.get("labels", {}).get("severity")
        if rule["alert"] == "SaeMonitorRiskClusterFiring":
            assert severity is None
        else:
            assert severity in {"warning", "critical"}


def test_rules_name_only_series_that_exist() -> None:
    recorded = {rule["record"] for rule in rules_of("recording_rules.yml")}
    known = recorded | exported_names() | {"up"}
    for rule in rules_of("recording_rules.yml") + rules_of("alert_rules.yml"):
        expression = re.sub(r'"[^"]*"', '""', rule["expr"])
        named = re.findall(r"(?<![\w:])(?:\w+:)?(?:saemonitor|process)_[\w:]+", expression)
        assert named or "up{" in expression
        assert set(named) <= known, set(named) - known
