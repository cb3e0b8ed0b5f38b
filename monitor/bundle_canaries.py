"""Writes a bundle's canaries: texts picked from labelled ones, and what they score here and now."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from monitor.bundle import load_unsealed
from monitor.bundle_spec import ClusterModel
from monitor.canaries import LEAST_FIRINGS, expectation_of, judge_canaries, n_held
from monitor.canary_runner import score_canaries
from monitor.canary_spec import CANARIES, EXPECTED, Canary, CanaryExpectation, write_expectation
from monitor.errors import BundleError
from monitor.local import local_pipeline
from monitor.model_store import Progress
from monitor.pipeline import Pipeline
from monitor.records import Decision, ScoreRequest, Verdict
from monitor.served import Served, calibration_facts
from monitor.traces import request_of
from sae_core.evaluation.data import LabelledText

MAX_CHARACTERS = 300
"""Of a text that is picked: every run costs its tokens."""
HARMFUL_EACH = 2
"""Canaries picked for each cluster: one odd text is not all that speaks for it."""
N_BENIGN = 4
CLEAR_MARGIN = 0.25
"""How far beyond its threshold a picked canary lies at least, in distances from flag to alert."""


class Measured(NamedTuple):
    """What the canaries gave, and what speaks against them; a line each."""

    expectation: CanaryExpectation
    problems: tuple[str, ...]
    """Canaries that do not get their verdict."""
    unwatched: tuple[str, ...]
    """Clusters that no canary has to raise."""


class Written(NamedTuple):
    """What was written, and what speaks against it; a line each."""

    written: tuple[str, ...]
    problems: tuple[str, ...]
    refused: bool = False
    """Whether the problems kept what the canaries gave from being written."""


async def measure_canaries(served: Served, pipeline: Pipeline) -> Measured:
    """Scores the bundle's canaries and judges their verdicts.

    Args:
        served: whose thresholds judge; the pipeline may run under others.

    Raises:
        BundleError: a canary that cannot be scored.
    """
    canaries = served.bundle.canaries
    try:
        scored = await score_canaries(served, pipeline.engine, pipeline.reader, canaries)
    except ExceptionGroup as group:
        raise BundleError(f"{CANARIES}: {group.exceptions[0]}") from group
    failed = [one for one in scored if one.failure]
    if failed:
        raise BundleError(f"{CANARIES}: {failed[0].canary.id}: {failed[0].failure}")
    facts = calibration_facts(served.bundle, served.provenance, served.plan.heads)
    today = datetime.now(UTC).date().isoformat()
    expectation = expectation_of(served, scored, {**facts, "date": today})
    # Only the verdicts: the scores are now what is expected.
    bare = served.with_canaries(canaries, None)
    problems = tuple(
        f"cluster {cluster}: {problem}"
        for cluster, report in judge_canaries(bare, scored).items()
        for problem in report.problems
    )
    raised = {canary.cluster for canary in canaries}
    unwatched = tuple(
        f"cluster {cluster.id}: no canary has to raise it"
        for cluster in served.bundle.spec.clusters
        if cluster.id not in raised
    )
    return Measured(expectation, problems, unwatched)


async def check_canaries(served: Served) -> tuple[str, ...]:
    """What speaks against the bundle's clusters on its canaries, a line each.

    Raises:
        BundleError: the engine had no time for a canary.
    """
    async with local_pipeline(lambda: served) as pipeline:
        try:
            scored = await score_canaries(
                served, pipeline.engine, pipeline.reader, served.bundle.canaries
            )
        except ExceptionGroup as group:
            raise BundleError(f"{CANARIES}: {group.exceptions[0]}") from group
    return tuple(
        f"cluster {cluster}: {problem}"
        for cluster, report in judge_canaries(served, scored).items()
        for problem in report.problems
    )


async def write_canaries(
    served: Served,
    rows: Sequence[LabelledText],
    *,
    force: bool = False,
    progress: Progress = lambda what, share: None,
) -> Written:
    """Writes canaries/expected.json, and before it canaries.jsonl where there is none.

    Args:
        rows: labelled texts to pick canaries from; none where the bundle has its own.
        force: write although some canary does not get its verdict.

    Raises:
        BundleError: there are both canaries and rows, no row will do, or a canary cannot be scored.
    """
    folder = served.bundle.folder
    if rows and served.bundle.canaries:
        raise BundleError(
            f"{CANARIES}: found {len(served.bundle.canaries)} canaries in {folder}, expected none "
            "where they are to be picked"
        )
    written: list[str] = []
    async with local_pipeline(lambda: served) as pipeline:
        if rows:
            picked = await _pick(pipeline, rows, progress)
            text = "".join(_line(canary) for canary in picked)
            (folder / CANARIES).write_text(text, encoding="utf-8")
            written.append(f"{CANARIES}: {len(picked)} canaries picked; read them")
            found = load_unsealed(folder)
            served = served.with_canaries(found.canaries, None)
        if not served.bundle.canaries:
            return Written((), (f"{CANARIES}: none, so nothing proves that alerts would come",))
        measured = await measure_canaries(served, pipeline)
    problems = (*measured.problems, *measured.unwatched)
    if measured.problems and not force:
        refused = f"{EXPECTED} was not written; --force writes it all the same"
        return Written(tuple(written), (*problems, refused), refused=True)
    write_expectation(folder, measured.expectation)
    held, every = n_held(measured.expectation)
    written.append(
        f"{EXPECTED}: {len(served.bundle.canaries)} canaries; {held} of {every} registered latents "
        f"fire on {LEAST_FIRINGS} of their tokens or more and are held to that"
    )
    return Written(tuple(written), problems)


async def _pick(
    pipeline: Pipeline, rows: Sequence[LabelledText], progress: Progress
) -> tuple[Canary, ...]:
    """Short texts whose verdict is the label's, and clear; the clearest first."""
    short = [row for row in rows if len(row.text) <= MAX_CHARACTERS]
    decisions: list[Decision] = []
    for index, row in enumerate(short):
        decisions.append(await pipeline.score(request_of(row)))
        progress("scoring texts to pick canaries from", (index + 1) / len(short))
    requests = [request_of(row) for row in short]
    clusters = pipeline.served.bundle.spec.clusters
    picked: list[tuple[ScoreRequest, Verdict, str | None]] = []
    used: set[int] = set()
    for place, cluster in enumerate(clusters):
        levels = sorted(
            (
                (_level(cluster, decision.clusters[place].fused), index)
                for index, (row, decision) in enumerate(zip(short, decisions, strict=True))
                if row.is_harmful
                and requests[index].stage in cluster.stages
                and _is_of(cluster, row)
            ),
            reverse=True,
        )
        clear = [(level, i) for level, i in levels if level >= CLEAR_MARGIN and i not in used]
        for level, index in clear[:HARMFUL_EACH]:
            used.add(index)
            verdict = Verdict.ALERT if level >= 1 + CLEAR_MARGIN else Verdict.FLAG
            picked.append((requests[index], verdict, cluster.id))
    calm = sorted(
        (decision.overall.fused, index)
        for index, (row, decision) in enumerate(zip(short, decisions, strict=True))
        if not row.is_harmful and decision.overall.fused <= -CLEAR_MARGIN
    )
    # Spread over the scores: not only texts that could not be calmer.
    step = max(1, len(calm) // N_BENIGN)
    picked += [(requests[index], Verdict.PASS, None) for _, index in calm[::step][:N_BENIGN]]
    if not picked:
        raise BundleError(
            f"{CANARIES}: found no text of at most {MAX_CHARACTERS} characters with a clear "
            f"verdict among {len(rows)}, expected some"
        )
    return tuple(
        Canary(
            id=f"canary-{number:02d}",
            text=request.text or "",
            stage=request.stage,
            verdict=verdict,
            cluster=cluster_id,
        )
        for number, (request, verdict, cluster_id) in enumerate(picked, 1)
    )


def _level(cluster: ClusterModel, score: float) -> float:
    """On the policy's scale, 0 at flag and 1 at alert."""
    limits = cluster.thresholds
    return (score - limits.flag) / (limits.alert - limits.flag)


def _is_of(cluster: ClusterModel, row: LabelledText) -> bool:
    categories = cluster.categories or (cluster.id,)
    return "*" in categories or row.category in categories


def _line(canary: Canary) -> str:
    content = canary.model_dump(mode="json", exclude_none=True)
    return json.dumps(content, ensure_ascii=False) + "\n"
