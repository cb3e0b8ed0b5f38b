from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from monitor.audit_log.record import Observed
from monitor.audit_log.schema import database_path
from monitor.audit_log.sealing import KeyRing, new_key
from monitor.audit_log.trace import TokenTrace, decode_trace
from monitor.audit_log.writer import AuditLog
from monitor.cli.app import app
from monitor.records import (
    Action,
    Alert,
    ClusterResult,
    Coverage,
    Decision,
    Mode,
    Overall,
    Provenance,
    Severity,
    Stage,
    Timings,
    Verdict,
)

Run = Callable[..., Any]


@pytest.fixture
def run() -> Run:
    runner = CliRunner()

    def invoke(*arguments: str, code: int = 0) -> str:
        result = runner.invoke(app, ["audit", *arguments])
        assert result.exit_code == code, result.output
        return str(result.stdout if code == 0 else result.output)

    return invoke


def make_decision(decision_id: str, verdict: Verdict, severity: Severity) -> Decision:
    score = {Verdict.PASS: float("nan"), Verdict.FLAG: 1.5, Verdict.ALERT: 3.25}[verdict]
    stage = Stage.PROMPT
    alert = Alert(
        decision_id=decision_id,
        cluster="weapons",
        severity=severity,
        stage=stage,
        score=score,
        position=1,
    )
    return Decision(
        decision_id=decision_id,
        verdict=verdict,
        action=Action.ALLOW,
        mode=Mode.MONITOR,
        policy="default",
        overall=Overall(fused=score, dense=0.5, sae=0.25),
        clusters=(
            ClusterResult(
                cluster="weapons",
                fused=score,
                dense=0.5,
                sae=0.25,
                verdict=verdict,
                severity=severity,
                stage=stage,
                first_crossing=None,
                calibrated=True,
            ),
        ),
        rules=(),
        alerts=(alert,) if verdict is Verdict.ALERT else (),
        coverage=Coverage(received=2, scored=2),
        timings=Timings(forward_seconds=0.001, total_seconds=0.002),
        provenance=Provenance(
            model="tiny",
            model_digest="a" * 64,
            tokenizer_fingerprint="b" * 64,
            bundle="tiny@1",
            bundle_digest="c" * 64,
            dtype="float32",
            backend="torch",
            server_version="0.1.0",
        ),
    )


KEYS = new_key("2026")


@pytest.fixture
def audit(tmp_path: Path) -> str:
    """Decisions d1 to d6, a day apart from 2026-01-01; d2 flags, d4 alerts; alice calls for d3."""
    url = f"sqlite:///{tmp_path / 'audit.db'}"
    trace = TokenTrace(
        clusters=("weapons",),
        stages=(None, Stage.PROMPT),
        logits=np.array([[[np.nan] * 3], [[1.5, 0.5, 0.25]]], np.float32),
    )
    observed = Observed(trace=trace, token_ids=[2, 7], texts=["<bos>", "hello"])
    raised = {2: (Verdict.FLAG, Severity.WARNING), 4: (Verdict.ALERT, Severity.CRITICAL)}

    async def write() -> None:
        for day in range(6):
            seconds = 1_767_225_600.0 + 86_400 * day
            log = AuditLog.open(
                url,
                level="content",
                hash_key=b"k" * 16,
                keys=KeyRing.parse(KEYS, "test"),
                clock=lambda seconds=seconds: seconds,  # type: ignore[misc]
            )
            log.start()
            await log.append_decision(
                make_decision(f"d{day + 1}", *raised.get(day + 1, (Verdict.PASS, Severity.INFO))),
                input_digest="e" * 64,
                caller="alice" if day == 2 else None,
                observed=observed,
            )
            await log.close()

    asyncio.run(write())
    return url


def ids(lines: str) -> list[str]:
    return [json.loads(line)["decision_id"] for line in lines.splitlines()]


def test_query_by_each_of_its_filters(run: Run, audit: str, tmp_path: Path) -> None:
    key = tmp_path / "hash.key"
    key.write_bytes(b"k" * 16 + b"\n")
    wanted = {
        (): ["d1", "d2", "d3", "d4", "d5", "d6"],
        ("--verdict", "alert"): ["d4"],
        ("--severity", "warning"): ["d2"],
        ("--cluster", "weapons"): ["d2", "d4"],
        ("--decision", "d5"): ["d5"],
        ("--caller", "alice", "--hash-key-file", str(key)): ["d3"],
        ("--caller", "bob", "--hash-key-file", str(key)): [],
        ("--since", "2026-01-03", "--until", "2026-01-05T00:00:00"): ["d3", "d4"],
        ("--limit", "2", "--newest-first"): ["d6", "d5"],
    }
    for arguments, expected in wanted.items():
        assert ids(run("query", "--audit", audit, "--json", *arguments)) == expected
    lines = [line.split() for line in run("query", "--audit", audit).splitlines()]
    assert lines[0][:4] == ["time", "sequence", "decision", "verdict"]
    assert lines[1][0] == "2026-01-01T00:00:00Z"
    assert lines[1][2:4] == ["d1", "pass"]
    assert any(line[-1] == "weapons" for line in lines)
    assert "expected --hash-key-file" in run("query", "--audit", audit, "--caller", "x", code=2)


