from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from monitor.bundle import Bundle, load_bundle
from monitor.bundle_diff import differences
from monitor.cli.app import app
from tests.monitor.what_if.conftest import random_cases, spec_content, write_bundle, write_log


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("one") / "bundle", spec_content())


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    content = spec_content(version=2)
    rolling, mean, highest = content["clusters"][:3]
    rolling["thresholds"] = {"flag": 0.75, "alert": 1.5, "clear": 0.5}
    mean["latents"] = [{"sae": "l1", "id": 99, "weight": 1.0, "label": "a new one"}]
    highest["id"] = "renamed"
    content["rules"] = []
    folder = tmp_path_factory.mktemp("other") / "bundle"
    write_bundle(folder, content, head=-2.0)
    (folder / "saes" / "l1" / "weights").write_bytes(b"trained anew")
    return load_bundle(folder)


def test_every_difference_has_its_place_and_both_values(one: Bundle, other: Bundle) -> None:
    found = {d.place: (d.before, d.after) for d in differences(one, other)}
    assert found["digest"] == (one.digest[:12], other.digest[:12])
    assert found["version"] == ("1", "2")
    assert found["clusters.rolling.thresholds.alert"] == ("1.75", "1.5")
    assert found["clusters.mean.latents.l1/1"] == ("latent 1", None)
    assert found["clusters.mean.latents.l1/99"] == (None, "a new one")
    assert found["clusters.highest"] == ("highest", None)
    assert found["clusters.renamed"] == (None, "highest")
    assert found["rules.both"] == ("present", None)
    assert found["dense_heads.head.weight"] == (
        "norm 2",
        "norm 4, cosine -1.0000 with the first",
    )
    assert "saes.l1.digest" in found
    assert {place for place in found if place.startswith("file ")} == {
        "file bundle.yaml",
        "file heads.safetensors",
        "file saes/l1/weights",
    }
    assert not [place for place in found if place.startswith("clusters.ema")]


def test_a_bundle_does_not_differ_from_its_copy(one: Bundle, tmp_path: Path) -> None:
    shutil.copytree(one.folder, tmp_path / "copy")
    assert differences(one, load_bundle(tmp_path / "copy")) == ()
    result = CliRunner().invoke(app, ["bundle", "diff", str(one.folder), str(tmp_path / "copy")])
    assert (result.exit_code, result.output.strip()) == (0, "no difference")


def test_with_a_log_it_says_what_would_change(one: Bundle, tmp_path: Path) -> None:
    content = spec_content()
    content["clusters"][0]["thresholds"] = {"flag": 0.75, "alert": 1.25, "clear": 0.5}
    content["clusters"][1]["latents"][0]["weight"] = 2.0
    other = write_bundle(tmp_path / "other", content)
    url = f"sqlite:///{tmp_path / 'audit.db'}"
    write_log(url, one, random_cases(one.spec, 60))
    given = ["bundle", "diff", str(one.folder), str(other.folder), "--audit", url]
    shown = CliRunner().invoke(app, given, env={"COLUMNS": "160"})
    assert "clusters.rolling.thresholds.alert" in shown.output
    assert "rolling alert, appeared: d" in shown.output
    found = json.loads(CliRunner().invoke(app, [*given, "--json"]).stdout)
    assert found["what_if"]["clusters"]["rolling"]["alert"]["appeared"] > 0
    assert found["what_if"]["unanswerable"] == {"mean": "another set of latents"}
    assert {d["place"] for d in found["differences"]} > {"clusters.mean.latents.l1/1.weight"}
