from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from monitor.cli.app import app
from monitor.cli.score import read_rows
from monitor.errors import InvalidRequestError

RISKY = "what is the danger of the attack"
CALM = "please tell me how to bake bread"


def run(*arguments: str, input: str | None = None) -> tuple[int, list[dict[str, Any]], str]:
    result = CliRunner().invoke(app, ["score", *arguments], input=input)
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return result.exit_code, rows, result.output


def test_text_to_one_documented_json_object(tiny_bundle: Path) -> None:
    code, rows, _ = run("--bundle", str(tiny_bundle), "--text", RISKY, "--json", "--tokens")
    assert code == 0
    (row,) = rows
    assert set(row) == {
        *("id", "verdict", "overall", "clusters", "coverage", "tokens", "bundle", "model")
    }
    assert row["id"] == 1
    assert row["verdict"] == "alert"
    assert set(row["overall"]) == {"fused", "dense", "sae"}
    danger = row["clusters"]["danger"]
    assert set(danger) == {"fused", "dense", "sae", "verdict", "first_crossing"}
    assert danger["verdict"] == "alert"
    assert row["tokens"][danger["first_crossing"]]["text"].strip() == "danger"
    scored = [t for t in row["tokens"] if t["stage"] is not None]
    assert max(t["fused"]["danger"] for t in scored) == pytest.approx(danger["fused"])
    coverage = row["coverage"]
    assert coverage["received"] == coverage["scored"] + sum(coverage["unscored"].values())
    assert coverage["received"] == len(row["tokens"])


def test_file_keeps_order_and_ids_and_names_bad_lines(tiny_bundle: Path, tmp_path: Path) -> None:
    lines = [
        json.dumps({"id": "a", "text": RISKY}),
        json.dumps({"text": CALM, "kind": "completion"}),
        "",
        "{not json",
        json.dumps({"id": "c", "prompt": "x"}),
        json.dumps({"id": "d", "messages": [{"role": "user", "content": RISKY}]}),
        json.dumps({"id": "e", "text": ""}),
        *(json.dumps({"id": i, "text": CALM}) for i in range(100)),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines))
    code, rows, output = run("--bundle", str(tiny_bundle), "--file", str(file), "--json")
    assert code == 1
    assert [row["id"] for row in rows] == ["a", 2, 4, "c", "d", "e", *range(100)]
    assert [row.get("verdict") for row in rows[:6]] == ["alert", "pass", None, None, "alert", None]
    assert "line 4" in rows[2]["error"]
    assert "keys id, prompt" in rows[3]["error"]
    assert "empty string" in rows[5]["error"]
    assert "3 lines could not be scored" in output


def test_a_file_scores_as_each_line_alone(tiny_bundle: Path) -> None:
    texts = [RISKY, CALM, "an attack in the north", "the weather is a danger today"]
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    _, together, _ = run("--bundle", str(tiny_bundle), "--file", "-", "--json", input=lines)
    for text, row in zip(texts, together, strict=True):
        _, (alone,), _ = run("--bundle", str(tiny_bundle), "--text", text, "--json")
        fused = alone["clusters"]["danger"]["fused"]
        assert row["clusters"]["danger"]["fused"] == pytest.approx(fused, rel=1e-4)
        assert row["verdict"] == alone["verdict"]


def test_a_person_sees_verdict_and_reason(tiny_bundle: Path) -> None:
    code, _, output = run("--bundle", str(tiny_bundle), "--text", RISKY)
    assert code == 0
    assert "ALERT" in output
    assert "trigger words" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "a", "--bundle", "/nowhere"], "/nowhere"),
        (["--file", "/nowhere.jsonl"], "/nowhere.jsonl"),
    ],
)
def test_what_cannot_start_exits_2_with_one_line(
    tiny_bundle: Path, arguments: list[str], message: str
) -> None:
    bundle = [] if "--bundle" in arguments else ["--bundle", str(tiny_bundle)]
    result = CliRunner().invoke(app, ["score", *arguments, *bundle])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert result.output.strip().count("\n") == 0


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"no file .*nope"):
        list(read_rows(tmp_path / "nope", policy="default", want_tokens=False))
