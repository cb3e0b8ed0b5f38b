"""The result as one HTML file that asks nobody for anything: style and charts are inside.

It has no script. It shows texts: treat it as the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from monitor.evaluation.charts import histogram, roc_chart
from monitor.evaluation.figures import SOURCES, positives_of
from monitor.evaluation.result import Example, Interval
from monitor.evaluation.run import Evaluated
from monitor.pages.document import render
from monitor.policy import FUSED
from monitor.traces import TraceStore, request_of
from sae_core.evaluation.comparison import roc_curve

HERE = Path(__file__).resolve().parent
MAX_SHOWN_TOKENS = 160
"""Of a row; around the highest token where it is longer."""
N_HEAT = 6
"""Steps of heat: 0 is no colour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatToken:
    """One token of an example's strip."""

    text: str
    level: int
    """0 to `N_HEAT`, by the fused logit between 0 and the cluster's alert threshold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """One example with its tokens."""

    example: Example
    tokens: tuple[HeatToken, ...]
    is_cut: bool


def page_of(found: Evaluated) -> str:
    """The report as text."""
    return render(
        HERE,
        filters={"interval": _interval, "percent": lambda value: f"{value:.1%}"},
        result=found.result,
        roc=roc_chart(_curves(found)),
        histograms=_histograms(found),
        misses=_strips(found, found.result.worst.misses),
        false_alarms=_strips(found, found.result.worst.false_alarms),
    )


def _curves(found: Evaluated) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    harmful = positives_of(found.rows, None)
    named = {name: found.scored.overall[:, i] for i, name in enumerate(SOURCES)}
    named |= found.asked.baselines.of(None)
    return {name: roc_curve(scores, harmful) for name, scores in named.items()}


def _histograms(found: Evaluated) -> dict[str, Markup]:
    benign = ~positives_of(found.rows, None)
    charts = {}
    for index, cluster in enumerate(found.served.bundle.spec.clusters):
        if cluster.id not in found.result.clusters:
            continue
        scores = found.scored.scores[:, index, FUSED]
        seen = ~np.isnan(scores)
        limits = [("flag", cluster.thresholds.flag), ("alert", cluster.thresholds.alert)]
        charts[cluster.id] = histogram(
            scores[positives_of(found.rows, cluster) & seen],
            scores[benign & seen],
            limits,
            name=cluster.id,
        )
    return charts


def _strips(found: Evaluated, examples: list[Example]) -> list[Strip]:
    rows = {row.place: row for row in found.rows}
    ids = [c.id for c in found.served.bundle.spec.clusters]
    strips = []
    with TraceStore(found.traces, found.served.logits_key) as store:
        for example in examples:
            trace = store.get(request_of(rows[example.place], with_prompt=found.with_prompts))
            assert trace is not None, "scored a moment ago"
            index = ids.index(example.cluster)
            logits = trace.logits[:, index, FUSED]
            alert = max(found.served.bundle.spec.clusters[index].thresholds.alert, 1e-6)
            counted = np.array([stage is not None for stage in trace.stages])
            heat = np.where(counted, np.clip(logits / alert, 0, 1), 0)
            levels = np.round(N_HEAT * heat).astype(int)
            start = 0
            if len(levels) > MAX_SHOWN_TOKENS:
                start = int(np.argmax(heat)) - MAX_SHOWN_TOKENS // 2
                start = min(max(start, 0), len(levels) - MAX_SHOWN_TOKENS)
            stop = min(start + MAX_SHOWN_TOKENS, len(levels))
            texts = found.served.tokenizer.token_texts(list(trace.token_ids))
            strips.append(
                Strip(
                    example=example,
                    tokens=tuple(
                        HeatToken(text=texts[i], level=int(levels[i])) for i in range(start, stop)
                    ),
                    is_cut=len(levels) > MAX_SHOWN_TOKENS,
                )
            )
    return strips


def _interval(value: Interval | None) -> str:
    return "–" if value is None else f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"
