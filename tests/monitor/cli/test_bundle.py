from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from typer.testing import CliRunner

from monitor.cli.app import app
from monitor.testing import HOOK_POINT

REPO = "someone/saes"
COMMIT = "3f" * 20


@pytest.fixture
def copied(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


@pytest.fixture
def on_hub(
    copied: Path, tmp_path: Path, fill_cache: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The tiny bundle with its SAE in an offline cache of the hub, and no other place."""
    files = {f"l1/{path.name}": path.read_bytes() for path in (copied / "saes/l1").iterdir()}
    fill_cache(tmp_path / "hub", REPO, COMMIT, files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.rmtree(copied / "saes")
    content = yaml.safe_load((copied / "bundle.yaml").read_text())
    content["saes"]["l1"] = {"hub": {"repo": REPO, "path": "l1"}, "hook_point": HOOK_POINT}
    (copied / "bundle.yaml").write_text(yaml.safe_dump(content))
    return copied


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bundle", *arguments])
    return result.exit_code, result.output


def test_show_as_json_names_folder_digest_and_content(tiny_bundle: Path) -> None:
    code, output = run("show", str(tiny_bundle), "--json")
    assert code == 0
    shown = json.loads(output)
    assert set(shown) == {"folder", "digest", "model_folder", "saes", "bundle"}
    assert shown["folder"] == str(tiny_bundle)
    assert len(shown["digest"]) == 64
    assert shown["saes"]["l1"]["path"] == str(tiny_bundle / "saes/l1")
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


def test_sae_on_the_hub_is_sealed_shown_checked_and_fetched(on_hub: Path, tmp_path: Path) -> None:
    code, output = run("show", str(on_hub))
    assert code == 0
    assert f"sae l1 {REPO}@{COMMIT}:l1 at {HOOK_POINT}: {tmp_path}" in output
    assert run("seal", str(on_hub))[0] == 0
    assert f"revision: {COMMIT}" in (on_hub / "bundle.yaml").read_text()
    assert run("check", str(on_hub))[0] == 0
    code, output = run("fetch", str(on_hub))
    assert code == 0
    assert f"sae l1: {tmp_path}" in output


def test_changed_sae_on_the_hub_is_an_error(on_hub: Path, tmp_path: Path) -> None:
    run("seal", str(on_hub))
    blob = next((tmp_path / "hub").rglob("cfg.json")).resolve()
    blob.write_bytes(blob.read_bytes() + b" ")
    code, output = run("check", str(on_hub))
    assert code == 2
    assert "saes.l1" in output and "cfg.json: found sha256" in output


def test_sae_that_is_nowhere_is_shown_as_such(on_hub: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "hub")
    code, output = run("show", str(on_hub), "--json")
    assert code == 0
    shown = json.loads(output)["saes"]["l1"]
    assert (shown["origin"], shown["path"]) == (f"{REPO}@main:l1", None)
    assert "sae-monitor bundle fetch" in shown["problem"]
    text = (on_hub / "bundle.yaml").read_text()
    code, output = run("seal", str(on_hub))
    assert code == 2
    assert "HF_HUB_OFFLINE is set" in output
    assert (on_hub / "bundle.yaml").read_text() == text


def test_environment_of_the_hub_is_honoured(
    on_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of its own: huggingface_hub reads HF_HOME when it is imported.

    Warnings go to stderr: what is on stdout is JSON and nothing else.
    """
    (tmp_path / "home").mkdir()
    (tmp_path / "hub").rename(tmp_path / "home" / "hub")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = subprocess.run(
        [sys.executable, "-m", "monitor", "score", "--bundle", str(on_hub), "--text=x", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == "pass"
    assert "sae_not_pinned" in done.stderr
