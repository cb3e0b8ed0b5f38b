"""Thresholds of a bundle from benign texts, through the code that serves.

    benign rows -> traces -> running scores -> thresholds -> the policy's own verdicts -> artefact

The claim is the policy's: what share of benign texts any cluster (or rule) raises. Thresholds are
found from the largest running score of each cluster, then every text is judged again under them;
where a rule raises more than the clusters do, the claim is withheld.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from monitor.baseline_renewal import check_benign
from monitor.bundle import Bundle
from monitor.bundle_canaries import Measured, measure_canaries
from monitor.bundle_copy import sealed_copy
from monitor.bundle_spec import BundleSpec, SoloThreshold, SoloThresholds, Thresholds, parse_spec
from monitor.canary_spec import write_expectation
from monitor.errors import BundleError
from monitor.judged import judge
from monitor.model_store import Progress
from monitor.pipeline import Pipeline
from monitor.policy import DENSE, FUSED, SAE, Policy
from monitor.records import Verdict
from monitor.served import Served, calibration_facts
from monitor.traces import TraceStore, request_of, trace_texts
from monitor.yaml_edit import SPEC, Edit, find, says, set_key, unshared, value_of, with_edits
from sae_core.baseline import LEAST_TEXTS, Baseline
from sae_core.calibration import (
    CONFIDENCE,
    CalibrationError,
    Source,
    SourceCalibration,
    calibrate_source,
    held_out_counts,
    length_buckets,
    split_texts,
    upper_bound,
)
from sae_core.calibration_artefact import calibration_artefact
from sae_core.evaluation.data import LabelledText, data_digest
from sae_core.vitals import TextVitals

ARTEFACT = "calibration/default.json"
_COLUMNS: dict[Source, int] = {"fused": FUSED, "dense": DENSE, "sae": SAE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What the policy's false-positive rate on benign texts is to stay below."""

    flag: float = 0.05
    """Of texts flagged or alerted."""
    alert: float = 0.01
    confidence: float = CONFIDENCE
    escalate_budget: float | None = None
    """Of texts flagged and not alerted, which somebody or something slower has to look at."""

    def __post_init__(self) -> None:
        for name in ("flag", "alert", "confidence", "escalate_budget"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise CalibrationError(f"{name} is {value}, expected a share between 0 and 1")
        if not self.alert < self.flag:
            raise CalibrationError(
                f"alert target is {self.alert}, expected below the flag target {self.flag}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """New thresholds, and the evidence for them."""

    spec: BundleSpec
    """The bundle's with the new thresholds."""
    clusters: tuple[str, ...]
    """Those that the policy looks at, and so were calibrated."""
    artefact: dict[str, Any]
    canaries: Measured | None = None
    """What the bundle's canaries give, judged under the new thresholds; None where it has none."""


async def calibrate(
    served: Served,
    pipeline: Pipeline,
    rows: Sequence[LabelledText],
    store: TraceStore,
    *,
    targets: Targets,
    policy: str = "default",
    data: str = "",
    seed: int = 0,
    progress: Progress = lambda what, share: None,
) -> Calibration:
    """Thresholds of every cluster that the policy looks at, from benign rows.

    Args:
        data: what the rows are called in the artefact.
        seed: of the folds in which the thresholds are tried on texts they were not chosen on.

    Raises:
        CalibrationError: harmful rows, too few rows, or a cluster that looks at none of them.
        NotFoundError: the bundle has no such policy.
        InvalidRequestError: a text that cannot be scored, named by its place.
    """
    check_benign(rows)
    judging = Policy(policy, served.bundle.spec)
    included = [i for i in range(served.plan.n_clusters) if judging.includes(i)]
    requests = [request_of(row) for row in rows]
    places = [row.place for row in rows]
    peaks = np.empty((len(rows), served.plan.n_clusters, 3))
    n_tokens = np.empty(len(rows), np.int64)
    vitals: list[TextVitals] = []
    async for index, trace in trace_texts(
        pipeline,
        requests,
        store,
        places=places,
        with_vitals=True,
        what="scoring benign texts",
        progress=progress,
    ):
        assert trace.vitals is not None
        vitals.append(trace.vitals)
        judged = judge(served, judging, trace)
        peaks[index], n_tokens[index] = judged.peaks, judged.n_scored
    peaks = peaks[:, included]
    buckets = length_buckets(n_tokens)
    clusters = [served.bundle.spec.clusters[i] for i in included]
    floors = np.array(
        [
            c.aggregate.evidence_floor if c.aggregate.min_evidence_tokens else -np.inf
            for c in clusters
        ]
    )
    known = {
        source: _known_scores(peaks[:, :, column], clusters, rows)
        for source, column in _COLUMNS.items()
    }

    def of(source: Source, chosen: NDArray[np.int64]) -> SourceCalibration:
        return calibrate_source(
            known[source][chosen],
            flag_target=targets.flag,
            alert_target=targets.alert,
            confidence=targets.confidence,
            buckets=buckets[chosen],
            escalate_budget=targets.escalate_budget if source == "fused" else None,
            least_flag=floors if source == "fused" else None,
        )

    everything = np.arange(len(rows))
    found = {source: of(source, everything) for source in _COLUMNS}
    spec = _with_thresholds(served.bundle.spec, [c.id for c in clusters], found)
    facts: dict[str, Any] = {
        "model": served.provenance.model,
        **calibration_facts(served.bundle, served.provenance, served.plan.heads),
        "hook_points": list(served.hook_points),
        "policy_name": policy,
        "data": data,
        "data_digest": data_digest(rows),
        "n": len(rows),
        "n_tokens": int(n_tokens.sum()),
        "date": datetime.now(UTC).date().isoformat(),
        "server_version": served.provenance.server_version,
    }
    artefact = calibration_artefact(
        [c.id for c in clusters],
        peaks[:, :, FUSED],
        found,
        facts,
        aggregates=[c.aggregate.model_dump() for c in clusters],
        buckets=buckets,
        confidence=targets.confidence,
    )
    flagged, alerted = held_out_counts(known["fused"], lambda rest: of("fused", rest), seed=seed)
    artefact["held_out"] = {
        "flag": _counted(flagged, len(rows), targets.confidence),
        "alert": _counted(alerted, len(rows), targets.confidence),
    }
    changed = _serving(served, spec)
    verdicts = [
        judge(changed, changed.policies[policy], trace).verdict
        async for _, trace in trace_texts(pipeline, requests, store, what="judging again")
    ]
    level = split_texts(len(rows))[1]
    _add_verdicts(artefact, [verdicts[i] for i in level], targets)
    latents = served.plan.heads.latents
    if latents and len(rows) >= LEAST_TEXTS:
        artefact["baseline"] = Baseline.of(latents, vitals).to_json()
    return Calibration(
        spec=spec,
        clusters=tuple(c.id for c in clusters),
        artefact=artefact,
        canaries=await measure_canaries(changed, pipeline) if served.bundle.canaries else None,
    )


def write_calibrated(bundle: Bundle, found: Calibration, out: Path) -> str:
    """A sealed copy of the bundle with the new thresholds; returns its digest.

    Raises:
        BundleError: `out` is there already, the bundle's YAML cannot be edited in place, or the
            copy is not a valid bundle.
    """

    def edit(part: Path) -> None:
        text = _edited((bundle.folder / SPEC).read_bytes().decode("utf-8"), found)
        (part / SPEC).write_bytes(text.encode("utf-8"))
        for path in bundle.calibration.keys() - _artefacts(found.spec):
            (part / path).unlink(missing_ok=True)
        (part / ARTEFACT).parent.mkdir(exist_ok=True)
        (part / ARTEFACT).write_text(json.dumps(found.artefact, indent=1) + "\n")
        if found.canaries is not None:
            write_expectation(part, found.canaries.expectation)

    return sealed_copy(bundle, out, edit)


def _known_scores(
    scores: NDArray[np.float64], clusters: Sequence[Any], rows: Sequence[LabelledText]
) -> NDArray[np.float64]:
    """Texts that a cluster does not look at get its lowest score: they never raise it."""
    filled = scores.copy()
    for index, cluster in enumerate(clusters):
        missing = np.isnan(scores[:, index])
        if missing.all():
            stages = " or ".join(stage.value for stage in cluster.stages)
            raise CalibrationError(
                f"cluster {cluster.id}: found no {stages} text among {len(rows)} benign rows, "
                "expected some"
            )
        filled[missing, index] = scores[~missing, index].min()
    return filled


def _with_thresholds(
    spec: BundleSpec, ids: Sequence[str], found: dict[Source, SourceCalibration]
) -> BundleSpec:
    clusters = []
    for cluster in spec.clusters:
        if cluster.id not in ids:
            clusters.append(cluster)
            continue
        i = ids.index(cluster.id)
        fused = found["fused"]
        there: tuple[tuple[Source, bool], ...] = (
            ("dense", cluster.dense_head is not None),
            ("sae", bool(cluster.latents)),
        )
        solo = {
            source: SoloThreshold(
                flag=float(found[source].flag.thresholds[i]),
                alert=float(found[source].alert.thresholds[i]),
            )
            for source, is_there in there
            if is_there
        }
        clusters.append(
            cluster.model_copy(
                update={
                    "thresholds": Thresholds(
                        flag=float(fused.flag.thresholds[i]),
                        alert=float(fused.alert.thresholds[i]),
                        clear=float(fused.clear[i]),
                    ),
                    "solo": SoloThresholds(dense=solo.get("dense"), sae=solo.get("sae")),
                    "calibration": ARTEFACT,
                }
            )
        )
    return spec.model_copy(update={"clusters": tuple(clusters)})


def _serving(served: Served, spec: BundleSpec) -> Served:
    """The same model under other thresholds."""
    return replace(
        served,
        bundle=replace(served.bundle, spec=spec),
        plan=replace(served.plan, spec=spec),
        policies={name: Policy(name, spec) for name in spec.policies},
    )


def _counted(n_raised: int, n: int, confidence: float) -> dict[str, Any]:
    return {
        "n_benign": n,
        "n_false_positive": n_raised,
        "achieved": n_raised / n,
        "upper_bound": upper_bound(n_raised, n, confidence),
    }


def _add_verdicts(artefact: dict[str, Any], verdicts: Sequence[Verdict], targets: Targets) -> None:
    """The policy's own counts; they take the claim back where rules raise too much."""
    n = len(verdicts)
    counts = {
        "flag": sum(v is not Verdict.PASS for v in verdicts),
        "alert": sum(v is Verdict.ALERT for v in verdicts),
    }
    artefact["verdicts"] = {
        zone: _counted(count, n, targets.confidence) for zone, count in counts.items()
    }
    for zone, target in (("flag", targets.flag), ("alert", targets.alert)):
        bound = artefact["verdicts"][zone]["upper_bound"]
        if artefact["calibrated"] and bound >= target:
            artefact["calibrated"] = False
            artefact["reason"] = (
                f"with its rules the policy raises {zone} on {counts[zone]} of {n} benign texts, "
                f"bound {bound:.2%}, target {target:.2%}"
            )


def _artefacts(spec: BundleSpec) -> set[str]:
    return {c.calibration for c in spec.clusters if c.calibration is not None}


def _edited(text: str, found: Calibration) -> str:
    """bundle.yaml with the new numbers in it, otherwise the same."""
    expected = unshared(yaml.safe_load(text))
    nodes = value_of(yaml.compose(text, Loader=yaml.SafeLoader), "clusters")
    edits: list[Edit] = []
    for index, cluster in enumerate(found.spec.clusters):
        if cluster.id not in found.clusters:
            continue
        node, said = nodes.value[index], expected["clusters"][index]
        for name, value in cluster.thresholds.model_dump().items():
            edits.append(
                set_key(text, value_of(node, "thresholds"), name, [_number(value)], "flag")
            )
            said["thresholds"][name] = value
        solo = cluster.solo.model_dump(exclude_none=True)
        written = [
            f"{source}: {{flag: {_number(v['flag'])}, alert: {_number(v['alert'])}}}"
            for source, v in solo.items()
        ]
        if written or find(node, "solo") is not None:
            edits.append(set_key(text, node, "solo", written, "thresholds", is_mapping=True))
            said["solo"] = solo
        edits.append(set_key(text, node, "calibration", [ARTEFACT], "thresholds"))
        said["calibration"] = ARTEFACT
    edited = with_edits(text, edits)
    if not says(edited, expected):
        raise BundleError(
            f"{SPEC}: clusters: cannot be edited in place (expected each cluster's thresholds "
            "written out, without anchors)"
        )
    parse_spec(edited, SPEC)
    return edited


def _number(value: float) -> str:
    return f"{value:.5f}"
