"""Decisions and labels to figures, with the baselines beside them. Knows no model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from monitor.bundle_spec import BundleSpec, ClusterModel
from monitor.evaluation.result import (
    Cost,
    DelayFigures,
    DifferenceFigures,
    Example,
    Question,
    ScoreFigures,
    VerdictRate,
    Worst,
)
from monitor.evaluation.scored import Scored
from monitor.policy import FUSED
from sae_core.evaluation.baselines import TfidfBaseline, keyword_scores, length_scores
from sae_core.evaluation.comparison import compare
from sae_core.evaluation.data import EvaluationError, LabelledText
from sae_core.evaluation.delay import delay_of
from sae_core.evaluation.rates import rate_of

SOURCES = ("fused", "dense", "sae")
TFIDF, KEYWORDS, LENGTH = "tfidf", "keywords", "length"
PAIRS = (("fused", TFIDF), ("fused", "dense"), ("dense", "sae"), ("fused", KEYWORDS))
EVERY_HARM = "*"
N_WORST = 12
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Baselines:
    """What any monitor must beat, on the same rows."""

    keywords: Floats
    length: Floats
    tfidf: Callable[[ClusterModel | None], Floats | None]
    """Scores for one cluster's question or, with None, for all harm; None where it is absent."""
    ms_per_text: Mapping[str, float]

    def of(self, cluster: ClusterModel | None) -> dict[str, Floats]:
        """By name; TF-IDF only where it could be trained."""
        found = {KEYWORDS: self.keywords, LENGTH: self.length}
        tfidf = self.tfidf(cluster)
        return found if tfidf is None else {TFIDF: tfidf, **found}


def baselines_of(rows: Sequence[LabelledText], train: Sequence[LabelledText]) -> Baselines:
    """The baselines' scores of the rows.

    Args:
        train: rows that TF-IDF is trained on; none leaves it out.
    """
    texts = [row.text for row in rows]
    spent: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Floats]) -> Floats:
        began = time.perf_counter()
        scores = work()
        spent[name] = 1000 * (time.perf_counter() - began) / len(texts)
        return scores

    keywords = timed(KEYWORDS, lambda: keyword_scores(texts))
    length = timed(LENGTH, lambda: length_scores(texts))
    if not train:
        return Baselines(
            keywords=keywords, length=length, tfidf=lambda cluster: None, ms_per_text=spent
        )
    model = TfidfBaseline(train, texts)
    known: dict[str | None, Floats | None] = {}

    def tfidf(cluster: ClusterModel | None) -> Floats | None:
        key = None if cluster is None else cluster.id
        if key not in known:
            known[key] = model.scores(positives_of(train, cluster))
        return known[key]

    return Baselines(keywords=keywords, length=length, tfidf=tfidf, ms_per_text=spent)


def categories_of(cluster: ClusterModel) -> tuple[str, ...]:
    """Categories of labelled rows that are the cluster's."""
    return cluster.categories or (cluster.id,)


