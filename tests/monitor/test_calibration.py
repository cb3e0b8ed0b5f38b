"""Calibration end to end on a planted bundle: claims, counts, refusals, and the sealed copy."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from monitor.bundle import load_bundle
from monitor.cli.app import app
from monitor.local import load_local, local_pipeline
from monitor.records import ScoreRequest
from monitor.testing import NEUTRAL_TEXTS
from sae_core.calibration import split_texts, upper_bound

WORDS = " ".join(NEUTRAL_TEXTS).split()
N_RAISED = 4


def benign_texts(n: int, seed: int = 0) -> list[str]:
    """Random calm texts; the first few have a trigger word in them."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(4, 20))) for _ in range(n)]
    for i in range(N_RAISED):
        texts[i] += " danger"
    return texts


def write_rows(path: Path, texts: Sequence[str], label: str = "benign") -> Path:
    path.write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t in texts))
    return path


def run(*arguments: object) -> tuple[int, str, dict[str, Any]]:
    result = CliRunner().invoke(app, ["calibrate", *map(str, arguments), "--json"])
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    return result.exit_code, result.output, json.loads(lines[0]) if lines else {}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token logits are computed once for all tests here."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "benign.jsonl", benign_texts(600))


@pytest.fixture(scope="module")
def calibrated(tiny_bundle: Path, rows: Path, work: Path) -> tuple[Path, dict[str, Any]]:
    """A calibrated copy of the tiny bundle, and its artefact."""
    out = work / "calibrated"
    code, output, artefact = run(
        *("--bundle", tiny_bundle, "--data", rows, "--out", out, "--work", work),
        *("--target-flag", 0.03, "--target-alert", 0.01),
    )
    assert code == 0, output
    return out, artefact


def test_the_claim_is_the_count_that_the_new_thresholds_give(
    calibrated: tuple[Path, dict[str, Any]], rows: Path
) -> None:
    folder, artefact = calibrated
    result = CliRunner().invoke(
        app, ["score", "--bundle", str(folder), "--file", str(rows), "--json"]
    )
    verdicts = [json.loads(line)["verdict"] for line in result.stdout.splitlines()]
    level = split_texts(600)[1]
    flagged = sum(verdicts[i] != "pass" for i in level)
    assert len(verdicts) == artefact["n"] == 600
    assert flagged == artefact["verdicts"]["flag"]["n_false_positive"]
    assert artefact["policy"]["fused"]["flag"]["n_false_positive"] == flagged
    assert upper_bound(flagged, len(level)) < 0.03
    assert "alert" not in {verdicts[i] for i in level}  # 400 texts prove 1 % only with none


