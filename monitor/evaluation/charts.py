"""Inline SVG: ROC curves and score histograms. Knows numbers and names, not evaluations.

Curves differ by dash as well as by colour (the palette of Okabe and Ito), so that they can be told
apart in grey print and by everybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from monitor.pages import svg
from monitor.pages.svg import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH

Floats = NDArray[np.float64]
STROKES = (
    ("#0072B2", ""),
    ("#D55E00", "7 3"),
    ("#009E73", "2 2"),
    ("#CC79A7", "9 3 2 3"),
    ("#56B4E9", "4 4"),
    ("#000000", "1 3"),
)
MAX_POINTS = 300
LEAST_RATE = 1e-3
"""Left end of the false-positive axis, which is logarithmic: what matters is below 5 %."""
N_BINS = 40


def roc_chart(curves: Mapping[str, tuple[Floats, Floats]]) -> Markup:
    """True- over false-positive rate, the latter on a logarithmic axis from 0.1 %.

    Args:
        curves: Name -> (false-positive rates, true-positive rates), both ascending.
    """
    parts = [svg.frame("false-positive rate", "true-positive rate")]
    for rate in (0.001, 0.01, 0.1, 1.0):
        x = _log_x(rate)
        parts.append(svg.line(x, TOP, x, HEIGHT - BOTTOM, "grid"))
        parts.append(svg.text(x, HEIGHT - BOTTOM + 14, f"{rate:.1%}".replace(".0", ""), "middle"))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = svg.y(share)
        parts.append(svg.line(LEFT, y, WIDTH - RIGHT, y, "grid"))
        parts.append(svg.text(LEFT - 4, y + 3, f"{share:.0%}", "end"))
    for (colour, dash), (fpr, tpr) in zip(STROKES, curves.values(), strict=False):
        points = " ".join(
            f"{_log_x(max(a, LEAST_RATE)):.1f},{svg.y(b):.1f}"
            for a, b in zip(*_steps(fpr, tpr), strict=True)
        )
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"'
            f' stroke-dasharray="{dash}"/>'
        )
    height = 14 * len(curves) + 6
    parts.append(
        f'<rect x="{WIDTH - RIGHT - 126}" y="{HEIGHT - BOTTOM - height - 8}" width="120"'
        f' height="{height}" fill="#fff" fill-opacity="0.85"/>'
    )
    for row, (name, (colour, dash)) in enumerate(zip(curves, STROKES, strict=False)):
        y = HEIGHT - BOTTOM - 14 * (len(curves) - row) + 4
        x = WIDTH - RIGHT - 120
        parts.append(
            f'<line x1="{x}" y1="{y}" x2="{x + 26}" y2="{y}" stroke="{colour}" stroke-width="2"'
            f' stroke-dasharray="{dash}"/>'
        )
        parts.append(svg.text(x + 32, y + 3, name, "start"))
    return svg.document("ROC curves of " + ", ".join(curves), parts)


def histogram(
    harmful: Floats, benign: Floats, limits: Sequence[tuple[str, float]], *, name: str
) -> Markup:
    """How scores of both labels lie, as shares of each, with the thresholds as lines.

    Benign bars are outlined and hatched, harmful ones filled.
    """
    both = np.concatenate((harmful, benign, [limit for _, limit in limits]))
    both = both[np.isfinite(both)]
    low, high = float(both.min()), float(both.max())
    high = high if high > low else low + 1.0
    edges = np.linspace(low, high, N_BINS + 1)
    shares = {
        label: np.histogram(values, edges)[0] / max(len(values), 1)
        for label, values in (("harmful", harmful), ("benign", benign))
    }
    top = max(float(s.max()) for s in shares.values()) or 1.0
    parts = [svg.frame(f"score of {name}", "share of rows")]

    def x_of(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    for label, values in shares.items():
        for i, share in enumerate(values):
            if share:
                x, y = x_of(edges[i]), svg.y(share / top)
                width, height = x_of(edges[i + 1]) - x, HEIGHT - BOTTOM - y
                parts.append(
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
                    f' class="{label}"/>'
                )
    for label, limit in limits:
        x = x_of(limit)
        parts.append(svg.line(x, TOP, x, HEIGHT - BOTTOM, "limit"))
        parts.append(svg.text(x + 3, TOP + 10, label, "start"))
    for value in (low, (low + high) / 2, high):
        parts.append(svg.text(x_of(value), HEIGHT - BOTTOM + 14, f"{value:.2g}", "middle"))
    parts.append(svg.text(LEFT - 4, TOP + 8, f"{top:.0%}", "end"))
    return svg.document(f"Histogram of the score of {name}", parts)


def _steps(fpr: Floats, tpr: Floats) -> tuple[Floats, Floats]:
    """The curve as steps, thinned evenly along the drawn axis."""
    x, y = np.repeat(fpr, 2)[1:], np.repeat(tpr, 2)[:-1]
    if len(x) <= MAX_POINTS:
        return x, y
    along = np.log10(np.maximum(x, LEAST_RATE)) / -np.log10(LEAST_RATE) + y
    keep = np.unique(np.searchsorted(along, np.linspace(along[0], along[-1], MAX_POINTS)))
    keep = np.union1d(np.minimum(keep, len(x) - 1), [0, len(x) - 1])
    return x[keep], y[keep]


def _log_x(rate: float) -> float:
    share = 1 - np.log10(rate) / np.log10(LEAST_RATE)
    return float(LEFT + (WIDTH - LEFT - RIGHT) * share)
