from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from monitor.cli.app import app


@pytest.fixture
def copied(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bundle", *arguments])
    return result.exit_code, result.output


def test_show_as_json_names_folder_digest_and_content(tiny_bundle: Path) -> None:
    code, output = run("show", str(tiny_bundle), "--json")
    assert code == 0
    shown = json.loads(output)
    assert set(shown) == {"folder", "digest", "model_folder", "bundle"}
    assert shown["folder"] == str(tiny_bundle)
    assert len(shown["digest"]) == 64
    assert [c["id"] for c in shown["bundle"]["clusters"]] == ["danger", "quiet"]


def test_check_loads_and_says_what_is_not_calibrated(tiny_bundle: Path) -> None:
    code, output = run("check", str(tiny_bundle))
    assert code == 0
    assert "2 clusters on blocks.1.hook_resid_post" in output
    assert "uncalibrated: danger: no calibration artefact" in output


def test_sealed_bundle_refuses_an_edit(copied: Path) -> None:
    code, output = run("seal", str(copied))
    assert code == 0
    digest = output.strip()
    assert json.loads(run("show", str(copied), "--json")[1])["digest"] == digest
    text = (copied / "bundle.yaml").read_text()
    (copied / "bundle.yaml").write_text(text.replace("Random latents", "Random"))
    code, output = run("show", str(copied))
    assert code == 2
    assert "bundle.yaml" in output


def test_sae_of_another_width_is_refused(copied: Path) -> None:
    config = json.loads((copied / "saes/l1/cfg.json").read_text())
    config["d_in"] = 64
    (copied / "saes/l1/cfg.json").write_text(json.dumps(config))
    code, output = run("check", str(copied))
    assert code == 2
    assert "64" in output
    assert "Traceback" not in output


def test_missing_model_folder_is_named(copied: Path, tmp_path: Path) -> None:
    code, output = run("check", str(copied), "--model", str(tmp_path / "nothing"))
    assert code == 2
    assert "config.json" in output