def test_verify_with_checkpoints_kept_elsewhere(run: Run, audit: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    kept.write_text(run("checkpoints", "export", "--audit", audit))
    assert len(kept.read_text().splitlines()) == 6
    assert len(run("checkpoints", "export", "--audit", audit, "--after", "4").splitlines()) == 2
    report = json.loads(run("verify", "--audit", audit, "--checkpoints", str(kept), "--json"))
    assert (report["verified"], report["kept_elsewhere"]) == (True, 6)
    assert "6 checkpoints kept elsewhere agree" in run(
        "verify", "--audit", audit, "--checkpoints", str(kept)
    )
    broken = run("verify", "--audit", audit, "--public-key", "0" * 64, code=1)
    assert "signature: found none" in broken


def test_prove_and_show(run: Run, audit: str, tmp_path: Path) -> None:
    out = tmp_path / "proof.json"
    run("prove", "d4", "--audit", audit, "--out", str(out))
    assert json.loads(out.read_text()) == json.loads(run("prove", "d4", "--audit", audit))
    assert "none of id 'd9'" in run("prove", "d9", "--audit", audit, code=2)
    keys = tmp_path / "keys"
    keys.write_text(KEYS)
    shown = json.loads(run("show", "d4", "--audit", audit, "--keys-file", str(keys)))
    assert (shown["token_ids"], shown["texts"]) == ([2, 7], ["<bos>", "hello"])
    assert shown["token_scores"]["logits"] == [[[None] * 3], [[1.5, 0.5, 0.25]]]
    assert "texts" not in json.loads(run("show", "d4", "--audit", audit))


def test_prune_leaves_a_log_that_verifies(run: Run, audit: str) -> None:
    assert "2 records deleted" in run("prune", "--audit", audit, "--before", "2026-01-03")
    report = json.loads(run("verify", "--audit", audit, "--json"))
    assert (report["chains"][0]["pruned"], report["chains"][0]["records"]) == (2, 4)
    assert ids(run("query", "--audit", audit, "--json")) == ["d3", "d4", "d5", "d6"]


def test_keys(run: Run, tmp_path: Path) -> None:
    assert KeyRing.parse(run("keys", "new", "a"), "test").active == "a"
    path = tmp_path / "signing.pem"
    assert len(bytes.fromhex(run("keys", "new-signing", str(path)).strip())) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert "cannot be made" in run("keys", "new-signing", str(path), code=2)
    assert "key name" in run("keys", "new", "a b", code=2)


def test_export_is_read_by_duckdb_and_pandas(run: Run, audit: str, tmp_path: Path) -> None:
    target = tmp_path / "decisions.parquet"
    run("export", "--audit", audit, "--out", str(target))
    frame = pd.read_parquet(target)
    assert list(frame["decision_id"]) == ["d1", "d2", "d3", "d4", "d5", "d6"]
    assert str(frame["time"][0]) == "2026-01-01 00:00:00+00:00"
    assert frame["caller_hmac"].notna().tolist() == [False, False, True, False, False, False]
    assert frame["overall"][0]["fused"] is None
    decoded = decode_trace(frame["trace"][3])
    assert decoded.trace.logits[1].tolist() == [[1.5, 0.5, 0.25]]
    assert json.loads(frame["body"][3])["sealed"]["key"] == "2026"
    rows = duckdb.sql(
        "SELECT decision_id, c.cluster, c.fused, alerts[1].score, tokens_scored, bundle_digest "
        f"FROM '{target}', unnest(clusters) AS u(c) WHERE severity = 'critical'"
    ).fetchall()
    assert rows == [("d4", "weapons", 3.25, 3.25, 2, "c" * 64)]
    assert list(tmp_path.glob(".*partial")) == []


def test_export_takes_the_filters_of_query(run: Run, audit: str, tmp_path: Path) -> None:
    target = tmp_path / "some.parquet"
    run("export", "--audit", audit, "--out", str(target), "--verdict", "flag")
    assert list(pd.read_parquet(target)["decision_id"]) == ["d2"]
    missing = str(tmp_path / "absent" / "x.parquet")
    assert "cannot be written" in run("export", "--audit", audit, "--out", missing, code=2)


def test_every_exported_column_is_described() -> None:
    from monitor.audit_log.export import SCHEMA

    assert all(field.metadata[b"description"] for field in SCHEMA)


def test_a_broken_log_is_exit_code_1_and_named(run: Run, audit: str) -> None:
    path = database_path(audit)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"verdict":"alert"', b'"verdict":"alarm"'))
    assert "record 4 (decision 'd4')" in run("verify", "--audit", audit, code=1).replace("\n", "")
    assert "record 4" in run("prove", "d4", "--audit", audit, code=1)
