"""Files of requests for the tiny bundle, replayed in this process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from monitor.replay.files import open_file
from monitor.replay.run import Engine, LocalEngine, Replayed, replay
from monitor.replay.scorer import Job, Loading

RISKY = "what is the danger of the attack"
CALM = "please tell me how to bake bread"


class Replays:
    """A test's own folder of inputs and outputs."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.folder = folder
        self.bundle = bundle
        self.out = folder / "out"
        self.loading = Loading(bundle=bundle, cache=folder / "cache", device="cpu", dtype="float32")

    @staticmethod
    def texts(n: int) -> list[dict[str, Any]]:
        """Rows `r0`, `r1`, ... of different lengths; every third one alerts."""
        words = CALM.split()
        return [
            {"id": f"r{i}", "text": f"{RISKY if i % 3 == 0 else CALM} {' '.join(words[: i % 7])}"}
            for i in range(n)
        ]

    def lines(self, rows: Sequence[Any], name: str = "rows.jsonl") -> Path:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def run(
        self,
        *files: Path,
        out: Path | None = None,
        engine: Engine | None = None,
        part_rows: int = 4,
        **changes: Any,
    ) -> Replayed:
        inputs = [open_file(path) for path in files]
        job = Job(inputs=inputs, out=out or self.out, **changes)
        return replay(job, engine or LocalEngine(self.loading), part_rows=part_rows)

    def rows(self, out: Path | None = None) -> list[dict[str, Any]]:
        """The rows of every part in the folder, in the order of their names: strays show."""
        rows: list[dict[str, Any]] = []
        for path in sorted((out or self.out).glob("part-*.parquet")):
            rows += pq.read_table(path).to_pylist()
        return rows


@pytest.fixture
def replays(tmp_path: Path, tiny_bundle: Path) -> Replays:
    return Replays(tmp_path, tiny_bundle)
