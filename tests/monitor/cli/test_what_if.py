from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from monitor.bundle import Bundle
from monitor.cli.app import app
from tests.monitor.what_if.conftest import random_cases, spec_content, write_bundle, write_log


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["what-if", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("many") / "bundle", spec_content())


@pytest.fixture(scope="module")
def log(many: Bundle, tmp_path_factory: pytest.TempPathFactory) -> str:
    url = f"sqlite:///{tmp_path_factory.mktemp('log') / 'audit.db'}"
    write_log(url, many, random_cases(many.spec, 60))
    return url


def test_settings_are_tried_and_shown(many: Bundle, log: str, tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("clusters: {rolling: {thresholds: {alert: 1.25}}}")
    given = ("--audit", log, "--bundle", many.folder, "--settings", settings)
    result = run(*given, "--set", "mean.thresholds.alert=99")
    assert result.exit_code == 0, result.output
    for part in ("60 decisions of many@1 against as set", "overall", "rolling alert, appeared: d"):
        assert part in result.output
    found = json.loads(run(*given, "--json").stdout)
    alerts = found["clusters"]["rolling"]["alert"]
    assert alerts["challenger"] == alerts["champion"] + alerts["appeared"] > alerts["champion"]
    example = alerts["appeared_examples"][0]
    assert 1.25 <= example["champion"] == example["challenger"] < 1.75


def test_a_challenger_is_another_bundle(many: Bundle, log: str, tmp_path: Path) -> None:
    content = spec_content(version=2)
    content["clusters"][0]["latents"][0]["weight"] = 3.0
    content["clusters"][1]["thresholds"] = {"flag": 0.25, "alert": 0.5, "clear": 0.0}
    other = write_bundle(tmp_path / "other", content)
    result = run(
        *("--audit", log, "--bundle", many.folder, "--challenger", other.folder),
        *("--since", "2023-01-01"),
    )
    assert "against many@2" in result.stdout
    assert "not compared: rolling: another set of latents (replay answers this)" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--audit", "LOG"), "expected either --challenger, or --set and --settings"),
        (("--set", "mean.thresholds.alert=9"), "expected either --audit or --export"),
        (("--audit", "LOG", "--export", "x", "--set", "mean.thresholds.alert=9"), "either --audit"),
        (("--audit", "LOG", "--set", "mean.latents=[]"), "found 'latents', expected one of"),
        (("--export", "missing.parquet", "--set", "mean.fusion.sae=2"), "export missing.parquet"),
        (("--audit", "LOG", "--set", "mean.fusion.sae=2", "--until", "2020-01-01"), "no decisions"),
    ],
)
def test_what_is_missing_or_wrong_is_exit_code_2(
    many: Bundle, log: str, arguments: tuple[str, ...], message: str
) -> None:
    given = [log if argument == "LOG" else argument for argument in arguments]
    result = run("--bundle", many.folder, *given)
    assert result.exit_code == 2
    assert message in result.output


def test_another_parquet_file_is_refused(many: Bundle, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "other.parquet"
    parquet.write_table(pa.table({"a": [1]}), path)
    result = run("--export", path, "--bundle", many.folder, "--set", "mean.fusion.sae=2")
    assert result.exit_code == 2
    assert "found no version, expected 3; audit export writes it" in result.output
