"""One evaluation from start to finish.

files -> rows -> Scoring -> Scored -> figures beside baselines -> battery -> unseen -> result
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from monitor.evaluation.battery import run_battery
from monitor.evaluation.figures import (
    Asked,
    Mask,
    baselines_of,
    categories_of,
    cost_of,
    delays_of,
    positives_of,
    worst_of,
)
from monitor.evaluation.result import (
    DataFile,
    EvaluationResult,
    Question,
    Setting,
    SourceFigures,
    VerdictRate,
)
from monitor.evaluation.scored import Scored, Scoring
from monitor.evaluation.unseen import leave_one_source_out
from monitor.local import local_pipeline
from monitor.model_store import Progress
from monitor.policy import Policy
from monitor.served import Served
from monitor.traces import TraceStore
from sae_core.evaluation.data import EvaluationError, LabelledText, data_digest, read_labelled


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """What to evaluate, and how."""

    data: Sequence[Path]
    train: Sequence[Path] = ()
    """What TF-IDF is trained on; none leaves it out."""
    policy: str = "default"
    n_resamples: int = 1000
    seed: int = 0
    with_prompts: bool = False
    battery_rows: int = 200
    """Harmful rows of the robustness battery, half as many benign; 0 leaves it out."""
    unseen: bool = False
    """Whether to leave one source out."""
    work: Path
    """Where token logits and residual streams are kept for a rerun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """The result, and what a page shows besides: texts and where their scores came from."""

    result: EvaluationResult
    rows: Sequence[LabelledText]
    scored: Scored
    asked: Asked
    served: Served
    traces: Path
    with_prompts: bool


def evaluate(
    served: Served, plan: EvaluationPlan, progress: Progress = lambda what, share: None
) -> Evaluated:
    """Everything that the plan asks for.

    Raises:
        EvaluationError: a file or row that cannot be read (named), rows of one label only, or
            rows that cannot be left out by source.
        NotFoundError: the bundle has no such policy.
        InvalidRequestError: a text that cannot be scored, named by its place.
    """
    if plan.n_resamples < 1:
        raise EvaluationError(f"bootstrap is {plan.n_resamples}, expected at least 1")
    files = {path: read_labelled(path) for path in plan.data}
    train_files = {path: read_labelled(path) for path in plan.train}
    return asyncio.run(_evaluate(served, plan, files, train_files, progress))


Files = Mapping[Path, Sequence[LabelledText]]


async def _evaluate(
    served: Served, plan: EvaluationPlan, files: Files, train_files: Files, progress: Progress
) -> Evaluated:
    rows = [row for some in files.values() for row in some]
    train = [row for some in train_files.values() for row in some]
    harmful = positives_of(rows, None)
    if not harmful.any() or harmful.all():
        found = "no harmful" if not harmful.any() else "no benign"
        raise EvaluationError(f"found {found} row in {len(rows)}, expected both labels")
    policy = Policy(plan.policy, served.bundle.spec)
    async with local_pipeline(lambda: served) as pipeline:
        with TraceStore(plan.work / "traces", served.logits_key) as store:
            scoring = Scoring(
                served=served,
                pipeline=pipeline,
                store=store,
                policy=policy,
                with_prompts=plan.with_prompts,
            )
            scored = await scoring.score(rows, what="scoring the rows", progress=progress)
            battery = None
            if plan.battery_rows:
                battery = await run_battery(
                    scoring, rows, n_rows=plan.battery_rows, seed=plan.seed, progress=progress
                )
    progress("baselines and intervals", 0.0)
    asked = Asked(
        rows=rows,
        scored=scored,
        baselines=baselines_of(rows, train),
        spec=served.bundle.spec,
        n_resamples=plan.n_resamples,
        seed=plan.seed,
    )
    unseen = None
    clusters, absent = _clusters(asked, harmful, has_train=bool(train))
    kinds, sources = _kinds(asked, harmful), _sources(asked, harmful)
    if plan.unseen:
        unseen = leave_one_source_out(
            served,
            rows,
            plan.work,
            n_resamples=plan.n_resamples,
            seed=plan.seed,
            progress=progress,
        )
    result = EvaluationResult(
        setting=_setting(served, plan),
        data=[_data_file(path, some) for path, some in files.items()],
        train=[_data_file(path, some) for path, some in train_files.items()],
        absent=absent,
        overall=asked.question(harmful, ~harmful),
        clusters=clusters,
        kinds=kinds,
        sources=sources,
        verdicts=_verdicts(asked, harmful, claims_of(served, policy)),
        cost=cost_of(scored, asked.baselines),
        delay=delays_of(scored, harmful),
        battery=battery,
        worst=worst_of(rows, scored, served.bundle.spec),
        unseen=unseen,
    )
    return Evaluated(
        result=result,
        rows=rows,
        scored=scored,
        asked=asked,
        served=served,
        traces=plan.work / "traces",
        with_prompts=plan.with_prompts,
    )


