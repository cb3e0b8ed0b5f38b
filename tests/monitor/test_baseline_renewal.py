"""`bundle baseline` on a planted bundle: another baseline, the same thresholds, or a refusal."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from monitor.bundle import load_bundle
from monitor.cli.app import app
from monitor.local import load_local
from monitor.testing import NEUTRAL_TEXTS

WORDS = " ".join(NEUTRAL_TEXTS).split()
OTHER_WORDS = ("weather", "north", "today", "zebra")
ARTEFACT = "calibration/default.json"


def write_rows(path: Path, words: Any, n: int, label: str = "benign") -> Path:
    rng = random.Random(str(path.name))
    texts = [" ".join(rng.choices(words, k=rng.randint(4, 20))) for _ in range(n)]
    path.write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t in texts))
    return path


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.output


@pytest.fixture(scope="module")
def calibrated(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    rows = write_rows(folder / "benign.jsonl", WORDS, 600)
    out = folder / "bundle"
    code, _, output = run(
        *("calibrate", "--bundle", tiny_bundle, "--data", rows, "--out", out, "--work", folder)
    )
    assert code == 0, output
    return out


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("others") / "traffic.jsonl", OTHER_WORDS, 80)


def test_the_baseline_is_another_and_everything_else_stays(
    calibrated: Path, others: Path, tmp_path: Path
) -> None:
    out = tmp_path / "renewed"
    command = ("bundle", "baseline", calibrated, "--data", others, "--out", out)
    code, stdout, output = run(*command, "--work", tmp_path, "--json")
    assert code == 0, output
    line = json.loads(stdout.splitlines()[-1])
    before, after = load_bundle(calibrated), load_bundle(out)
    assert after.sealed
    assert (line["digest"], line["artefact"], line["n_texts"]) == (after.digest, ARTEFACT, 80)
    assert after.spec == before.spec
    old, new = dict(before.calibration[ARTEFACT]), dict(after.calibration[ARTEFACT])
    was, now = old.pop("baseline"), new.pop("baseline")
    assert old == new
    assert now["latents"] == was["latents"]
    assert now["firings"] != was["firings"]
    assert now["data"] == "traffic.jsonl, benign rows"

    served = load_local(out, model=None, cache=tmp_path)
    assert served.uncalibrated_reasons == {}
    expected = served.expected
    assert expected is not None
    assert expected.baseline.n_texts == 80
    assert {bins.n for bins in expected.scores.values()} == {80}
    of_before = load_local(calibrated, model=None, cache=tmp_path).expected
    assert of_before is not None
    assert expected.rates == of_before.rates
    assert expected.verdicts == of_before.verdicts


def test_an_artefact_without_one_gets_it(calibrated: Path, others: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    run("bundle", "baseline", calibrated, "--data", others, "--out", bare, "--work", tmp_path)
    (bare / "MANIFEST.json").unlink()
    artefact = json.loads((bare / ARTEFACT).read_text())
    del artefact["baseline"]
    (bare / ARTEFACT).write_text(json.dumps(artefact))
    without = load_local(bare, model=None, cache=tmp_path)
    assert without.expected is None
    assert "`sae-monitor bundle baseline`" in without.no_baseline
    out = tmp_path / "with"
    code, _, output = run(
        *("bundle", "baseline", bare, "--data", others, "--out", out, "--work", tmp_path)
    )
    assert code == 0, output
    assert load_local(out, model=None, cache=tmp_path).expected is not None


def test_a_bundle_without_an_artefact_is_refused(
    tiny_bundle: Path, others: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, _, output = run(
        *("bundle", "baseline", tiny_bundle, "--data", others, "--out", out, "--work", tmp_path)
    )
    assert code == 2
    assert "found no calibration artefact; expected one made with what is served" in output
    assert not out.exists()


def test_an_artefact_of_another_dtype_is_refused(
    calibrated: Path, others: Path, tmp_path: Path
) -> None:
    command = ("bundle", "baseline", calibrated, "--data", others, "--out", tmp_path / "out")
    code, _, output = run(*command, "--work", tmp_path, "--dtype", "bfloat16")
    assert code == 2
    assert f"{ARTEFACT} was made with dtype float32, served is bfloat16" in output


def test_too_few_rows_are_told_how_many_are_needed(calibrated: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "few.jsonl", WORDS, 20)
    command = ("bundle", "baseline", calibrated, "--data", rows, "--out", tmp_path / "out")
    code, _, output = run(*command, "--work", tmp_path)
    assert code == 2
    assert "found 20 texts with scored tokens" in output
    assert "expected at least 50" in output


def test_a_folder_that_is_there_is_not_written_over(
    calibrated: Path, others: Path, tmp_path: Path
) -> None:
    command = ("bundle", "baseline", calibrated, "--data", others, "--out", tmp_path)
    code, _, output = run(*command, "--work", tmp_path)
    assert code == 2
    assert "expected a folder that is not there yet" in output
