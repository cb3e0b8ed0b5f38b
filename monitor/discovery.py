"""Labelled texts and a bundle's SAEs to the latents of each risk, and a bundle that registers them.

Activations come from the bundle's own model at the places its SAEs read. What is written is a
proposal: its thresholds rest on the texts it was found on and no calibration is claimed.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from monitor.bundle import MANIFEST
from monitor.bundle_spec import parse_spec
from monitor.errors import BundleError
from monitor.served import Served
from sae_core.aggregation import AggregateSpec
from sae_core.calibration import calibrate_source
from sae_core.evaluation.data import EvaluationError, LabelledText
from sae_core.heads import Cluster, ClusterHeads, LatentTerm
from sae_core.sae import SAE
from sae_core.scorer import reading_shift
from sae_core.training.activations import ContextForward, language_model_forward
from sae_core.training.discovery import BROAD, ClusterPlan, SilencePlan, text_acts
from sae_core.training.examples import ResidualSet, cached_residuals
from sae_core.training.findings import (
    DiscoverySettings,
    RiskFindings,
    SilentFindings,
    find_latents,
    find_silent,
)
from sae_core.training.token_features import latent_acts_of, text_scores

Progress = Callable[[str, float], None]
ANY_HARM = "any_harm"
MAX_TOKENS = 512
"""Of a text; what follows is not looked at."""
AGGREGATE = AggregateSpec(kind="mean", min_evidence_tokens=0)
"""What the weights are fitted for. Harmless text around a harmful passage dilutes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Discovery:
    """What was found in every SAE, for every risk."""

    n_texts: int
    findings: Mapping[str, tuple[RiskFindings, ...]]
    """By SAE id; the same risks in the same order for each."""
    silent: Mapping[str, tuple[SilentFindings, ...]]
    """By SAE id; none of them goes into a bundle."""
    texts: Mapping[str, ResidualSet]
    """By SAE id, what it read; for thresholds."""
    saes: Mapping[str, SAE]
    rows: tuple[LabelledText, ...]


def risks_of(
    rows: Sequence[LabelledText], given: Sequence[str], *, min_positive: int
) -> tuple[ClusterPlan, ...]:
    """The risks to look for.

    Args:
        given: Each `id=category,category`, or `id=*` for harm of any kind. Without any, `any_harm`
            and each category that has `min_positive` harmful texts.

    Raises:
        EvaluationError: Not of that form, or a category that no harmful text has.
    """
    counts = Counter(row.category for row in rows if row.is_harmful)
    if not given:
        enough = [c for c, n in sorted(counts.items()) if c and n >= min_positive]
        given = [f"{ANY_HARM}={BROAD}", *(f"{c}={c}" for c in enough)]
    plans: list[ClusterPlan] = []
    for text in given:
        name, equals, names = text.partition("=")
        categories = tuple(part.strip() for part in names.split(",") if part.strip())
        if not (name and equals and categories):
            raise EvaluationError(f"risk: found {text!r}, expected id=category,category or id=*")
        if name in {plan.id for plan in plans}:
            raise EvaluationError(f"risk: found {name!r} twice, expected each once")
        for category in categories:
            if category != BROAD and category not in counts:
                known = ", ".join(sorted(filter(None, counts))) or "none"
                raise EvaluationError(
                    f"risk {name}: found category {category!r}, the harmful texts have: {known}"
                )
        title = name.replace("_", " ").capitalize()
        plans.append(ClusterPlan(id=name, title=title, severity="warning", categories=categories))
    return tuple(plans)


def silences_of(rows: Sequence[LabelledText], given: Sequence[str]) -> tuple[SilencePlan, ...]:
    """What latents may go silent in.

    Args:
        given: Each `id=event,event:reference,reference`, categories of texts of any label.

    Raises:
        EvaluationError: Not of that form, or a category that no text has.
    """
    known = {row.category for row in rows if row.category}
    plans: list[SilencePlan] = []
    for text in given:
        name, _, rest = text.partition("=")
        sides = [
            tuple(part.strip() for part in side.split(",") if part.strip())
            for side in rest.split(":")
        ]
        if not name or len(sides) != 2 or not all(sides):
            raise EvaluationError(f"silent: found {text!r}, expected id=event:reference")
        if name in {plan.id for plan in plans}:
            raise EvaluationError(f"silent: found {name!r} twice, expected each once")
        for category in (*sides[0], *sides[1]):
            if category not in known:
                raise EvaluationError(
                    f"silent {name}: found category {category!r}, the texts have: "
                    f"{', '.join(sorted(known)) or 'none'}"
                )
        both = set(sides[0]) & set(sides[1])
        if both:
            raise EvaluationError(
                f"silent {name}: found {min(both)!r} on both sides, expected it on one"
            )
        plans.append(SilencePlan(id=name, event=sides[0], reference=sides[1]))
    return tuple(plans)