def claims_of(served: Served, policy: Policy) -> dict[str, float]:
    """Verdict -> the false-positive rate that every cluster of the policy is calibrated to.

    Empty where one of them is not calibrated for what is served, or several claims differ.
    """
    found: set[tuple[tuple[str, float], ...]] = set()
    for index, cluster in enumerate(served.bundle.spec.clusters):
        if not policy.includes(index):
            continue
        if cluster.calibration is None or cluster.id in served.uncalibrated_reasons:
            return {}
        zones = served.bundle.calibration[cluster.calibration].get("policy")
        fused = zones.get("fused") if isinstance(zones, dict) else None
        if not isinstance(fused, dict):
            return {}
        found.add(tuple((zone, float(fused[zone]["target"])) for zone in ("flag", "alert")))
    return dict(found.pop()) if len(found) == 1 else {}


def _clusters(
    asked: Asked, harmful: Mask, *, has_train: bool
) -> tuple[dict[str, Question], dict[str, str]]:
    """Each cluster's figures, and why some are missing."""
    absent = {} if has_train else {"tfidf": "no --train file to train it on"}
    found = {}
    for index, cluster in enumerate(asked.spec.clusters):
        positives = positives_of(asked.rows, cluster)
        seen = ~np.isnan(asked.scored.scores[:, index, 0])
        if not (positives & seen).any() or not (~harmful & seen).any():
            wanted = ", ".join(categories_of(cluster))
            absent[f"cluster {cluster.id}"] = f"no harmful row of category {wanted} in its stages"
            continue
        found[cluster.id] = asked.question(positives, ~harmful, index)
    return found, absent


def _kinds(asked: Asked, harmful: Mask) -> dict[str, Question]:
    kinds = np.array([row.kind for row in asked.rows])
    found = {}
    for kind in ("prompt", "completion", "statement"):
        of_kind = kinds == kind
        if (of_kind & harmful).any() and (of_kind & ~harmful).any():
            found[kind] = asked.question(of_kind & harmful, of_kind & ~harmful)
    return found


def _sources(asked: Asked, harmful: Mask) -> dict[str, SourceFigures]:
    names = np.array([row.source for row in asked.rows])
    found = {}
    for source in sorted(set(names.tolist()) - {""}):
        own = names == source
        n_harmful = int((own & harmful).sum())
        found[source] = SourceFigures(
            n_harmful=n_harmful,
            n_benign=int((own & ~harmful).sum()),
            question=asked.question(own & harmful, ~harmful) if n_harmful else None,
            verdicts=[
                *asked.rates(f"{source}, harmful", own & harmful, {}),
                *asked.rates(f"{source}, benign", own & ~harmful, {}),
            ],
        )
    return found


def _verdicts(asked: Asked, harmful: Mask, claims: Mapping[str, float]) -> list[VerdictRate]:
    categories = np.array([row.category for row in asked.rows])
    found = [
        *asked.rates("harmful", harmful, {}),
        *asked.rates("benign", ~harmful, claims),
    ]
    for category in ("benign_hard", "benign_general"):
        found += asked.rates(category, ~harmful & (categories == category), claims)
    return found


def _setting(served: Served, plan: EvaluationPlan) -> Setting:
    p = served.provenance
    return Setting(
        bundle=p.bundle,
        bundle_digest=p.bundle_digest,
        model=p.model,
        model_digest=p.model_digest,
        dtype=p.dtype,
        backend=p.backend,
        policy=plan.policy,
        server_version=p.server_version,
        date=datetime.now(UTC).date().isoformat(),
        n_resamples=plan.n_resamples,
        seed=plan.seed,
        with_prompts=plan.with_prompts,
    )


def _data_file(path: Path, rows: Sequence[LabelledText]) -> DataFile:
    n_harmful = sum(row.is_harmful for row in rows)
    return DataFile(
        file=path.name,
        digest=data_digest(rows),
        n_harmful=n_harmful,
        n_benign=len(rows) - n_harmful,
    )
