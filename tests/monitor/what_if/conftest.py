"""A bundle of every aggregate, and a log of random decisions that its own evidence made."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from safetensors.numpy import save_file

from monitor.audit_log.record import Observed
from monitor.audit_log.trace import TokenTrace
from monitor.audit_log.writer import AuditLog
from monitor.bundle import Bundle, load_bundle
from monitor.bundle_spec import BundleSpec
from monitor.evidence import ClusterPlan, Evidence, aggregate_specs
from monitor.policy import Policy
from monitor.records import (
    Action,
    AuditLevel,
    Decision,
    Mode,
    Provenance,
    Stage,
    Timings,
    UnscoredReason,
    Verdict,
)
from sae_core.aggregation import Aggregator

FUSION = {"sae": 0.75, "dense": 0.5, "bias": -0.25}
AGGREGATES: dict[str, dict[str, Any]] = {
    "rolling": {"kind": "max_rolling_mean", "window": 4},
    "mean": {"kind": "mean", "min_evidence_tokens": 0},
    "highest": {"kind": "max", "min_evidence_tokens": 2, "evidence_floor": 0.5},
    "ema": {"kind": "ema", "alpha": 0.25, "min_evidence_tokens": 1},
    "top": {"kind": "top_k_mean", "k": 3, "min_evidence_tokens": 0},
    "whole": {"kind": "max_window_mean", "window": 6, "min_evidence_tokens": 1},
    "ranked": {"kind": "k_of_window", "k": 2, "window": 5},
}
LIMITS = {"flag": 1.0, "alert": 1.75, "clear": 0.5}


def spec_content(**changes: Any) -> dict[str, Any]:
    return {
        "name": "many",
        "version": 1,
        "model": {"id": "tiny/model"},
        "saes": {"l1": {"path": "saes/l1", "hook_point": "blocks.1.hook_resid_post"}},
        "dense_heads": {"head": {"hook_point": "blocks.1.hook_resid_post"}},
        "clusters": [
            {
                "id": name,
                "title": name,
                "severity": "warning",
                "stages": ["prompt"] if name == "top" else ["prompt", "completion"],
                "latents": [{"sae": "l1", "id": index, "weight": 1.0, "label": f"latent {index}"}],
                "dense_head": "head",
                "fusion": FUSION,
                "aggregate": aggregate,
                "thresholds": LIMITS,
            }
            for index, (name, aggregate) in enumerate(AGGREGATES.items())
        ],
        "rules": [
            {
                "id": "both",
                "severity": "critical",
                "all": [{"cluster": "mean", "above": -0.25}, {"cluster": "ema", "below": "flag"}],
            }
        ],
        "policies": {"default": {}, "narrow": {"clusters": ["rolling", "ranked"]}},
        **changes,
    }


def write_bundle(folder: Path, content: Mapping[str, Any], head: float = 1.0) -> Bundle:
    (folder / "saes" / "l1").mkdir(parents=True)
    (folder / "saes" / "l1" / "weights").write_bytes(b"as they are")
    (folder / "bundle.yaml").write_text(yaml.safe_dump(dict(content)))
    save_file(
        {
            "dense/head/weight": np.full(4, head, np.float32),
            "dense/head/bias": np.array(0.0, np.float32),
        },
        folder / "heads.safetensors",
    )
    return load_bundle(folder)


@dataclasses.dataclass(frozen=True)
class Case:
    """One decision as it was scored, before anything was rounded."""

    decision_id: str
    policy: str
    stages: list[Stage | None]
    is_scored: NDArray[np.bool_]
    logits: NDArray[np.float32]
    session_id: str = ""

    def evidence(self, spec: BundleSpec) -> Evidence:
        """The server's own, over these logits under any bundle."""
        plan = ClusterPlan(
            spec=spec,
            heads=None,  # type: ignore[arg-type]  # only attribution asks it
            aggregator=Aggregator(aggregate_specs(spec)),
            calibrated=(False,) * len(spec.clusters),
            benign_p=lambda index, score: None,
        )
        policy = Policy(self.policy, spec)
        evidence = Evidence(plan, policy, rules_each_token=bool(self.session_id))
        logits = self.logits.copy()
        for index, cluster in enumerate(spec.clusters):
            fusion = cluster.fusion
            dense, sae = logits[:, index, 1], logits[:, index, 2]
            logits[:, index, 0] = fusion.bias + fusion.sae * sae + fusion.dense * dense
        start = 0
        for is_scored, run in groupby(self.is_scored.tolist()):
            rows = slice(start, start + len(list(run)))
            ids, stages = list(range(rows.start, rows.stop)), self.stages[rows]
            if is_scored:
                evidence.add(ids, stages, logits[rows], np.zeros((len(ids), 0), np.float32))
            else:
                evidence.skip(ids, stages, UnscoredReason.DEADLINE)
            start = rows.stop
        evidence.close()
        return evidence

    def alerts(self, spec: BundleSpec) -> tuple[Verdict, set[str], set[str]]:
        """The verdict, the clusters that alert, and the rules that hold."""
        evidence = self.evidence(spec)
        judgement, _ = evidence.judge()
        alerted = {r.cluster for r in evidence.results() if r.verdict is Verdict.ALERT}
        return judgement.verdict, alerted, {rule.rule for rule in judgement.rules}

    def decision(self, bundle: Bundle) -> Decision:
        evidence = self.evidence(bundle.spec)
        judgement, _ = evidence.judge()
        return Decision(
            decision_id=self.decision_id,
            verdict=judgement.verdict,
            action=Action.ALLOW,
            mode=Mode.MONITOR,
            policy=self.policy,
            overall=judgement.overall,
            clusters=evidence.results(),
            rules=judgement.rules,
            alerts=(),
            coverage=evidence.coverage(),
            timings=Timings(total_seconds=0.01),
            provenance=Provenance(
                model="tiny/model",
                model_digest="a" * 64,
                tokenizer_fingerprint="b" * 64,
                bundle=bundle.label,
                bundle_digest=bundle.digest,
                dtype="float32",
                backend="torch",
                server_version="0.1.0",
            ),
            session_id=self.session_id,
        )


