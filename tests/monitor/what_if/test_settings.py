from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from monitor.bundle import Bundle
from monitor.errors import BundleError, SettingsError
from monitor.what_if.settings import changed_spec, parse_assignment, read_settings


def test_assignments_and_files_are_merged_in_order(many: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("clusters: {rolling: {thresholds: {alert: 3}, aggregate: {window: 9}}}")
    changes = [
        read_settings(path),
        parse_assignment("rolling.thresholds.alert=2.5", many.spec),
        parse_assignment("*.fusion.dense=0", many.spec),
        parse_assignment("top.stages=[completion]", many.spec),
    ]
    found = {cluster.id: cluster for cluster in changed_spec(many.spec, changes).clusters}
    assert found["rolling"].thresholds.alert == 2.5
    assert found["rolling"].thresholds.flag == 1.0
    assert found["rolling"].aggregate.window == 9
    assert {cluster.fusion.dense for cluster in found.values()} == {0.0}
    assert found["top"].stages == ("completion",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clusters": {"nobody": {}}}, "clusters: found 'nobody', expected one of"),
        ({"clusters": {"top": {"latents": []}}}, "clusters.top: found 'latents', expected one of"),
        ({"clusters": {"top": 3}}, "clusters.top: found int, expected a mapping"),
        (
            {"clusters": {"top": {"thresholds": {"alrt": 3}}}},
            "clusters.top.thresholds: found 'alrt', expected one of flag, alert, clear",
        ),
        ({"clusters": {"top": {"aggregate": 3}}}, "top.aggregate: found int, expected a mapping"),
        ({"policies": []}, "policies: found list, expected a mapping"),
    ],
)
def test_what_cannot_be_tried_is_refused(
    many: Bundle, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        changed_spec(many.spec, [change])


def test_what_comes_of_it_must_be_a_bundle(many: Bundle) -> None:
    with pytest.raises(BundleError, match=r"clusters\.top\.thresholds: found clear 0\.5, flag 9"):
        changed_spec(many.spec, [parse_assignment("top.thresholds.flag=9", many.spec)])


@pytest.mark.parametrize("text", ["top", "top.thresholds.flag", "nobody.x=1", "=1", "top=1"])
def test_an_assignment_names_what_was_expected(many: Bundle, text: str) -> None:
    with pytest.raises(SettingsError, match="expected CLUSTER.KEY=VALUE"):
        parse_assignment(text, many.spec)


@pytest.mark.parametrize(
    ("content", "message"),
    [("- 1", "found list"), ("{a", "not readable as YAML"), ("latents: 1", "found 'latents'")],
)
def test_a_file_that_is_no_settings_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "settings.yaml"
    with pytest.raises(SettingsError, match="cannot be read"):
        read_settings(path)
    path.write_text(content)
    with pytest.raises(SettingsError, match=message):
        read_settings(path)
