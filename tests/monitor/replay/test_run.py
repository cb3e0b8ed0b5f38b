from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from monitor.errors import SettingsError
from monitor.replay.manifest import State, load_manifest
from monitor.replay.parts import SCHEMA
from monitor.replay.rows import Segment
from monitor.replay.run import LocalEngine, OnPart, OnRows
from monitor.replay.scorer import Job, Loading

CALM = "please tell me how to bake bread"


class StopsAfter(LocalEngine):
    """The local engine until some parts are on record; then as if Ctrl-C were pressed."""

    def __init__(self, loading: Loading, n_parts: int) -> None:
        super().__init__(loading)
        self.left = n_parts

    def run(self, job: Job, segments: Sequence[Segment], on_part: OnPart, on_rows: OnRows) -> None:
        def on_part_then_stop(part: object) -> None:
            on_part(part)  # type: ignore[arg-type]
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

        super().run(job, segments, on_part_then_stop, on_rows)


def test_every_row_has_one_place_and_parts_have_their_digests(replays: Any) -> None:
    rows = [*replays.texts(9), {"id": "bad", "text": ""}, {"id": "odd"}]
    file = replays.lines(rows)
    done = replays.run(file)
    assert [row["id"] for row in replays.rows()] == [row["id"] for row in rows]
    assert [row["class"] for row in replays.rows()] == ["new"] * 9 + ["failed"] * 2
    totals = done.manifest.totals()
    assert (totals.rows, totals.n_lost) == (11, 2)
    assert totals.reasons == {"failed: InvalidRequest": 2}
    content = json.loads((replays.out / "manifest.json").read_text())
    assert (content["state"], content["segments"]) == ("done", 3)
    assert content["facts"]["device"] == "cpu"
    assert content["totals"]["tokens"] == sum(r["tokens_scored"] or 0 for r in replays.rows())


def test_ctrl_c_leaves_whole_parts_and_the_rest_is_done_once(replays: Any) -> None:
    file, out = replays.lines(replays.texts(22)), replays.out
    with pytest.raises(KeyboardInterrupt):
        replays.run(file, engine=StopsAfter(replays.loading, 2))
    stopped = load_manifest(out)
    assert stopped is not None
    assert (stopped.state, sorted(stopped.parts)) == (State.INTERRUPTED, [0, 1])
    assert len(replays.rows()) == 8
    assert list(out.glob("*partial*")) == []
    done = replays.run(file)
    assert (done.n_kept, done.manifest.state) == (2, State.DONE)
    assert [row["id"] for row in replays.rows()] == [f"r{i}" for i in range(22)]
    assert [done.manifest.parts[i] for i in (0, 1)] == [stopped.parts[i] for i in (0, 1)]


SLOW_REPLAY = """
import signal, sys, time
import monitor.replay.run as run
from monitor.cli.app import app

# A shell starts what runs behind it with SIGINT ignored, and the tests with it.
signal.signal(signal.SIGINT, signal.default_int_handler)

class Slow(run.LocalEngine):
    def run(self, job, segments, on_part, on_rows):
        super().run(job, segments, lambda part: (on_part(part), time.sleep(0.2)), on_rows)

run.LocalEngine = Slow
app(sys.argv[1:])
"""
"""The command, which takes its time after each part: it cannot end before it is stopped."""


def test_stopped_and_killed_runs_are_completed_by_a_third(replays: Any) -> None:
    file, out = replays.lines(replays.texts(800)), replays.out
    command = [sys.executable, "-c", SLOW_REPLAY, "replay", "--input", str(file), "--out", str(out)]
    command += ["--bundle", str(replays.bundle), "--part-rows", "8", "--dtype", "float32"]
    n_parts = 0
    for number, code, state in (
        (signal.SIGINT, 130, State.INTERRUPTED),
        (signal.SIGKILL, -signal.SIGKILL, State.RUNNING),
    ):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list(out.glob("part-*"))) < n_parts + 3:
                time.sleep(0.01)
            process.send_signal(number)
        assert process.returncode == code
        left = load_manifest(out)
        assert left is not None
        assert left.state is state
        assert n_parts + 2 <= len(left.parts) < 100
        n_parts = len(left.parts)
    done = replays.run(file, part_rows=8)
    assert done.n_kept == n_parts
    assert [row["id"] for row in replays.rows()] == [f"r{i}" for i in range(800)]


