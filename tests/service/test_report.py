"""A server's log and a replay of it under another bundle, as a reader of the report sees them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from playwright import sync_api as playwright
from typer.testing import CliRunner

from monitor.audit_log.sealing import new_key
from monitor.bundle import load_bundle
from monitor.cli.app import app

RISKY = "what is the danger of the attack in the north"
CALM = "please tell me how to bake bread"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
    return result.exit_code, result.output


@pytest.fixture
def changed(tiny_bundle: Path, tmp_path: Path) -> Path:
    """`danger` can no longer be raised, and `quiet` is called `still`."""
    folder = tmp_path / "changed"
    shutil.copytree(tiny_bundle, folder)
    spec = yaml.safe_load((folder / "bundle.yaml").read_text())
    spec["version"] = 2
    spec["clusters"][0]["thresholds"] = {"flag": 1e5, "alert": 1e6, "clear": 0.0}
    spec["clusters"][1]["id"] = "still"
    (folder / "bundle.yaml").write_text(yaml.safe_dump(spec))
    return folder


def test_a_token_shows_what_its_latents_gave_and_a_replay_what_flipped(
    serve: Callable[..., Any], tiny_bundle: Path, changed: Path, tmp_path: Path, chromium: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(new_key("k") + "\n")
    with (
        serve(audit_level="content", audit_keys_file=keys) as server,
        server.client() as client,
    ):
        client.score(text=CALM)
        alerted = client.score(text=RISKY, tokens=True)
    audit = ("--audit", f"sqlite:///{tmp_path / 'audit.db'}", "--keys-file", keys)
    out, page = tmp_path / "out", tmp_path / "report.html"
    code, output = run("replay", *audit, "--bundle", changed, "--out", out)
    assert code == 0, output
    given = ("--bundle", tiny_bundle, "--replay", out, "--out", page)
    code, output = run("report", *audit, *given)
    assert code == 0, output

    spec = load_bundle(tiny_bundle).spec
    danger = [cluster.id for cluster in spec.clusters].index("danger")
    before = next(c.fused for c in alerted.clusters if c.cluster == "danger")
    highest = max((t for t in alerted.tokens if t.stage is not None), key=lambda t: t.fused[danger])
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.goto(page.as_uri())
        section = tab.locator(".decision", has_text=alerted.decision_id)
        section.locator(".t").nth(highest.position).click()
        table = section.locator(".detail table", has_text="latents of danger here")
        lines = [line.split() for line in table.locator("tr").all_inner_texts()[1:]]
        shown = sum(float(words[-1 if words[0] == "its" else -2]) for words in lines)
        text = tab.locator("main").inner_text()
        browser.close()
    sae_share = spec.clusters[danger].fusion.sae * highest.sae[danger]
    assert lines
    assert shown == pytest.approx(sae_share, abs=0.01 * len(lines) + 1 / 512)
    assert "Replayed under tiny@2, float32, torch-cpu" in text
    assert "flipped\t1\t50.00%\tanother verdict" in text
    assert "bundle: " in text
    assert f"danger, alert → pass: {alerted.decision_id} ({before:.2f} → {before:.2f})" in text
    assert "still" in text


def test_what_is_no_replay_of_a_log_is_named(
    serve: Callable[..., Any], tiny_bundle: Path, tmp_path: Path
) -> None:
    with serve() as server, server.client() as client:
        client.score(text=CALM)
    audit = ("--audit", f"sqlite:///{tmp_path / 'audit.db'}")
    rows, out, page = tmp_path / "rows.jsonl", tmp_path / "out", tmp_path / "report.html"
    rows.write_text(json.dumps({"text": CALM}) + "\n")
    assert run("replay", "--input", rows, "--bundle", tiny_bundle, "--out", out)[0] == 0
    code, output = run("report", *audit, "--out", page, "--replay", out)
    assert (code, page.exists()) == (2, False)
    assert "found 1 rows and no decision that was compared" in output
    for folder in (tmp_path / "absent", tmp_path):
        code, output = run("report", *audit, "--out", page, "--replay", folder)
        assert code == 2
        assert "found no manifest.json, expected a replay's folder" in output


def test_a_part_that_was_changed_is_not_shown(
    serve: Callable[..., Any], tiny_bundle: Path, tmp_path: Path
) -> None:
    with serve(audit_level="tokens") as server, server.client() as client:
        client.score(text=CALM)
    audit = ("--audit", f"sqlite:///{tmp_path / 'audit.db'}")
    out, page = tmp_path / "out", tmp_path / "report.html"
    assert run("replay", *audit, "--bundle", tiny_bundle, "--out", out)[0] == 0
    (part,) = out.glob("part-*.parquet")
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    code, output = run("report", *audit, "--out", page, "--replay", out)
    assert (code, page.exists()) == (2, False)
    assert f"{part.name}: is not there as the manifest names it" in output