def discover(
    served: Served,
    rows: Sequence[LabelledText],
    plans: Sequence[ClusterPlan],
    work: Path,
    settings: DiscoverySettings,
    progress: Progress = lambda what, share: None,
    *,
    silences: Sequence[SilencePlan] = (),
) -> Discovery:
    """The latents of every risk, and those of every silence, in every SAE of the bundle.

    Residual streams are kept below `work`, so that another run on the same texts is quick.

    Raises:
        BundleError: The bundle has no SAE.
        TrainingError: A risk or a silence has too few texts.
    """
    if not served.saes:
        raise BundleError(f"bundle {served.bundle.label}: found no SAE, expected at least one")
    findings: dict[str, tuple[RiskFindings, ...]] = {}
    silent: dict[str, tuple[SilentFindings, ...]] = {}
    texts: dict[str, ResidualSet] = {}
    kept = tuple(row for row in rows if served.tokenizer.encode(row.text, add_bos=False))
    for sae_id, (hook_point, sae) in served.saes.items():
        texts[sae_id] = read = cached_residuals(
            [row.text for row in kept],
            served.tokenizer,
            _forward(served, sae_id),
            work / f"resid_{sae_id}",
            identity=f"{served.provenance.model_digest} {hook_point} {served.provenance.dtype} "
            f"{sae.card.processing}",
            max_tokens=MAX_TOKENS,
            progress=lambda done, total, name=sae_id: progress(  # type: ignore[misc]
                f"activations for {name}", done / total
            ),
        )
        progress(f"latents of {sae_id}", 0.0)
        acts = text_acts(sae, read)
        found = []
        for number, plan in enumerate(plans):
            progress(f"{sae_id}: {plan.id}", number / len(plans))
            found.append(
                find_latents(sae, kept, read, acts, plan, served.tokenizer.token_texts, settings)
            )
        findings[sae_id] = tuple(found)
        silent[sae_id] = tuple(
            find_silent(sae, kept, read, acts, plan, served.tokenizer.token_texts, settings)
            for plan in silences
        )
    saes = {sae_id: sae for sae_id, (_, sae) in served.saes.items()}
    return Discovery(
        n_texts=len(kept), findings=findings, silent=silent, texts=texts, saes=saes, rows=kept
    )


def _forward(served: Served, sae_id: str) -> ContextForward:
    hook_point, sae = served.saes[sae_id]
    model = served.scorer.language_model
    forward = language_model_forward(model, hook_point, mixed_precision=False)
    shift = reading_shift(model, hook_point, sae)
    if shift is None:
        return forward
    return lambda contexts: shift(forward(contexts))


def relabelled(discovery: Discovery, label: Callable[[RiskFindings, int], str | None]) -> Discovery:
    """The same with other labels; `label` gets a risk and the index of one of its used latents.

    Where it gives None the label stays.
    """
    findings = {}
    for sae_id, risks in discovery.findings.items():
        renamed = []
        for risk in risks:
            latents = list(risk.latents)
            for index, latent in enumerate(latents):
                text = label(risk, index) if latent.weight > 0 else None
                if text is not None:
                    latents[index] = replace(latent, label=text)
            renamed.append(replace(risk, latents=tuple(latents)))
        findings[sae_id] = tuple(renamed)
    return replace(discovery, findings=findings)


