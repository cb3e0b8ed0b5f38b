from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_demo_runs_the_main_job_and_stops_what_it_started(tiny_bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "monitor", "demo", "--bundle", str(tiny_bundle)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "server ready in" in done.stdout
    assert done.stdout.count("verdict PASS") == 5
    assert 'saemonitor_tokens_scored_total{model="tiny/gemma3",stage="completion"}' in done.stdout
    assert "5 conversations, 0 alerts" in done.stdout
    assert "server stopped" in done.stdout


def test_a_demo_whose_server_cannot_start_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "monitor", "demo", "--bundle", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "found no folder" in done.stderr
    assert "Traceback" not in done.stderr
