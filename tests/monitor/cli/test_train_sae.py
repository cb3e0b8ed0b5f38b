from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from monitor.cli.app import app
from sae_core.formats import load_sae
from sae_core.testing.models import tiny_model_folder

HOOK_POINTS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
SMALL = {
    "d_sae": 48,
    "k": 6,
    "tokens": 4096,
    "batch_tokens": 128,
    "buffer_tokens": 1024,
    "context_tokens": 24,
    "held_out_share": 0.1,
    "loss_tokens": 256,
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data and a settings file."""
    root = tmp_path_factory.mktemp("given")
    tiny_model_folder(root / "model", "llama")
    texts = [f"the model reads {n} prompts, never the password of {n % 7}" for n in range(900)]
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (root / "settings.yaml").write_text(json.dumps(SMALL | {"hook_point": list(HOOK_POINTS)}))
    return root


def _arguments(given: Path, out: Path, *more: str) -> list[str]:
    places = ["--model", str(given / "model"), "--data", str(given / "texts.jsonl")]
    config = ["--config", str(given / "settings.yaml"), "--out", str(out)]
    return ["train-sae", *places, *config, *more]


def _run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_trains_an_sae_for_each_hook_point(given: Path, tmp_path: Path) -> None:
    code, output, errors = _run(*_arguments(given, tmp_path / "out", "--json", "--seed", "3"))
    assert code == 0, errors
    shown = json.loads(output)
    assert list(shown) == list(HOOK_POINTS)
    for name, one in shown.items():
        assert one["folder"] == str(tmp_path / "out" / name)
        assert one["training"]["seed"] == 3
        assert one["held_out"]["fvu"] < 0.9
        sae = load_sae(Path(one["folder"]))
        assert sae.config.d_sae == 48 and sae.card.hook_point == name
        assert list(sae.card.facts["data"]) == ["texts.jsonl"]
    assert "4,096 of 4,096 tokens" in errors
    again = _run(*_arguments(given, tmp_path / "out"))
    assert again[0] == 2
    assert "out: found an SAE in" in again[2]


def test_flags_win_over_the_file(given: Path, tmp_path: Path) -> None:
    more = ("--hook-point", HOOK_POINTS[1], "--k", "3", "--loss-tokens", "0")
    code, output, _ = _run(*_arguments(given, tmp_path / "out", *more))
    assert code == 0
    assert "not measured: not asked for" in " ".join(output.split())
    (folder,) = (tmp_path / "out").iterdir()
    facts = json.loads((folder / "cfg.json").read_text())["metadata"]
    assert folder.name == HOOK_POINTS[1] and facts["training"]["l0_target"] == 3


def test_several_widths_get_folders_of_their_own(given: Path, tmp_path: Path) -> None:
    more = ("--d-sae", "24", "--d-sae", "40", "--hook-point", HOOK_POINTS[0], "--json")
    code, output, errors = _run(*_arguments(given, tmp_path / "out", *more))
    assert code == 0, errors
    assert list(json.loads(output)) == [f"{HOOK_POINTS[0]}/24", f"{HOOK_POINTS[0]}/40"]
    for width in (24, 40):
        assert load_sae(tmp_path / "out" / HOOK_POINTS[0] / str(width)).config.d_sae == width
    code, _, errors = _run(*_arguments(given, tmp_path / "out", *more))
    assert code == 2 and "out: found an SAE in" in errors


def test_data_that_ends_early_is_said(given: Path, tmp_path: Path) -> None:
    more = ("--hook-point", HOOK_POINTS[0], "--loss-tokens", "0", "--json")
    code, output, errors = _run(*_arguments(given, tmp_path / "out", "--tokens", "900000", *more))
    assert code == 0, errors
    seen = json.loads(output)[HOOK_POINTS[0]]["training"]["tokens_seen"]
    assert 0 < seen < 900_000
    assert f"data ended after {seen:,} of 900,000 tokens" in errors
    assert f"--tokens {seen}" in errors
    code, _, errors = _run(*_arguments(given, tmp_path / "again", "--tokens", str(seen), *more))
    assert code == 0 and "data ended" not in errors


def test_interrupted_run_resumes_to_the_same_bits(given: Path, tmp_path: Path) -> None:
    more = ("--tokens", "12288", "--loss-tokens", "0")
    command = [sys.executable, "-m", "monitor", *_arguments(given, tmp_path / "stopped", *more)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert process.stderr is not None
    try:
        while "of 12,288 tokens" not in (line := process.stderr.readline()):
            assert line, "ended before its first line of progress"
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=120) == 130, rest
    finally:
        process.kill()
        process.stderr.close()
    assert "resume from" in rest
    code, _, errors = _run(*_arguments(given, tmp_path / "stopped", *more))
    assert code == 2 and "expected --resume" in errors
    for place, flags in (("stopped", ["--resume"]), ("whole", [])):
        code, _, errors = _run(*_arguments(given, tmp_path / place, *more, *flags))
        assert code == 0, errors
    for name in HOOK_POINTS:
        ours, theirs = (
            load_file(tmp_path / place / name / "sae_weights.safetensors")
            for place in ("stopped", "whole")
        )
        assert all(ours[key].equal(theirs[key]) for key in ours | theirs)
    assert not (tmp_path / "stopped" / "checkpoint").exists()


def _changed(given: Path, tmp_path: Path, change: dict[str, Any]) -> tuple[int, str]:
    settings = SMALL | {
        "model": str(given / "model"),
        "data": str(given / "texts.jsonl"),
        "hook_point": HOOK_POINTS[0],
        "out": str(tmp_path / "out"),
    }
    content = {name: value for name, value in (settings | change).items() if value is not None}
    (tmp_path / "settings.yaml").write_text(json.dumps(content))
    code, _, errors = _run("train-sae", "--config", str(tmp_path / "settings.yaml"))
    return code, errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "model: found none, expected --model"),
        ({"speed": 3}, "found speed, expected arch,"),
        ({"arch": "jumprelu"}, "k: found 6, expected l0_target for jumprelu"),
        ({"arch": "gated", "k": None}, "architecture: found 'gated', expected one of batchtopk"),
        ({"d_sae": [32, 32]}, "d_sae: found one twice"),
        ({"d_sae": [32, "many"]}, "d_sae: found 'many', expected a whole number"),
        ({"d_sae": [32, 5]}, "expected above 0 and below d_sae, which is 5"),
        ({"d_sae": []}, "d_sae: found [], expected a whole number"),
        ({"tokens": "many"}, "total_tokens: found 'many', expected a whole number"),
        ({"k": 99}, "l0_target: found 99.0, expected above 0 and below d_sae"),
        ({"held_out_share": 2}, "held_out_share: found 2, expected between 0 and 1"),
        ({"held_out_share": 0.001}, "held-out texts: found"),
        ({"store_dtype": "int8"}, "store_dtype: found 'int8'"),
        ({"hook_point": "block.1"}, "hook point: found 'block.1', expected"),
        ({"hook_point": [HOOK_POINTS[0]] * 2}, "hook_point: found one twice"),
        ({"hook_point": "blocks.9.hook_resid_post"}, "has 3 layers"),
        ({"device": "cuda:77"}, "device: found 'cuda:77'"),
        ({"data": "nowhere.jsonl"}, "data: found no file or folder nowhere.jsonl"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    change: dict[str, Any], message: str, given: Path, tmp_path: Path
) -> None:
    code, errors = _changed(given, tmp_path, change)
    assert code == 2, errors
    assert message in errors


def test_line_that_is_no_json_is_named(given: Path, tmp_path: Path) -> None:
    lines = (given / "texts.jsonl").read_text().splitlines()[:50]
    (tmp_path / "torn.jsonl").write_text("\n".join([*lines, '{"text": 7}']) + "\n")
    code, errors = _changed(given, tmp_path, {"data": str(tmp_path / "torn.jsonl")})
    assert code == 2
    assert "torn.jsonl line 51: text: found 7, expected a string" in errors


def test_resume_without_a_run_is_refused(given: Path, tmp_path: Path) -> None:
    code, _, errors = _run(*_arguments(given, tmp_path / "out", "--resume"))
    assert code == 2
    assert "resume: found no run in" in errors
