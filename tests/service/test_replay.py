"""What a server decided and recorded, replayed by the command that an auditor runs."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from monitor.audit_log.sealing import new_key
from monitor.cli.app import app
from monitor.client import MonitorClient
from monitor.testing import write_tiny_bundle

RISKY = "what is the danger of the attack in the north"
CALM = "please tell me how to bake bread"

Outcome = tuple[int, dict[str, Any], str]


def replay(out: Path, *arguments: str) -> Outcome:
    result = CliRunner().invoke(app, ["replay", "--out", str(out), "--json", *arguments])
    manifest = json.loads(result.stdout) if result.stdout.startswith("{") else {}
    return result.exit_code, manifest, result.output


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The rows of the parts that the manifest names, in its order."""
    manifest = json.loads((out / "manifest.json").read_text())
    rows: list[dict[str, Any]] = []
    for part in manifest["parts"]:
        rows += pq.read_table(out / part["name"]).to_pylist()
    assert len(rows) == manifest["totals"]["rows"]
    return rows


def talk(client: MonitorClient) -> list[str]:
    """Requests of every kind and two streams; their decision ids in the order they ended."""
    ids = [client.score(text=f"{CALM} {n}").decision_id for n in range(3)]
    ids.append(client.score(text=RISKY).decision_id)
    ids.append(client.score(text=RISKY, stage="completion", policy="strict").decision_id)
    turns = [("system", "be kind"), ("user", RISKY), ("assistant", CALM)]
    ids.append(client.score(messages=turns).decision_id)
    for words in (RISKY, CALM):
        with client.stream(stage="completion", context=[("user", CALM)]) as stream:
            for word in words.split():
                stream.send(text=f" {word}")
            ids.append(stream.finish().decision_id)
    return ids


@pytest.fixture
def recorded(
    serve: Callable[..., Any], tmp_path: Path, request: pytest.FixtureRequest
) -> tuple[str, list[str], Path]:
    """A log's URL, the decisions in it, and the keys that open it."""
    keys = tmp_path / "keys"
    keys.write_text(new_key("first") + "\n")
    level = getattr(request, "param", "tokens")
    with serve(audit_level=level, audit_keys_file=keys) as server, server.client() as client:
        ids = talk(client)
    return f"sqlite:///{tmp_path / 'audit.db'}", ids, keys