def positives_of(rows: Sequence[LabelledText], cluster: ClusterModel | None) -> Mask:
    """Which rows a cluster should raise; with None all harmful ones."""
    wanted = (EVERY_HARM,) if cluster is None else categories_of(cluster)
    return np.array(
        [row.is_harmful and (EVERY_HARM in wanted or row.category in wanted) for row in rows],
        np.bool_,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The rows, what was scored of them, and how figures are drawn."""

    rows: Sequence[LabelledText]
    scored: Scored
    baselines: Baselines
    spec: BundleSpec
    n_resamples: int
    seed: int

    @property
    def harmful(self) -> Mask:
        """[n]."""
        return positives_of(self.rows, None)

    def question(self, positives: Mask, benign: Mask, cluster: int | None = None) -> Question:
        """Positives against benign rows, by the policy's number or by one cluster's score.

        Raises:
            EvaluationError: one of the two is empty.
        """
        model = None if cluster is None else self.spec.clusters[cluster]
        values = self.scored.overall if cluster is None else self.scored.scores[:, cluster]
        seen = positives | benign
        if cluster is not None:
            seen &= ~np.isnan(values).any(axis=1)
        scores = {name: values[seen, i] for i, name in enumerate(SOURCES)}
        if model is not None:
            absent = {"dense": model.dense_head is None, "sae": not model.latents}
            scores = {name: v for name, v in scores.items() if not absent.get(name, False)}
        scores |= {name: v[seen] for name, v in self.baselines.of(model).items()}
        return question(scores, positives[seen], n_resamples=self.n_resamples, seed=self.seed)

    def rates(self, name: str, mask: Mask, claims: Mapping[str, float]) -> list[VerdictRate]:
        """Flagged and alerted among some rows; nothing where there are none."""
        if not mask.any():
            return []
        found = []
        for rank, verdict in ((1, "flag"), (2, "alert")):
            raised = int((self.scored.verdict[mask] >= rank).sum())
            found.append(verdict_rate(name, verdict, raised, int(mask.sum()), claims.get(verdict)))
        return found


def question(
    scores: Mapping[str, Floats], is_harmful: Mask, *, n_resamples: int, seed: int
) -> Question:
    """Figures of several scores on the same rows; EvaluationError for rows of one label only."""
    found = compare(scores, is_harmful, pairs=PAIRS, n_resamples=n_resamples, seed=seed)
    return Question(
        n_harmful=found.n_harmful,
        n_benign=found.n_benign,
        scores={name: ScoreFigures(**asdict(f)) for name, f in found.figures.items()},
        differences=[
            DifferenceFigures(**asdict(d), is_better=d.is_better) for d in found.differences
        ],
    )


def verdict_rate(
    rows: str, verdict: str, n_raised: int, n: int, claimed: float | None
) -> VerdictRate:
    """A share with its interval, against the claim where there is one."""
    rate = rate_of(n_raised, n)
    return VerdictRate(
        rows=rows,
        verdict="alert" if verdict == "alert" else "flag",
        n=n,
        n_raised=n_raised,
        rate=rate.value,
        low=rate.low,
        high=rate.high,
        claimed=claimed,
        standing=None if claimed is None else rate.standing(claimed),
    )


def cost_of(scored: Scored, baselines: Baselines) -> Cost:
    """Tokens and milliseconds."""
    n_texts, n_tokens = len(scored.n_tokens), int(scored.n_tokens.sum())
    total_ms = 1000 * float(scored.seconds.sum())
    return Cost(
        n_texts=n_texts,
        n_tokens=n_tokens,
        tokens_per_text=n_tokens / n_texts,
        ms_per_text=total_ms / n_texts,
        ms_per_1000_tokens=1000 * total_ms / n_tokens,
        baseline_ms_per_text=dict(baselines.ms_per_text),
    )


def delays_of(scored: Scored, harmful: Mask) -> dict[Literal["flag", "alert"], DelayFigures]:
    """By verdict, over the harmful rows."""
    found: dict[Literal["flag", "alert"], DelayFigures] = {}
    by_verdict: dict[Literal["flag", "alert"], tuple[int | None, ...]] = {
        "flag": scored.flagged_at,
        "alert": scored.alerted_at,
    }
    for verdict, caught_at in by_verdict.items():
        chosen = np.flatnonzero(harmful)
        delay = delay_of([caught_at[i] for i in chosen], scored.n_scored[chosen].tolist())
        if delay is None:
            raise EvaluationError("found no harmful rows, expected at least one")
        found[verdict] = DelayFigures(**asdict(delay))
    return found


def worst_of(rows: Sequence[LabelledText], scored: Scored, spec: BundleSpec) -> Worst:
    """Harmful rows that passed with the lowest scores, benign ones raised with the highest."""
    harmful = positives_of(rows, None)
    fused = scored.overall[:, FUSED]
    order = np.argsort(fused, kind="stable")
    misses = [i for i in order if harmful[i] and scored.verdict[i] == 0]
    alarms = [i for i in order[::-1] if not harmful[i] and scored.verdict[i] > 0]

    def example(i: int) -> Example:
        row = rows[i]
        value = float(fused[i])
        return Example(
            place=row.place,
            source=row.source,
            category=row.category,
            cluster=spec.clusters[nearest_cluster(scored.scores[i, :, FUSED], spec)].id,
            overall=value if np.isfinite(value) else None,
        )

    return Worst(
        misses=[example(int(i)) for i in misses[:N_WORST]],
        false_alarms=[example(int(i)) for i in alarms[:N_WORST]],
    )


def nearest_cluster(scores: Floats, spec: BundleSpec) -> int:
    """The cluster whose fused score stands highest on its own scale of flag 0 and alert 1."""
    flag = np.array([c.thresholds.flag for c in spec.clusters])
    alert = np.array([c.thresholds.alert for c in spec.clusters])
    return int(np.argmax(np.where(np.isnan(scores), -np.inf, (scores - flag) / (alert - flag))))
