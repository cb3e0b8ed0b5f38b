"""Leave one source out: a bundle's clusters, SAE and place, with heads fitted anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from monitor.errors import BundleError
from monitor.evaluation.figures import (
    KEYWORDS,
    LENGTH,
    SOURCES,
    TFIDF,
    Floats,
    Mask,
    categories_of,
    positives_of,
    question,
    verdict_rate,
)
from monitor.evaluation.result import Question, Unseen, UnseenSource, VerdictRate
from monitor.model_store import Progress
from monitor.served import Served
from sae_core.calibration import calibrate_source
from sae_core.evaluation.baselines import TfidfBaseline, keyword_scores, length_scores
from sae_core.evaluation.data import EvaluationError, LabelledText
from sae_core.evaluation.detection import normalised
from sae_core.evaluation.folds import SourceFold, source_folds
from sae_core.hook_points import parse_hook_point
from sae_core.training.activations import LanguageModelForward
from sae_core.training.dense_heads import HeadConfig
from sae_core.training.dictionary import Dictionary, PlacedSAE, shared
from sae_core.training.discovery import ClusterPlan
from sae_core.training.examples import cached_streams
from sae_core.training.unseen_sources import unseen_source_scores

MAX_TOKENS = 256
"""Texts are cut here for fitting; a head needs no more of one text."""


def leave_one_source_out(
    served: Served,
    rows: Sequence[LabelledText],
    work: Path,
    *,
    n_resamples: int,
    seed: int,
    progress: Progress = lambda what, share: None,
) -> Unseen:
    """Figures of heads that never saw the data set they are measured on.

    The overall number puts clusters on one scale by thresholds from benign held-out scores.

    Args:
        work: where residual streams are kept for a rerun.

    Raises:
        BundleError: the bundle has no SAE, or dense heads at several places.
        EvaluationError: as `source_folds`; or a text without tokens.
    """
    plans = [
        ClusterPlan(id=c.id, title=c.title, severity=c.severity.value, categories=categories_of(c))
        for c in served.bundle.spec.clusters
        if positives_of(rows, c).any()
    ]
    if not plans:
        raise EvaluationError("found no row of any cluster's categories, expected some")
    folds = source_folds(rows)
    dictionary, dense_hook_point = _what_is_read(served)
    aggregate = replace(served.plan.aggregator.specs[0], min_evidence_tokens=0)
    streams = cached_streams(
        [row.text for row in rows],
        served.tokenizer,
        LanguageModelForward(served.scorer.language_model, mixed_precision=False),
        work / "unseen",
        identity=f"{served.provenance.model_digest} float32",
        max_tokens=MAX_TOKENS,
        progress=lambda done, total: progress("residual streams", done / total),
    )
    for row, length in zip(rows, np.diff(shared(streams).starts), strict=True):
        if length < 1:
            raise EvaluationError(f"{row.place}: found no token to score, expected some")
    scores = unseen_source_scores(
        plans,
        rows,
        streams,
        dictionary,
        dense_hook_point,
        folds,
        HeadConfig(),
        aggregate,
        progress=lambda done, total: progress("heads without each source", done / total),
    )
    baselines = _baselines(plans, rows, folds)
    return _figures(plans, rows, folds, scores, baselines, n_resamples, seed)


def _what_is_read(served: Served) -> tuple[Dictionary, str]:
    """All SAEs, and where dense heads read: where the bundle's do, or its first SAE."""
    saes = [PlacedSAE(name, str(point), sae) for name, (point, sae) in served.saes.items()]
    if not saes:
        raise BundleError(f"bundle {served.bundle.label}: found no SAE, expected at least one")
    dense = {str(parse_hook_point(h.hook_point)) for h in served.bundle.spec.dense_heads.values()}
    if len(dense) > 1:
        raise BundleError(
            f"bundle {served.bundle.label}: found dense heads at {', '.join(sorted(dense))}, "
            "expected one place to leave sources out"
        )
    return Dictionary(saes), dense.pop() if dense else saes[0].hook_point


def _baselines(
    plans: Sequence[ClusterPlan], rows: Sequence[LabelledText], folds: Sequence[SourceFold]
) -> dict[str | None, dict[str, Floats]]:
    """By cluster id, None for all harm; TF-IDF trained without each source."""
    texts = [row.text for row in rows]
    keywords, length = keyword_scores(texts), length_scores(texts)
    targets: dict[str | None, Mask] = {None: positives_of(rows, None)}
    targets |= {plan.id: np.array([plan.has(row) for row in rows]) for plan in plans}
    tfidf = {key: np.zeros(len(rows)) for key in targets}
    for fold in folds:
        model = TfidfBaseline(
            [rows[int(i)] for i in fold.train], [texts[int(i)] for i in fold.held]
        )
        for key, target in targets.items():
            found = model.scores(target[fold.train])
            if found is not None:
                tfidf[key][fold.held] = found
    return {key: {TFIDF: tfidf[key], KEYWORDS: keywords, LENGTH: length} for key in targets}


def _figures(
    plans: Sequence[ClusterPlan],
    rows: Sequence[LabelledText],
    folds: Sequence[SourceFold],
    scores: Floats,
    baselines: dict[str | None, dict[str, Floats]],
    n_resamples: int,
    seed: int,
) -> Unseen:
    harmful = positives_of(rows, None)
    overall = {
        name: _on_one_scale(scores[:, :, i], ~harmful) for i, name in enumerate(SOURCES)
    } | baselines[None]

    def ask(named: dict[str, Floats], positives: Mask) -> Question:
        seen = positives | ~harmful
        return question(
            {name: values[seen] for name, values in named.items()},
            positives[seen],
            n_resamples=n_resamples,
            seed=seed,
        )

    clusters = {}
    for column, plan in enumerate(plans):
        positives = np.array([plan.has(row) for row in rows])
        own = {name: scores[:, column, i] for i, name in enumerate(SOURCES)}
        clusters[plan.id] = ask(own | baselines[plan.id], positives)
    sources = {}
    for fold in folds:
        held = np.zeros(len(rows), np.bool_)
        held[fold.held] = True
        n_harmful = int((held & harmful).sum())
        sources[fold.source] = UnseenSource(
            n_harmful=n_harmful,
            n_benign=int((held & ~harmful).sum()),
            question=ask(overall, held & harmful) if n_harmful else None,
            verdicts=_verdicts(fold.source, scores[:, :, 0], held & ~harmful, ~held & ~harmful),
        )
    return Unseen(overall=ask(overall, harmful), clusters=clusters, sources=sources)


def _on_one_scale(scores: Floats, benign: Mask) -> Floats:
    found = calibrate_source(scores[benign])
    return normalised(scores, found.flag.thresholds, found.alert.thresholds)


def _verdicts(source: str, fused: Floats, held: Mask, others: Mask) -> list[VerdictRate]:
    """Benign rows of a source that thresholds from the others' benign rows would raise."""
    if not held.any() or others.sum() < 2:
        return []
    found = calibrate_source(fused[others])
    rates = []
    for verdict, zone in (("flag", found.flag), ("alert", found.alert)):
        raised = int((fused[held] >= zone.thresholds).any(axis=1).sum())
        claimed = zone.target if zone.is_calibrated else None
        rates.append(verdict_rate(f"{source}, benign", verdict, raised, int(held.sum()), claimed))
    return rates