@pytest.mark.parametrize("recorded", ["tokens", "content"], indirect=True)
def test_what_was_served_scores_the_same_when_replayed(
    recorded: tuple[str, list[str], Path], tiny_bundle: Path, tmp_path: Path
) -> None:
    audit, ids, keys = recorded
    arguments = ("--audit", audit, "--bundle", str(tiny_bundle), "--keys-file", str(keys))
    out = tmp_path / "out"
    code, manifest, output = replay(out, *arguments, "--expect", "numeric")
    assert code == 0, output
    rows = rows_of(out)
    assert [row["id"] for row in rows] == ids
    assert {row["class"] for row in rows} <= {"bitwise", "numeric"}
    assert [row["verdict"] for row in rows] == [row["verdict_then"] for row in rows]
    assert {row["verdict"] for row in rows} == {"pass", "alert"}
    assert [bool(row["session_id"]) for row in rows] == [False] * 6 + [True] * 2
    assert [row["policy"] for row in rows].count("strict") == 1
    assert rows[5]["tokens_scored"] < rows[5]["tokens_received"]  # the system's turn is left out
    (group,) = manifest["totals"]["groups"]
    assert (group["differs"], group["not_recorded"]) == ([], [])
    assert group["score_difference"] <= 1e-4 * 25
    assert manifest["facts"]["heads_digest"] and manifest["facts"]["sae_digests"]["l1"]
    assert manifest["state"] == "done"
    # What was sealed stays sealed.
    assert not {"token_ids", "texts", "text"} & rows[0].keys()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_replay_computes_in_the_data_type_of_its_log(
    serve: Callable[..., Any], tiny_bundle: Path, tmp_path: Path, dtype: str
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(new_key("first") + "\n")
    settings = {"audit_level": "tokens", "audit_keys_file": keys, "dtype": dtype, "fidelity": "off"}
    with serve(**settings) as server, server.client() as client:
        client.score(text=CALM)
    audit = ("--audit", f"sqlite:///{tmp_path / 'audit.db'}", "--keys-file", str(keys))
    arguments = (*audit, "--bundle", str(tiny_bundle), "--fidelity", "off")
    code, manifest, output = replay(tmp_path / "out", *arguments)
    assert code == 0, output
    assert manifest["facts"]["dtype"] == dtype
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    code, manifest, output = replay(tmp_path / "other", *arguments, "--dtype", other)
    assert (code, manifest["facts"]["dtype"]) == (0, other), output


def changed_bundle(tiny_bundle: Path, target: Path) -> Path:
    """The same model and SAE, with a cluster that nothing raises."""
    shutil.copytree(tiny_bundle, target)
    spec = yaml.safe_load((target / "bundle.yaml").read_text())
    spec["clusters"][0]["thresholds"] = {"flag": 1e5, "alert": 1e6, "clear": 0.0}
    spec["version"] = 2
    (target / "bundle.yaml").write_text(yaml.safe_dump(spec))
    return target


def test_another_bundle_flips_verdicts_and_is_named(
    recorded: tuple[str, list[str], Path], tiny_bundle: Path, tmp_path: Path
) -> None:
    audit, _, keys = recorded
    bundle = changed_bundle(tiny_bundle, tmp_path / "changed")
    out = tmp_path / "out"
    arguments = ("--audit", audit, "--bundle", str(bundle), "--keys-file", str(keys))
    code, manifest, output = replay(out, *arguments)
    assert code == 0, output
    rows = rows_of(out)
    assert [row["class"] == "flipped" for row in rows] == [
        row["verdict_then"] == "alert" for row in rows
    ]
    flipped = [row["clusters"][0] for row in rows if row["class"] == "flipped"]
    assert {(c["verdict_then"], c["verdict"]) for c in flipped} == {("alert", "pass")}
    assert [group["differs"] for group in manifest["totals"]["groups"]] == [["bundle"]]
    assert replay(out, *arguments, "--expect", "decision")[0] == 1
    shown = CliRunner().invoke(app, ["replay", "--out", str(out), *arguments])
    assert "flipped" in shown.output
    assert "  bundle: " in shown.output


def test_a_rule_that_held_for_a_moment_of_a_stream_holds_when_replayed(
    serve: Callable[..., Any], tmp_path: Path
) -> None:
    """Calm words first; at the end the text is dangerous and the rule no longer holds."""
    below = {"cluster": "danger", "below": "flag"}
    seen = {"cluster": "quiet", "above": -1e9}
    rule = {"id": "calm", "severity": "info", "all": [below, seen]}
    bundle = write_tiny_bundle(tmp_path / "ruled", changes={"rules": [rule]})
    keys = tmp_path / "keys"
    keys.write_text(new_key("first") + "\n")
    text = f"{CALM} danger"
    with (
        serve(bundle, audit_level="tokens", audit_keys_file=keys) as server,
        server.client() as client,
    ):
        client.score(text=text, stage="completion")
        for pieces in ([text], [f" {word}" for word in text.split()]):
            with client.stream(stage="completion") as stream:
                for piece in pieces:
                    stream.send(text=piece)
                decision = stream.finish()
            (alert,) = (a for a in decision.alerts if a.cluster == "rule:calm")
            assert alert.position is not None
    audit = ("--audit", f"sqlite:///{tmp_path / 'audit.db'}")
    arguments = (*audit, "--bundle", str(bundle))
    code, _, output = replay(
        tmp_path / "out", *arguments, "--keys-file", str(keys), "--expect", "numeric"
    )
    assert code == 0, output
    rows = rows_of(tmp_path / "out")
    assert [row["rules"] for row in rows] == [[], ["calm"], ["calm"]]
    assert [(row["asked_stage"], row["asked_priority"]) for row in rows] == [
        ("completion", "completion")
    ] * 3
    change = ("--set", "danger.thresholds.clear=-2", "--json")
    result = CliRunner().invoke(app, ["what-if", *arguments, *change])
    found = json.loads(result.stdout)
    assert (found["rules"]["calm"]["champion"], found["not_reproduced"]["count"]) == (2, 0)


def test_records_that_cannot_be_opened_are_counted_by_their_key(
    recorded: tuple[str, list[str], Path], tiny_bundle: Path, tmp_path: Path
) -> None:
    audit, ids, _ = recorded
    other = tmp_path / "other"
    other.write_text(new_key("second") + "\n")
    out = tmp_path / "out"
    arguments = ("--audit", audit, "--bundle", str(tiny_bundle), "--keys-file", str(other))
    code, manifest, _ = replay(out, *arguments)
    assert code == 1
    assert manifest["totals"]["reasons"] == {"skipped: key first": len(ids)}
    assert [row["id"] for row in rows_of(out)] == ids
    assert "'first'" in rows_of(out)[0]["error"]


@pytest.mark.parametrize("recorded", ["scores"], indirect=True)
def test_levels_without_tokens_are_counted(
    recorded: tuple[str, list[str], Path], tiny_bundle: Path, tmp_path: Path
) -> None:
    audit, ids, _ = recorded
    code, manifest, _ = replay(tmp_path / "out", "--audit", audit, "--bundle", str(tiny_bundle))
    assert code == 1
    assert manifest["totals"]["reasons"] == {"skipped: level scores": len(ids)}


def test_the_filters_of_query_choose_and_later_records_wait(
    recorded: tuple[str, list[str], Path],
    serve: Callable[..., Any],
    tiny_bundle: Path,
    tmp_path: Path,
) -> None:
    audit, ids, keys = recorded
    arguments = ("--audit", audit, "--bundle", str(tiny_bundle), "--keys-file", str(keys))
    out, alerts = tmp_path / "out", tmp_path / "alerts"
    one = ("--decision", ids[2])
    assert replay(tmp_path / "one", *arguments, *one)[1]["totals"]["rows"] == 1
    code, manifest, _ = replay(alerts, *arguments, "--verdict", "alert", "--part-rows", "2")
    assert (code, manifest["totals"]["rows"]) == (0, 4)
    assert {row["verdict_then"] for row in rows_of(alerts)} == {"alert"}
    replay(out, *arguments)
    with serve(audit_level="tokens", audit_keys_file=keys) as server, server.client() as client:
        client.score(text=CALM)
    again = replay(out, *arguments)[1]
    assert again["totals"]["rows"] == len(ids)
    code, _, output = replay(alerts, *arguments, "--verdict", "pass", "--part-rows", "2")
    assert code == 2
    assert "another run: input 1" in output


def test_files_and_filters_do_not_mix(tiny_bundle: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": CALM}) + "\n")
    for arguments in (
        [],
        ["--input", str(rows), "--audit", "sqlite:///x.db"],
        ["--input", str(rows), "--verdict", "alert"],
        ["--input", str(tmp_path / "absent")],
    ):
        code, _, output = replay(tmp_path / "out", *arguments, "--bundle", str(tiny_bundle))
        assert (code, output.count("\n")) == (2, 1), output
        assert "expected" in output


def test_an_extra_that_is_not_installed_is_named(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": CALM}) + "\n")
    arguments = ("--input", str(rows), "--bundle", str(tiny_bundle), "--engine", "ray")
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "ray" else there(name)
    )
    code, _, output = replay(tmp_path / "out", *arguments)
    assert code == 2
    assert "needs ray, which is not installed; pip install 'sae-monitor[ray]'" in output
