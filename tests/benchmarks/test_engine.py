"""The engine's benchmark runs, small: what it would say of a real model is not tested here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "engine.py"
PEERS_NEEDED = {
    "fp32_over_saelens_documented",
    "auto_over_saelens_documented",
    "fp32_over_saelens_best",
    "auto_over_saelens_best",
}
MEASURED = {
    "gemm_share",
    "overhead_share",
    "packed_over_padded",
    "streams64_share",
    "flat_cost_ratio",
    "prefix_ratio",
    "rpc_overhead_p99_ms",
    "rss_over_budget",
}


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The JSON and the text of a quick run."""
    file = tmp_path_factory.mktemp("engine") / "figures.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--json", str(file), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text()), done.stdout


@pytest.mark.timeout(900)  # several processes that import torch, maybe on a busy machine
def test_every_figure_is_there_and_null_only_where_peers_are_needed(
    quick_run: tuple[dict[str, Any], str],
) -> None:
    figures, _ = quick_run
    assert set(figures) == PEERS_NEEDED | MEASURED | {"details"}
    assert all(figures[key] is None for key in PEERS_NEEDED)
    assert all(math.isfinite(figures[key]) for key in MEASURED)


@pytest.mark.timeout(900)
def test_sides_that_are_compared_score_the_same(quick_run: tuple[dict[str, Any], str]) -> None:
    figures, _ = quick_run
    checks = figures["details"]["prefill"]["checks"]
    compared = [check for name, check in checks.items() if name.startswith("transformers")]
    assert len(compared) == 2
    for check in compared:
        assert check["same"]
        assert check["latents_active"] > 0


@pytest.mark.timeout(900)
def test_the_table_has_a_row_for_every_figure(quick_run: tuple[dict[str, Any], str]) -> None:
    _, printed = quick_run
    rows = [line.split() for line in printed.splitlines() if line.startswith(tuple(MEASURED))]
    assert {row[0] for row in rows} == MEASURED
    assert all(row[2] in (">=", "<=") and row[4] in ("yes", "NO") for row in rows)


@pytest.mark.timeout(900)
def test_streams_are_all_served(quick_run: tuple[dict[str, Any], str]) -> None:
    figures, _ = quick_run
    streams = figures["details"]["streams"]
    assert streams["many"]["least"] >= 1
    for lag in streams["lag"].values():
        assert lag["sent"] >= 8
        assert 0 <= lag["late"] <= lag["sent"]