def random_cases(spec: BundleSpec, n: int, seed: int = 0) -> list[Case]:
    chance = np.random.default_rng(seed)
    cases = []
    for number in range(n):
        n_tokens = int(chance.integers(0 if number % 50 == 0 else 1, 30))
        logits = chance.normal(chance.normal(-1, 1), 1.5, (n_tokens, len(spec.clusters), 3))
        stages = chance.choice([None, Stage.PROMPT, Stage.COMPLETION], n_tokens, p=[0.1, 0.6, 0.3])
        case = Case(
            decision_id=f"d{number}",
            policy="narrow" if number % 4 == 0 else "default",
            session_id=f"s{number}" if number % 3 == 0 else "",
            stages=list(stages),
            is_scored=chance.random(n_tokens) < 0.95,
            logits=logits.astype(np.float32),
        )
        for index, cluster in enumerate(spec.clusters):
            fusion = cluster.fusion
            case.logits[:, index, 0] = (
                fusion.bias
                + fusion.sae * case.logits[:, index, 2]
                + fusion.dense * case.logits[:, index, 1]
            )
        cases.append(case)
    return cases


def write_log(url: str, bundle: Bundle, cases: list[Case], level: str = "scores") -> None:
    async def write() -> None:
        log = AuditLog.open(
            url, level=AuditLevel(level), clock=iter(range(1_700_000_000, 1_800_000_000)).__next__
        )
        log.start()
        for case in cases:
            trace = case.evidence(bundle.spec).trace()
            trace.logits[~case.is_scored] = np.nan
            observed = Observed(
                trace=TokenTrace(clusters=trace.clusters, stages=trace.stages, logits=trace.logits)
            )
            await log.append_decision(
                case.decision(bundle), input_digest="e" * 64, observed=observed
            )
        await log.close()

    asyncio.run(write())


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("many") / "bundle", spec_content())


@pytest.fixture(scope="session")
def cases(many: Bundle) -> list[Case]:
    return random_cases(many.spec, 150)


@pytest.fixture(scope="session")
def log(many: Bundle, cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> str:
    """150 decisions; do not write to it."""
    url = f"sqlite:///{tmp_path_factory.mktemp('log') / 'audit.db'}"
    write_log(url, many, cases)
    return url


@pytest.fixture(scope="session")
def exported(log: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as `audit export` writes it."""
    pytest.importorskip("pyarrow")
    from monitor.audit_log.export import export
    from monitor.audit_log.query import Filter

    path = tmp_path_factory.mktemp("export") / "decisions.parquet"
    export(log, path, Filter())
    return path
