"""Decisions made by hand, and a log of some of them."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from monitor.audit_log.writer import AuditLog
from monitor.records import (
    Action,
    Alert,
    Attribution,
    ClusterResult,
    Coverage,
    Decision,
    LatentContribution,
    Mode,
    Overall,
    Provenance,
    Severity,
    Stage,
    Timings,
    TokenScores,
    UnscoredReason,
    Verdict,
)

PROVENANCE = Provenance(
    model="tiny",
    model_digest="a" * 64,
    tokenizer_fingerprint="b" * 64,
    bundle="tiny@1",
    bundle_digest="c" * 64,
    dtype="float32",
    backend="torch",
    server_version="0.1.0",
)


def make_decision(
    decision_id: str, verdict: Verdict = Verdict.PASS, score: float = -1.25
) -> Decision:
    attribution = Attribution(
        latents=(
            LatentContribution(
                sae="l1", latent_id=7, label="explosives", contribution=2.5, positions=(3, 4)
            ),
        ),
        dense=0.75,
        bias=-0.5,
        gate=0.0,
        window_start=2,
        window_stop=6,
    )
    clusters = (
        ClusterResult(
            cluster="weapons",
            fused=score,
            dense=0.5,
            sae=-0.125,
            verdict=verdict,
            severity=Severity.CRITICAL,
            stage=Stage.PROMPT,
            first_crossing=None if verdict is Verdict.PASS else 4,
            calibrated=True,
            benign_p=0.01,
            attribution=attribution,
        ),
        ClusterResult(
            cluster="fraud",
            fused=-2.0,
            dense=-1.5,
            sae=-3.0,
            verdict=Verdict.PASS,
            severity=Severity.WARNING,
            stage=Stage.PROMPT,
            first_crossing=None,
            calibrated=False,
            attribution=attribution,
        ),
    )
    alerts = (
        (
            Alert(
                decision_id=decision_id,
                cluster="weapons",
                severity=Severity.CRITICAL,
                stage=Stage.PROMPT,
                score=score,
                position=4,
            ),
        )
        if verdict is Verdict.ALERT
        else ()
    )
    return Decision(
        decision_id=decision_id,
        verdict=verdict,
        action=Action.ALLOW if verdict is Verdict.PASS else Action.FLAG,
        mode=Mode.MONITOR,
        policy="default",
        overall=Overall(fused=score, dense=0.5, sae=-0.125),
        clusters=clusters,
        rules=(),
        alerts=alerts,
        coverage=Coverage(received=9, scored=8, unscored={UnscoredReason.EXCLUDED: 1}),
        timings=Timings(forward_seconds=0.0125, total_seconds=0.02),
        provenance=PROVENANCE,
        tokens=(
            TokenScores(
                position=1,
                token_id=987654,
                text="SECRETWORD",
                stage=Stage.PROMPT,
                fused=(1.0, 1.0),
                dense=(1.0, 1.0),
                sae=(1.0, 1.0),
            ),
        ),
        session_id="session-1",
    )


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'audit.db'}"


@pytest.fixture
def decision() -> Callable[..., Decision]:
    return make_decision


@pytest.fixture
def written_log(url: str) -> str:
    """The URL of a closed log of ten decisions d1 to d10; d4 flags and d7 alerts."""

    async def write() -> None:
        log = AuditLog.open(url, clock=iter(range(1_700_000_000, 1_700_001_000)).__next__)
        log.start()
        for number in range(1, 11):
            verdict = {4: Verdict.FLAG, 7: Verdict.ALERT}.get(number, Verdict.PASS)
            await log.append_decision(
                make_decision(f"d{number}", verdict), input_digest=f"{number:064x}"
            )
        await log.close()

    asyncio.run(write())
    return url


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with half a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root and the mount permission")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
