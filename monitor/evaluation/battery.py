"""How fragile scores are: seeded samples of the rows, scored as they are and disguised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from monitor.evaluation.figures import Mask, positives_of
from monitor.evaluation.result import Battery, Disguise, Fragility
from monitor.evaluation.scored import Scored, Scoring
from monitor.model_store import Progress
from monitor.policy import FUSED
from monitor.records import Stage
from sae_core.evaluation.data import LabelledText
from sae_core.evaluation.perturbations import BATTERY, PADDED, PADDING_WORDS, perturbed

OVERALL = "overall"


async def run_battery(
    scoring: Scoring,
    rows: Sequence[LabelledText],
    *,
    n_rows: int,
    seed: int,
    progress: Progress = lambda what, share: None,
) -> Battery:
    """Every disguise on the same sample.

    Args:
        n_rows: at most so many harmful rows, and half as many benign ones.
    """
    harmful = positives_of(rows, None)
    rng = np.random.default_rng(seed)
    chosen = [
        *_sample(rng, np.flatnonzero(harmful), n_rows),
        *_sample(rng, np.flatnonzero(~harmful), max(n_rows // 2, 1)),
    ]
    sample = [rows[i] for i in chosen]
    rest = set(range(len(rows))) - set(chosen)
    padding = [rows[i].text for i in sorted(rest) if not harmful[i]]
    padding = padding or [row.text for row in sample if not row.is_harmful]
    plain = await scoring.score(sample, what="as they are", progress=progress)
    disguises = {}
    for name in BATTERY:
        texts = [_fitting(scoring, name, row, seed, padding) for row in sample]
        kept = [i for i, text in enumerate(texts) if text is not None]
        disguised = await scoring.score(
            [
                replace(sample[i], text=texts[i] or "", place=f"{sample[i].place} {name}")
                for i in kept
            ],
            what=f"disguised: {name.replace('_', ' ')}",
            progress=progress,
        )
        rows_kept, n_too_long = [sample[i] for i in kept], len(sample) - len(kept)
        disguises[name] = _disguise(scoring, rows_kept, plain.of(kept), disguised, n_too_long)
    return Battery(seed=seed, disguises=disguises)


def _fitting(
    scoring: Scoring, name: str, row: LabelledText, seed: int, padding: Sequence[str]
) -> str | None:
    """The disguised text, with as much padding as the model takes; None where it takes none."""
    reader = scoring.pipeline.reader
    n_words = PADDING_WORDS
    while n_words:
        text = perturbed(name, row.text, seed, padding, n_words=n_words)
        tokens = reader.text(text, Stage.PROMPT).token_ids
        if len(tokens) <= reader.max_request_tokens:
            return text
        n_words = n_words // 2 if name in PADDED else 0
    return None


def _sample(rng: np.random.Generator, indices: np.ndarray, n: int) -> list[int]:
    if len(indices) > n:
        indices = np.sort(rng.choice(indices, n, replace=False))
    return [int(i) for i in indices]


def _disguise(
    scoring: Scoring,
    rows: Sequence[LabelledText],
    plain: Scored,
    disguised: Scored,
    n_too_long: int,
) -> Disguise:
    harmful = positives_of(rows, None)
    clusters = {OVERALL: _overall(plain, disguised, harmful)} if harmful.any() else {}
    for index, cluster in enumerate(scoring.served.bundle.spec.clusters):
        before, after = plain.scores[:, index, FUSED], disguised.scores[:, index, FUSED]
        mask = positives_of(rows, cluster) & ~np.isnan(before) & ~np.isnan(after)
        if mask.any():
            flag = cluster.thresholds.flag
            clusters[cluster.id] = _fragility(
                before[mask] >= flag,
                after[mask] >= flag,
                float(after[mask].mean() - before[mask].mean()),
            )
    return Disguise(
        clusters=clusters,
        n_too_long=n_too_long,
        n_benign=int((~harmful).sum()),
        benign_flagged=_share(plain.verdict[~harmful] > 0),
        benign_flagged_disguised=_share(disguised.verdict[~harmful] > 0),
    )


def _share(raised: Mask) -> float | None:
    return float(raised.mean()) if len(raised) else None


def _overall(plain: Scored, disguised: Scored, harmful: Mask) -> Fragility:
    before, after = plain.overall[harmful, FUSED], disguised.overall[harmful, FUSED]
    both = np.isfinite(before) & np.isfinite(after)
    change = float(after[both].mean() - before[both].mean()) if both.any() else 0.0
    return _fragility(plain.verdict[harmful] > 0, disguised.verdict[harmful] > 0, change)


def _fragility(before: Mask, after: Mask, score_change: float) -> Fragility:
    return Fragility(
        n=len(before),
        tpr=float(before.mean()),
        tpr_disguised=float(after.mean()),
        tpr_change=float(after.mean() - before.mean()),
        score_change=score_change,
    )
