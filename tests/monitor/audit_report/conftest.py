"""A log of hostile texts at level content, and the page that is made of it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from monitor.audit_log.record import Asked, Observed
from monitor.audit_log.sealing import KeyRing, new_key
from monitor.audit_log.token_latents import TokenLatents
from monitor.audit_log.trace import TokenTrace
from monitor.audit_log.writer import AuditLog
from monitor.bundle import Bundle
from monitor.cli.app import app
from monitor.records import (
    Attribution,
    AuditLevel,
    Decision,
    LatentContribution,
    Verdict,
)
from monitor.work_queue import Priority
from tests.monitor.what_if.conftest import (
    FUSION,
    Case,
    random_cases,
    spec_content,
    write_bundle,
)

SCRIPT = "<script>document.title='owned'</script>"
IMAGE = "<img src=x onerror=alert(1)>"
OVERRIDE = "\u202egnp.exe\u2066"
TEXTS = (
    *("How", " do", " I", " ", SCRIPT, " build", " a", "\n", IMAGE, OVERRIDE, "</code>", '" x="'),
    *(
        "{{7*7}}",
        "&lt;b&gt;",
        "日本語",
        " مرحبا",
        "\x00\x1b[31m",
        "</script>",
        "javascript:alert(1)",
    ),
)
LABEL = f"tokens: {SCRIPT} {OVERRIDE}"
KEYS = new_key("2026")
FIRST_SECOND = 1_763_900_000
STEP_SECONDS = 3600


@dataclasses.dataclass(frozen=True)
class Log:
    """Where everything is."""

    url: str
    bundle: Bundle
    challenger: Bundle
    keys_file: Path
    cases: list[Case]
    decisions: list[Decision]
    older: Decision
    """The last but one that is explained; without the latents of its tokens."""
    newer: Decision
    """The last one that is explained."""

    def of(self, verdict: Verdict) -> list[Decision]:
        """The decisions of one verdict, oldest first."""
        return [d for d in self.decisions if d.verdict is verdict]


def _explained(decision: Decision) -> Decision:
    """With latents named for every cluster that alerts."""
    clusters = []
    for index, result in enumerate(decision.clusters):
        why = Attribution(
            latents=(
                LatentContribution(
                    sae="l1", latent_id=index, label=LABEL, contribution=2.5, positions=(0, 4)
                ),
                LatentContribution(
                    sae="l1", latent_id=77, label="", contribution=-0.25, positions=(1,)
                ),
            ),
            dense=0.5,
            bias=-0.25,
            gate=0.0,
            window_start=0,
            window_stop=5,
        )
        alerts = result.verdict is Verdict.ALERT
        clusters.append(dataclasses.replace(result, attribution=why if alerts else None))
    return dataclasses.replace(
        decision, clusters=tuple(clusters), session_id=decision.session_id and SCRIPT
    )


def _latents(case: Case, decision: Decision) -> dict[str, TokenLatents]:
    """Of each token the share of the SAE, as one latent of the cluster, and a little of another."""
    shares = FUSION["sae"] * case.logits[:, :, 2].astype(np.float64)
    return {
        result.cluster: TokenLatents(
            latents=(("l1", index), ("l1", 77)),
            positions=np.arange(len(shares)),
            contributions=np.stack((shares[:, index], np.full(len(shares), -0.25)), axis=1),
        )
        for index, result in enumerate(decision.clusters)
    }


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    """100 decisions, hours apart; the last of all is stored without its texts."""
    folder = tmp_path_factory.mktemp("report")
    bundle = write_bundle(folder / "bundle", spec_content())
    content = spec_content(version=2)
    content["clusters"][0]["thresholds"] = {"flag": 0.75, "alert": 1.25, "clear": 0.5}
    challenger = write_bundle(folder / "challenger", content)
    keys_file = folder / "keys"
    keys_file.write_text(KEYS)
    url = f"sqlite:///{folder / 'audit.db'}"
    cases = [case for case in random_cases(bundle.spec, 300, seed=5) if len(case.stages) > 14][:100]
    decisions = [_explained(case.decision(bundle)) for case in cases]
    explained = [d for d in decisions if any(c.attribution for c in d.clusters)]
    older = explained[-2]  # as a record of before, without the latents of its tokens

    async def write() -> None:
        seconds = iter(range(FIRST_SECOND, 2**40, STEP_SECONDS))
        for level, part in (("content", slice(0, 99)), ("scores", slice(99, 100))):
            audit_log = AuditLog.open(
                url,
                level=AuditLevel(level),
                keys=KeyRing.parse(KEYS, "test"),
                clock=lambda: float(next(seconds)),
            )
            audit_log.start()
            for case, decision in zip(cases[part], decisions[part], strict=True):
                trace = case.evidence(bundle.spec).trace()
                trace.logits[~case.is_scored] = np.nan
                n = len(case.stages)
                await audit_log.append_decision(
                    decision,
                    input_digest="e" * 64,
                    asked=Asked(stage="chat", priority=Priority.PROMPT),
                    observed=Observed(
                        trace=TokenTrace(
                            clusters=trace.clusters, stages=trace.stages, logits=trace.logits
                        ),
                        token_ids=list(range(n)),
                        latents={} if decision is older else _latents(case, decision),
                        texts=[TEXTS[i % len(TEXTS)] for i in range(n)],
                    ),
                )
            await audit_log.close()

    asyncio.run(write())
    return Log(url, bundle, challenger, keys_file, cases, decisions, older, explained[-1])


Run = Callable[..., tuple[int, str]]


def run_report(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)], env={"COLUMNS": "200"})
    return result.exit_code, result.output


@pytest.fixture(scope="session")
def run() -> Run:
    """`sae-monitor report`: its exit code and output."""
    return run_report


@pytest.fixture(scope="session")
def page(log: Log, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole report, with keys and a challenger."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    code, output = run_report(
        *("--audit", log.url, "--out", path, "--bundle", log.bundle.folder),
        *("--compare-bundle", log.challenger.folder, "--keys-file", log.keys_file),
        *("--decision", log.older.decision_id, "--decision", log.newer.decision_id),
        *("--decision", log.decisions[-1].decision_id),
    )
    assert code == 0, output
    return path