def write_proposal(served: Served, discovery: Discovery, folder: Path) -> tuple[str, ...]:
    """Writes a bundle whose clusters are the risks found; their ids.

    Model and SAEs are those of the bundle that was read; a risk without any latent is left out.
    `folder` must not exist or be an earlier proposal (a bundle that is not sealed).

    Raises:
        BundleError: `folder` is a sealed bundle, or no risk has a latent.
    """
    if (folder / MANIFEST).exists():
        raise BundleError(f"bundle: found {MANIFEST} in {folder}, expected no sealed bundle there")
    clusters = _clusters(discovery)
    if not clusters:
        raise BundleError("no latent passed for any risk: nothing to register")
    source = served.bundle.folder
    content: dict[str, Any] = yaml.safe_load((source / "bundle.yaml").read_text(encoding="utf-8"))
    for key in ("dense_heads", "rules"):
        content.pop(key, None)
    known = {c.id: c for c in served.bundle.spec.clusters}
    limits = _thresholds(clusters, discovery)
    content["clusters"] = []
    for cluster, thresholds in zip(clusters, limits, strict=True):
        before = known.get(cluster.id)
        title = _title(discovery, cluster.id) if before is None else before.title
        content["clusters"].append(
            {
                "id": cluster.id,
                "title": title,
                "severity": "warning" if before is None else before.severity.value,
                "latents": [
                    {
                        "sae": t.sae,
                        "id": t.latent_id,
                        "weight": float(f"{t.weight:.6g}"),
                        "scale": float(f"{t.scale:.6g}"),
                        "label": t.label,
                    }
                    for t in cluster.latents
                ],
                "transform": cluster.transform,
                "aggregate": {
                    "kind": AGGREGATE.kind,
                    "min_evidence_tokens": AGGREGATE.min_evidence_tokens,
                },
                "thresholds": thresholds,
            }
        )
    content["policies"] = {"default": {"mode": "monitor", "on_error": "allow"}}
    _place_parts(served, content, folder)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
    parse_spec(text, str(folder / "bundle.yaml"))
    (folder / "bundle.yaml").write_text(text, encoding="utf-8")
    return tuple(cluster.id for cluster in clusters)


def _place_parts(served: Served, content: dict[str, Any], folder: Path) -> None:
    """Copies SAEs that lie in the bundle; a model path relative to it becomes absolute."""
    source = served.bundle.folder
    folder.mkdir(parents=True, exist_ok=True)
    for ref in served.bundle.spec.saes.values():
        if ref.path is None or not ref.is_inside(source):
            continue
        here, there = source / ref.path, folder / ref.path
        if here.is_dir():
            shutil.copytree(here, there, dirs_exist_ok=True)
        else:
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(here, there)
    model = content["model"].get("path")
    if model is not None:
        content["model"]["path"] = str((source / model).resolve())


def _title(discovery: Discovery, cluster_id: str) -> str:
    risks = next(iter(discovery.findings.values()))
    return next(risk.plan.title for risk in risks if risk.plan.id == cluster_id)


def _clusters(discovery: Discovery) -> list[Cluster]:
    terms: dict[str, list[LatentTerm]] = {}
    for sae_id, risks in discovery.findings.items():
        for risk in risks:
            terms.setdefault(risk.plan.id, []).extend(
                LatentTerm(
                    sae=sae_id,
                    latent_id=latent.latent_id,
                    weight=latent.weight,
                    scale=latent.scale,
                    label=latent.label,
                )
                for latent in risk.used
            )
    return [
        Cluster(id=risk_id, latents=tuple(some), transform="clip")
        for risk_id, some in terms.items()
        if some
    ]


def _thresholds(clusters: Sequence[Cluster], discovery: Discovery) -> list[dict[str, float]]:
    """From the benign texts that the latents were found on; a start, not a calibration."""
    heads = ClusterHeads(clusters, list(discovery.findings))
    first = next(iter(discovery.texts.values()))
    logits = np.zeros((len(first.token_ids), len(clusters), 3), np.float32)
    columns = []
    for sae_id, ids in heads.latent_ids.items():
        sae = discovery.saes[sae_id]
        columns.append(latent_acts_of(sae, discovery.texts[sae_id], ids))
    acts = np.concatenate(columns, axis=1)
    for index in range(len(clusters)):
        total = heads.contributions(index, acts).sum(axis=1)
        logits[:, index, 0] = logits[:, index, 2] = total
    scores = text_scores(logits, first.starts, [AGGREGATE] * len(clusters))[:, :, 0]
    benign = np.array([not row.is_harmful for row in discovery.rows])
    found = calibrate_source(scores[benign])
    return [
        {"flag": float(flag), "alert": float(alert), "clear": float(clear)}
        for flag, alert, clear in zip(
            found.flag.thresholds, found.alert.thresholds, found.clear, strict=True
        )
    ]