def test_a_damaged_or_missing_part_is_made_again(replays: Any) -> None:
    file, out = replays.lines(replays.texts(12)), replays.out
    first, second, third = (part.name for part in replays.run(file).manifest.parts.values())
    before = replays.rows()
    content = bytearray((out / first).read_bytes())
    content[len(content) // 2] ^= 1
    (out / first).write_bytes(content)
    (out / second).unlink()
    (out / "part-000009-stray.parquet").write_bytes(b"")
    done = replays.run(file)
    assert (done.n_kept, list(done.damaged)) == (1, [first, second])
    assert [row["id"] for row in replays.rows()] == [row["id"] for row in before]
    assert (out / third).exists()


def test_another_input_bundle_or_setting_is_refused_and_named(replays: Any) -> None:
    file = replays.lines(replays.texts(5))
    replays.run(file)
    parts = sorted(replays.out.iterdir())
    second = replays.lines(replays.texts(2), "second.jsonl")
    no_gate = LocalEngine(replace(replays.loading, dtype="bfloat16", check_fit=False))
    with pytest.raises(SettingsError, match=r"of another run: inputs: found 2, expected 1"):
        replays.run(file, second)
    with pytest.raises(SettingsError, match=r"settings.part_rows: found 2, expected 4"):
        replays.run(file, part_rows=2)
    with pytest.raises(SettingsError, match=r"settings.policy: found strict, expected default"):
        replays.run(file, policy="strict")
    with pytest.raises(SettingsError, match=r"max_step_tokens: found 64, expected 2048"):
        replays.run(file, max_step_tokens=64)
    with pytest.raises(SettingsError, match=r"dtype: found bfloat16, expected float32"):
        replays.run(file, engine=no_gate)
    replays.lines([*replays.texts(4), {"id": "r4", "text": "other"}])
    with pytest.raises(SettingsError, match=r"input 1 \(rows.jsonl\), sha256: found"):
        replays.run(file)
    assert sorted(replays.out.iterdir()) == parts


def test_a_folder_of_something_else_or_in_use_is_refused(replays: Any, tmp_path: Path) -> None:
    file, out = replays.lines(replays.texts(1)), replays.out
    out.mkdir()
    (out / "thesis.txt").write_text("")
    with pytest.raises(SettingsError, match=r"found thesis.txt and no manifest.json"):
        replays.run(file)
    (out / "manifest.json").write_text('{"format": "x"}')
    with pytest.raises(SettingsError, match=r"found format 'x', expected"):
        replays.run(file)
    other = tmp_path / "other"
    replays.run(file, out=other)
    with (other / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SettingsError, match="another replay at work"):
            replays.run(file, out=other)


def test_an_input_that_shrinks_meanwhile_is_named(replays: Any) -> None:
    file = replays.lines(replays.texts(8))

    class Shrinks(LocalEngine):
        def run(
            self, job: Job, segments: Sequence[Segment], on_part: OnPart, on_rows: OnRows
        ) -> None:
            replays.lines(replays.texts(6))
            super().run(job, segments, on_part, on_rows)

    with pytest.raises(SettingsError, match="found 2 rows in segment 1, expected 4: it changed"):
        replays.run(file, engine=Shrinks(replays.loading))


def test_an_input_without_rows_is_done_at_once(replays: Any) -> None:
    done = replays.run(replays.lines([]))
    assert (done.manifest.state, done.manifest.totals().rows) == (State.DONE, 0)


def test_parquet_beside_lines_scores_the_same(replays: Any) -> None:
    rows = replays.texts(7)
    table = replays.folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table, row_group_size=3)
    done = replays.run(replays.lines(rows), table)
    found = replays.rows()
    assert [row["source"] for row in found] == ["rows.jsonl"] * 7 + ["rows.parquet"] * 7
    for line, row in zip(found[:7], found[7:], strict=True):
        assert (line["id"], line["verdict"]) == (row["id"], row["verdict"])
        assert line["overall"]["fused"] == pytest.approx(row["overall"]["fused"], rel=1e-4)
    assert [one["kind"] for one in done.manifest.inputs] == ["jsonl", "parquet"]
    assert len(done.manifest.parts) == 4


def test_rows_keep_their_policy_and_stage(replays: Any) -> None:
    rows = [
        {"text": CALM, "policy": "strict"},
        {"text": CALM, "kind": "completion"},
        {"text": CALM, "policy": "absent"},
    ]
    replays.run(replays.lines(rows))
    found = replays.rows()
    assert [row["policy"] for row in found] == ["strict", "default", None]
    assert found[1]["clusters"][0]["stage"] == "completion"
    assert (found[2]["class"], found[2]["reason"]) == ("failed", "NotFound")
    assert "policy: found 'absent'" in found[2]["error"]


def test_every_column_is_described() -> None:
    assert all(field.metadata[b"description"] for field in SCHEMA)
