"""Calibration and evaluation where the server is to run: ONNX Runtime, or two processes."""

from __future__ import annotations

import json
import multiprocessing
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from monitor.cli.app import app
from monitor.evaluation.result import EvaluationResult
from monitor.graph_store import GraphPlace
from monitor.local import load_local
from monitor.testing import NEUTRAL_TEXTS

N_CALM, N_RISKY = 300, 20
WORDS = " ".join(NEUTRAL_TEXTS).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calm benign texts, and harmful ones with a trigger word."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w") as file:
        for i in range(N_CALM + N_RISKY):
            text = " ".join(rng.choices(WORDS, k=rng.randint(4, 12)))
            row = {"text": text, "label": "benign", "category": "benign_general"}
            if i >= N_CALM:
                row = {"text": f"{text} danger", "label": "harmful", "category": "danger"}
            file.write(json.dumps({**row, "source": f"s{i % 2}", "kind": "prompt"}) + "\n")
    return path


@pytest.fixture(scope="module")
def graph(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "graph"
    assert run("export-onnx", "--bundle", tiny_bundle, "--out", folder)[0] == 0
    return folder


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    return result.exit_code, result.output


def calibrated(bundle: Path, data: Path, work: Path, *flags: object) -> tuple[Path, dict[str, Any]]:
    """The sealed copy and its artefact."""
    out = work / "calibrated"
    code, output = run(
        *("calibrate", "--bundle", bundle, "--data", data, "--work", work / "traces"),
        *("--out", out, "--target-flag", 0.1, "--target-alert", 0.05, *flags),
    )
    assert code == 0, output
    artefact: dict[str, Any] = json.loads((out / "calibration/default.json").read_text())
    return out, artefact


@pytest.fixture(scope="module")
def on_torch(
    tiny_bundle: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    return calibrated(tiny_bundle, data, tmp_path_factory.mktemp("torch"))[1]


def check_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Everything but the backend's name, within rounding."""
    for cluster, entry in expected["clusters"].items():
        for name, value in entry["thresholds"].items():
            assert found["clusters"][cluster]["thresholds"][name] == pytest.approx(value, abs=1e-4)
    assert found["verdicts"] == expected["verdicts"]
    assert found["baseline"]["latents"] == expected["baseline"]["latents"]


def test_a_calibration_on_onnx_covers_a_server_on_onnx(
    tiny_bundle: Path, data: Path, graph: Path, on_torch: dict[str, Any], tmp_path: Path
) -> None:
    folder, artefact = calibrated(tiny_bundle, data, tmp_path, "--backend", "onnx", "--onnx", graph)
    assert (artefact["backend"], on_torch["backend"]) == ("onnx-cpu", "torch-cpu")
    check_same(artefact, on_torch)
    in_cache = GraphPlace(cache=tmp_path / "cache")
    served = load_local(folder, model=None, cache=tmp_path / "cache", graph=in_cache)
    assert served.uncalibrated_reasons == {}
    in_torch = load_local(folder, model=None, cache=tmp_path / "cache")
    assert all("onnx-cpu" in why for why in in_torch.uncalibrated_reasons.values())
    assert set(in_torch.uncalibrated_reasons) == set(artefact["clusters"])
    renewed = tmp_path / "renewed"
    flags = ("--data", data, "--work", tmp_path / "traces", "--out", renewed)
    code, output = run("bundle", "baseline", folder, *flags)
    assert code == 2
    assert "onnx-cpu" in " ".join(output.split())
    own = tmp_path / "graph"  # a graph is that of one digest
    assert run("export-onnx", "--bundle", folder, "--out", own)[0] == 0
    code, output = run("bundle", "baseline", folder, *flags, "--backend", "onnx", "--onnx", own)
    assert code == 0, output
    again: dict[str, Any] = json.loads((renewed / "calibration/default.json").read_text())
    assert again["baseline"]["latents"] == artefact["baseline"]["latents"]


def test_a_calibration_in_two_processes_names_them_and_leaves_none(
    tiny_bundle: Path, data: Path, on_torch: dict[str, Any], tmp_path: Path
) -> None:
    _, artefact = calibrated(tiny_bundle, data, tmp_path, "--tensor-parallel", 2)
    assert artefact["backend"] == "torch-cpu-tp2"
    check_same(artefact, on_torch)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("unseen", [(), ("--leave-one-source-out",)])
def test_an_evaluation_on_onnx_finds_what_one_on_torch_finds(
    tiny_bundle: Path, data: Path, graph: Path, tmp_path: Path, unseen: tuple[str, ...]
) -> None:
    found = []
    for flags in ((), ("--backend", "onnx", "--onnx", graph)):
        out = tmp_path / f"{len(found)}.json"
        code, output = run(
            *("evaluate", "--bundle", tiny_bundle, "--data", data, "--json", out, *flags),
            *("--work", tmp_path / str(len(found)), "--bootstrap", 20, "--robustness-rows", 0),
            *unseen,
        )
        assert code == 0, output
        found.append(EvaluationResult.model_validate_json(out.read_text()))
    torch, onnx = found
    assert (torch.setting.backend, onnx.setting.backend) == ("torch-cpu", "onnx-cpu")
    assert onnx.verdicts == torch.verdicts
    for name, figures in torch.overall.scores.items():
        assert np.allclose(onnx.overall.scores[name].auroc, figures.auroc, atol=1e-3)


@pytest.mark.parametrize("command", ["calibrate", "evaluate", "score", "bundle baseline"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--backend", "onnx", "--tensor-parallel", 2), "found 1 and 2 with backend onnx"),
        (("--backend", "jax"), "backend: found 'jax', expected torch or onnx"),
        (("--onnx", "graph"), "with backend torch, expected backend onnx"),
        (("--gpus", 2, "--device", "cpu"), "gpus: found 2 with device cpu, expected 1"),
    ],
)
def test_flags_that_contradict_each_other_are_named(
    tiny_bundle: Path, data: Path, command: str, flags: tuple[object, ...], message: str
) -> None:
    rows = "--file" if command == "score" else "--data"
    bundle = [tiny_bundle, "--out", "out"] if "baseline" in command else ["--bundle", tiny_bundle]
    code, output = run(*command.split(), *bundle, rows, data, *flags)
    assert code == 2
    assert message in " ".join(output.split())
