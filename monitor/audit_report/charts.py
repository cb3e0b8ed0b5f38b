"""Counts as inline SVG; told apart by hatching, outline and height, never by colour alone."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from monitor.audit_report.build import ClusterRow
from monitor.audit_report.summary import SCORE_STEP, Bins, Summary
from monitor.pages import svg
from monitor.pages.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH

Floats = NDArray[np.float64]

N_SCORE_BARS = 60
LABEL = 60
"""Width that a threshold's name may take."""
_DAY_US = 86_400_000_000


def time_label(bins: Bins, place: int) -> str:
    """When a bin begins, UTC, as short as its width allows."""
    moment = datetime.fromtimestamp((bins.start_us + place * bins.width_us) / 1e6, UTC)
    if bins.width_us >= _DAY_US:
        return moment.strftime("%Y-%m-%d")
    return moment.strftime("%m-%d %H:%M:%S" if bins.width_us < 60_000_000 else "%m-%d %H:%M")


def traffic_chart(summary: Summary) -> Markup:
    """Decisions over time, stacked by verdict: alerts below, so that they have a common line."""
    stacks = [(name, summary.by_bin[name]) for name in ("alert", "flag", "pass")]
    return _stacked("decisions by verdict over time", "decisions", summary.bins, stacks)


def alert_chart(row: ClusterRow, summary: Summary) -> Markup:
    """The share of each span's decisions in which the cluster alerted."""
    totals = np.sum(list(summary.by_bin.values()), axis=0)
    shares = np.array(row.counts.alerts_by_bin) / np.maximum(totals, 1)
    top = float(shares.max()) or 0.01
    parts = [svg.frame("time, UTC", "share of decisions that alert")]
    width = (WIDTH - LEFT - RIGHT) / summary.bins.n
    for place, share in enumerate(shares):
        x = LEFT + place * width
        if totals[place] and share == 0:  # a span without traffic stays empty, one at 0 does not
            parts.append(svg.line(x, HEIGHT - BOTTOM - 1, x + width, HEIGHT - BOTTOM - 1, "zero"))
        elif share:
            parts.append(_bar(x, width, 0.0, share / top, "alerts"))
    parts += _time_axis(summary.bins)
    parts.append(svg.text(LEFT - 4, TOP + 8, f"{top:.2%}", "end"))
    return svg.document(f"Alert rate of {row.name} over time", parts)


def limits_of(row: ClusterRow) -> list[tuple[str, float]]:
    """The thresholds that are known, by name."""
    named = (("flag", row.flag), ("alert", row.alert))
    return [(name, limit) for name, limit in named if limit is not None]


def score_bars(row: ClusterRow) -> tuple[Floats, Floats]:
    """Edges of `N_SCORE_BARS` bars that reach over scores and thresholds, and their decisions."""
    steps = row.counts.scores
    ends = [*steps, *(limit / SCORE_STEP for _, limit in limits_of(row))]
    edges = np.linspace(min(ends) * SCORE_STEP, (max(ends) + 1) * SCORE_STEP, N_SCORE_BARS + 1)
    values = (np.fromiter(steps.keys(), float) + 0.5) * SCORE_STEP
    return edges, np.histogram(values, edges, weights=np.fromiter(steps.values(), float))[0]


def score_chart(row: ClusterRow) -> Markup:
    """How scores lie against the thresholds; the height is logarithmic, as most pass by far."""
    edges, counts = score_bars(row)
    low, high = float(edges[0]), float(edges[-1])
    top = float(counts.max())
    parts = [svg.frame(f"score of {row.name}, logits", "decisions, logarithmic")]
    width = (WIDTH - LEFT - RIGHT) / N_SCORE_BARS
    for place, count in enumerate(counts):
        if count:
            height = np.log1p(count) / np.log1p(top)
            parts.append(_bar(LEFT + place * width, width, 0.0, float(height), "scores"))
    for name, limit in limits_of(row):
        x = LEFT + (WIDTH - LEFT - RIGHT) * (limit - low) / (high - low)
        parts.append(svg.line(x, TOP, x, HEIGHT - BOTTOM, f"limit {name}"))
        is_left = name == "flag" or x > WIDTH - RIGHT - LABEL
        where, anchor = (x - 3, "end") if is_left else (x + 3, "start")
        at = TOP + (10 if name == "flag" else 22)
        parts.append(svg.text(where, at, f"{name} {limit:.2f}", anchor))
    for value in (low, (low + high) / 2, high):
        x = LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)
        parts.append(svg.text(x, HEIGHT - BOTTOM + 14, f"{value:.3g}", "middle"))
    parts.append(svg.text(LEFT - 4, TOP + 8, f"{top:.0f}", "end"))
    return svg.document(f"Scores of {row.name} against its thresholds", parts)


def _stacked(
    title: str, y_name: str, bins: Bins, stacks: Sequence[tuple[str, Sequence[int]]]
) -> Markup:
    heights = np.array([counts for _, counts in stacks], float)
    top = float(heights.sum(axis=0).max()) or 1.0
    parts = [svg.frame("time, UTC", y_name)]
    width = (WIDTH - LEFT - RIGHT) / bins.n
    for place in range(bins.n):
        base = 0.0
        for (name, _), height in zip(stacks, heights[:, place] / top, strict=True):
            if height:
                parts.append(_bar(LEFT + place * width, width, base, base + float(height), name))
            base += float(height)
    parts += _time_axis(bins)
    parts.append(svg.text(LEFT - 4, TOP + 8, f"{top:.0f}", "end"))
    return svg.document(title, parts)


def _bar(x: float, width: float, low: float, high: float, kind: str) -> str:
    top = svg.y(high)
    return (
        f'<rect x="{x:.1f}" y="{top:.1f}" width="{max(width - 0.6, 0.5):.1f}"'
        f' height="{max(svg.y(low) - top, 1.0):.1f}" class="{kind}"/>'
    )


def _time_axis(bins: Bins) -> list[str]:
    y = HEIGHT - BOTTOM + 14
    marks = [svg.text(LEFT, y, time_label(bins, 0), "start")]
    if bins.n > 1:
        marks.append(svg.text(WIDTH - RIGHT, y, time_label(bins, bins.n - 1), "end"))
    return marks
