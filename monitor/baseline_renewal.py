"""Another baseline under the same thresholds: what live traffic is compared with from now on.

The claim stays that of the calibration, as do the rates that live flags and alerts are held to;
what changes is how often latents fire, how well the SAEs fit, and how benign texts score.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from monitor.bundle import Bundle
from monitor.bundle_copy import sealed_copy
from monitor.errors import BundleError
from monitor.judged import judge
from monitor.model_store import Progress
from monitor.pipeline import Pipeline
from monitor.policy import FUSED, Policy
from monitor.served import Served, calibration_facts
from monitor.traces import TraceStore, request_of, trace_texts
from sae_core.baseline import Baseline
from sae_core.calibration import CalibrationError
from sae_core.calibration_artefact import benign_table
from sae_core.evaluation.data import LabelledText, data_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewedBaseline:
    """A baseline, and the artefact that it belongs in."""

    path: str
    """The artefact's, in the bundle."""
    content: dict[str, Any]
    """As `Baseline.to_json`, and `scores` by cluster, `data`, `data_digest`, `date`."""


def check_benign(rows: Sequence[LabelledText]) -> None:
    """Raises CalibrationError naming the first harmful row."""
    for row in rows:
        if row.is_harmful:
            raise CalibrationError(f"{row.place}: found a harmful row, expected benign ones only")


async def renew_baseline(
    served: Served,
    pipeline: Pipeline,
    rows: Sequence[LabelledText],
    store: TraceStore,
    *,
    data: str = "",
    progress: Progress = lambda what, share: None,
) -> RenewedBaseline:
    """What benign rows do to the SAEs and how they score, by the code that serves.

    Args:
        data: what the rows are called in the artefact.

    Raises:
        BundleError: no calibration artefact was made with what is served.
        CalibrationError: harmful rows, too few rows, or no latent is registered.
        InvalidRequestError: a text that cannot be scored, named by its place.
    """
    check_benign(rows)
    path, artefact = _artefact_of(served)
    policy = Policy(str(artefact.get("policy_name", "default")), served.bundle.spec)
    ids = [cluster.id for cluster in served.bundle.spec.clusters]
    vitals = []
    scores: dict[str, list[float]] = defaultdict(list)
    async for _, trace in trace_texts(
        pipeline,
        [request_of(row) for row in rows],
        store,
        places=[row.place for row in rows],
        with_vitals=True,
        what="scoring benign texts",
        progress=progress,
    ):
        assert trace.vitals is not None
        vitals.append(trace.vitals)
        found = judge(served, policy, trace).scores[:, FUSED]
        for cluster, score in zip(ids, found.tolist(), strict=True):
            if np.isfinite(score) and cluster in artefact["clusters"]:
                scores[cluster].append(score)
    baseline = Baseline.of(served.plan.heads.latents, vitals)
    return RenewedBaseline(
        path=path,
        content={
            **baseline.to_json(),
            "scores": {cluster: benign_table(np.array(some)) for cluster, some in scores.items()},
            "data": data,
            "data_digest": data_digest(rows),
            "date": datetime.now(UTC).date().isoformat(),
        },
    )


def write_renewed(bundle: Bundle, found: RenewedBaseline, out: Path) -> str:
    """A sealed copy of the bundle with this baseline; returns its digest.

    Raises:
        BundleError: `out` is there already, or the copy is not a valid bundle.
    """

    def edit(part: Path) -> None:
        artefact = {**bundle.calibration[found.path], "baseline": found.content}
        (part / found.path).write_text(json.dumps(artefact, indent=1) + "\n")

    return sealed_copy(bundle, out, edit)


def _artefact_of(served: Served) -> tuple[str, Mapping[str, Any]]:
    """The first artefact that was made with what is served, as the server looks for a baseline."""
    facts = calibration_facts(served.bundle, served.provenance, served.plan.heads)
    paths = [c.calibration for c in served.bundle.spec.clusters if c.calibration is not None]
    why = "found no calibration artefact"
    for path in dict.fromkeys(paths):
        artefact: Mapping[str, Any] = served.bundle.calibration[path]
        differing = [key for key, found in facts.items() if artefact.get(key) != found]
        if not differing:
            return path, artefact
        key = differing[0]
        why = f"{path} was made with {key} {artefact.get(key)!s:.40}, served is {facts[key]!s:.40}"
    raise BundleError(
        f"bundle {served.bundle.label}: {why}; expected one made with what is served, for the "
        "baseline to belong to (`sae-monitor calibrate` makes both)"
    )