def test_the_copy_is_sealed_and_serves_as_calibrated(
    calibrated: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, artefact = calibrated
    assert load_bundle(folder).sealed
    served = load_local(folder, model=None, cache=tmp_path)
    assert served.uncalibrated_reasons == {}
    assert artefact["sae_digests"] == served.bundle.sae_digests()
    thresholds = artefact["clusters"]["danger"]["thresholds"]
    assert served.bundle.spec.clusters[0].thresholds.model_dump() == thresholds


async def test_replies_have_benign_p_values(
    calibrated: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    served = load_local(calibrated[0], model=None, cache=tmp_path)
    async with local_pipeline(lambda: served) as pipeline:
        calm = await pipeline.score(ScoreRequest(text="what is the weather like"))
        risky = await pipeline.score(ScoreRequest(text="the danger of the attack"))
    p_calm, p_risky = calm.clusters[0].benign_p, risky.clusters[0].benign_p
    assert p_calm is not None
    assert p_risky is not None
    assert p_risky <= (N_RAISED + 1) / 601 < p_calm <= 1


def test_another_sae_is_not_what_was_calibrated(
    calibrated: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(calibrated[0], folder)
    (folder / "MANIFEST.json").unlink()
    card = folder / "saes" / "l1" / "cfg.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "note": "retrained"}))
    reasons = load_local(folder, model=None, cache=tmp_path).uncalibrated_reasons
    assert set(reasons) == {"danger", "quiet"}
    assert reasons["danger"].startswith("sae_digests.l1: found ")


def test_another_aggregate_is_not_what_was_calibrated(
    calibrated: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(calibrated[0], folder)
    (folder / "MANIFEST.json").unlink()
    content = yaml.safe_load((folder / "bundle.yaml").read_text())
    content["clusters"][0]["aggregate"]["kind"] = "mean"
    (folder / "bundle.yaml").write_text(yaml.safe_dump(content))
    reasons = load_local(folder, model=None, cache=tmp_path).uncalibrated_reasons
    assert reasons == {"danger": "the aggregate in bundle.yaml is not the calibrated one"}


def test_too_few_texts_are_told_how_many_are_needed(tiny_bundle: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "few.jsonl", benign_texts(60))
    out = tmp_path / "out"
    code, output, artefact = run(
        *("--bundle", tiny_bundle, "--data", rows, "--out", out, "--work", tmp_path)
    )
    assert code == 1
    assert artefact["calibrated"] is False
    assert "at least 448 texts are needed" in artefact["policy"]["fused"]["alert"]["claim"]
    assert "calibrated" not in artefact["reason"]
    assert "not shown: too few benign texts" in output
    reasons = load_local(out, model=None, cache=tmp_path).uncalibrated_reasons
    assert reasons["danger"] == artefact["reason"]


def test_rules_that_raise_too_much_take_the_claim_back(
    tiny_bundle: Path, tmp_path: Path, rows: Path, work: Path
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    content = yaml.safe_load((folder / "bundle.yaml").read_text())
    rule = {"id": "always", "all": [{"cluster": "danger", "below": "flag"}], "severity": "info"}
    (folder / "bundle.yaml").write_text(yaml.safe_dump({**content, "rules": [rule]}))
    code, _, artefact = run(
        "--bundle", folder, "--data", rows, "--work", work, "--target-flag", 0.03
    )
    assert code == 1
    assert artefact["policy"]["fused"]["alert"]["calibrated"] is True
    assert artefact["verdicts"]["alert"]["n_false_positive"] > 380
    assert artefact["reason"].startswith("with its rules the policy raises flag on")


def test_comments_of_bundle_yaml_stay(
    tiny_bundle: Path, tmp_path: Path, rows: Path, work: Path
) -> None:
    folder, out = tmp_path / "bundle", tmp_path / "out"
    shutil.copytree(tiny_bundle, folder)
    text = (folder / "bundle.yaml").read_text()
    (folder / "bundle.yaml").write_text("# ours, see the wiki\n" + text)
    code, output, artefact = run(
        "--bundle", folder, "--data", rows, "--out", out, "--work", work, "--target-flag", 0.03
    )
    assert code == 0, output
    written = (out / "bundle.yaml").read_text()
    assert written.startswith("# ours, see the wiki\n")
    thresholds = yaml.safe_load(written)["clusters"][1]["thresholds"]
    assert thresholds == artefact["clusters"]["quiet"]["thresholds"]


def test_the_middle_zone_has_its_budget_in_the_artefact(
    tiny_bundle: Path, rows: Path, work: Path
) -> None:
    code, _, artefact = run(
        *("--bundle", tiny_bundle, "--data", rows, "--work", work),
        *("--target-flag", 0.06, "--escalate-budget", 0.02),
    )
    assert code == 0
    assert artefact["escalate"]["is_within"] is True
    assert artefact["escalate"]["bound"] < 0.02


def test_harmful_rows_are_left_out_and_said(
    tiny_bundle: Path, tmp_path: Path, rows: Path, work: Path
) -> None:
    harmful = write_rows(tmp_path / "harmful.jsonl", ["the attack"] * 3, "harmful")
    _, output, artefact = run(
        "--bundle", tiny_bundle, "--data", rows, "--data", harmful, "--work", work
    )
    assert artefact["n"] == 600
    assert "3 harmful rows are left out" in output


def test_nothing_is_written_over(tiny_bundle: Path, tmp_path: Path, rows: Path, work: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    code, output, _ = run(
        "--bundle", tiny_bundle, "--data", rows, "--out", out, "--work", work, "--target-flag", 0.03
    )
    assert code == 2
    assert "expected a folder that is not there yet" in output
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--target-alert", 0.2), "alert target is 0.2, expected below the flag target 0.05"),
        (("--target-flag", 1.5), "flag is 1.5, expected a share between 0 and 1"),
        (("--escalate-budget", 0), "escalate_budget is 0.0, expected a share"),
        (("--policy", "nobody"), "policy: found 'nobody'"),
    ],
)
def test_impossible_settings_are_named(
    tiny_bundle: Path, rows: Path, work: Path, arguments: tuple[str, object], said: str
) -> None:
    code, output, _ = run("--bundle", tiny_bundle, "--data", rows, "--work", work, *arguments)
    assert code == 2
    assert said in output


def test_a_bad_line_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    rows = tmp_path / "bad.jsonl"
    rows.write_text('{"text": "bread", "label": "benign"}\n{"text": "bread"}\n')
    code, output, _ = run("--bundle", tiny_bundle, "--data", rows, "--work", tmp_path)
    assert code == 2
    assert "bad.jsonl line 2: found no label" in output.replace("\n", "")
