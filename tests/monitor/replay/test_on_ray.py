"""The same rows through actors of a real Ray on this machine, one of which is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monitor.audit_log.trace import decode_trace
from monitor.config import quiet_ray
from monitor.errors import SettingsError
from monitor.replay.compare import TOLERANCE
from monitor.replay.files import open_file
from monitor.replay.manifest import load_manifest
from monitor.replay.rows import Input, Progress, ReplayRow, Start, Survey
from monitor.replay.run import replay
from monitor.replay.scorer import Job

ray = pytest.importorskip("ray", reason="ray is not installed (extra ray)")

# What Ray leaves open in this process when it is shut down is not ours to close.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    quiet_ray()
    ray.init(
        num_cpus=2,
        object_store_memory=80 * 1024**2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()


def on_ray(replays: Any, **changes: Any) -> Any:
    from monitor.replay.on_ray import RayEngine

    return RayEngine(replays.loading, **changes)


def assert_same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    """The same rows, classes and verdicts, and scores within what `numeric` allows."""
    for name in ("id", "place", "class", "reason", "verdict", "policy", "tokens_scored"):
        assert [row[name] for row in left] == [row[name] for row in right]
    for a, b in zip(left, right, strict=True):
        if a["trace"] is None:
            continue
        one, other = decode_trace(a["trace"]), decode_trace(b["trace"])
        np.testing.assert_allclose(
            one.trace.logits,
            other.trace.logits,
            rtol=TOLERANCE["float32"],
            atol=TOLERANCE["float32"] + 2 * one.max_error.max(),
            equal_nan=True,
        )


def test_ray_and_local_give_the_same_rows_and_go_on_with_each_other(replays: Any) -> None:
    rows = [*replays.texts(30), {"id": "bad", "text": ""}]
    file = replays.lines(rows)
    local = replays.folder / "local"
    replays.run(file, out=local)
    done = replays.run(file, engine=on_ray(replays, actors=2))
    assert done.manifest.totals().rows == 31
    assert done.manifest.engine == "ray"
    assert_same(replays.rows(), replays.rows(local))
    for part in list(done.manifest.parts.values())[2:5]:
        (replays.out / part.name).unlink()
    again = replays.run(file)
    assert (again.n_kept, len(again.damaged)) == (5, 3)
    assert_same(replays.rows(), replays.rows(local))


def test_a_killed_actor_costs_no_row_and_doubles_none(replays: Any) -> None:
    @dataclass(frozen=True)
    class KillsOnce:
        """A file whose third segment kills the first process that is half through it."""

        file: Input
        marker: Path

        def pinned(self, identity: Mapping[str, Any]) -> Input:
            return self

        def survey(self, part_rows: int, progress: Progress) -> Survey:
            return self.file.survey(part_rows, progress)

        def rows(self, start: Start, n_rows: int, *, policy: str) -> Iterator[ReplayRow]:
            for row in self.file.rows(start, n_rows, policy=policy):
                if row.place == 10 and not self.marker.exists():
                    self.marker.write_text(str(os.getpid()))
                    os.kill(os.getpid(), signal.SIGKILL)
                yield row

    file = replays.lines(replays.texts(30))
    marker = replays.folder / "killed"
    job = Job(inputs=[KillsOnce(open_file(file), marker)], out=replays.out)
    done = replay(job, on_ray(replays, actors=2), part_rows=4)
    assert int(marker.read_text()) != os.getpid()
    assert done.manifest.totals().rows == 30
    assert [row["id"] for row in replays.rows()] == [f"r{i}" for i in range(30)]
    manifest = load_manifest(replays.out)
    assert manifest is not None
    assert sorted(manifest.parts) == list(range(8))


def test_what_cannot_be_had_is_refused_at_once(replays: Any) -> None:
    file = replays.lines(replays.texts(4))
    with pytest.raises(SettingsError, match="found 2 CPUs in the Ray cluster, expected at least 3"):
        replays.run(file, engine=on_ray(replays, actors=3))
    with pytest.raises(SettingsError, match="found 0 GPUs in the Ray cluster, expected at least"):
        replays.run(file, engine=on_ray(replays, gpus_per_actor=0.5))
    with pytest.raises(SettingsError, match="--actors, --gpus-per-actor"):
        on_ray(replays, actors=0)
    replays.loading = replace(replays.loading, bundle=replays.folder / "absent")
    with pytest.raises(SettingsError, match="engine ray: bundle: found no folder"):
        replays.run(file, engine=on_ray(replays))
    assert not list(replays.out.glob("part-*"))


def test_an_actor_that_cannot_go_on_says_why(replays: Any) -> None:
    file = replays.lines(replays.texts(8))

    class Forgets:
        """The Ray engine over a file that shrinks before an actor reads it."""

        name = "ray"

        def __init__(self) -> None:
            self._engine = on_ray(replays)
            self.facts = self._engine.facts
            self.close = self._engine.close

        def run(self, *arguments: Any) -> None:
            replays.lines(replays.texts(6))
            self._engine.run(*arguments)

    with pytest.raises(SettingsError, match="found 2 rows in segment 1, expected 4"):
        replays.run(file, engine=Forgets())


def test_the_command_runs_on_the_cluster_that_is_named(replays: Any) -> None:
    file = replays.lines(replays.texts(6))
    command = [sys.executable, "-m", "monitor", "replay", "--input", str(file), "--json"]
    command += ["--out", str(replays.out), "--bundle", str(replays.bundle), "--engine", "ray"]
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [*command, "--part-rows", "3"],
        env={**os.environ, "RAY_ADDRESS": address},  # noqa: TID251 - the child's
        stdout=subprocess.PIPE,
        check=True,
    )
    manifest = json.loads(done.stdout)
    assert (manifest["state"], manifest["engine"], manifest["segments"]) == ("done", "ray", 2)
    assert [row["id"] for row in replays.rows()] == [f"r{i}" for i in range(6)]
    assert ray.is_initialized()
