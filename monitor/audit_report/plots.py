"""The report's charts as PNG files. Needs matplotlib (extra `plots`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from monitor.audit_report.build import ClusterRow, Report
from monitor.audit_report.charts import limits_of, score_bars, time_label
from monitor.audit_report.heat import N_HEAT, DecisionHeat
from monitor.errors import AuditError

COLUMNS = 3
DPI = 130
MAX_TOKENS = 120
"""Of a decision's heat map; around its highest token."""


def write_plots(report: Report, folder: Path) -> list[Path]:
    """Writes traffic.png, coverage.png, alerts.png, scores.png and one heat map a decision.

    Raises:
        AuditError: the folder cannot be written.
    """
    with matplotlib.rc_context({"text.parse_math": False}):  # texts are other people's
        return _write(_figures(report), folder)


def _figures(report: Report) -> dict[str, Figure]:
    figures = {
        "traffic": _traffic(report),
        "coverage": _coverage(report),
        "alerts": _grid(report.clusters, lambda axes, row: _alerts(axes, row, report)),
        "scores": _grid(report.clusters, _scores),
    }
    for number, heat in enumerate(report.heats, 1):
        if heat.tokens:
            figures[f"tokens-{number}"] = _heat(heat)
    return figures


def _write(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            part, path = folder / f".{name}.part", folder / f"{name}.png"
            figure.savefig(part, format="png", dpi=DPI)
            os.replace(part, path)
            written.append(path)
    except OSError as error:
        raise AuditError(f"plots {folder}: cannot be written: {error}") from error
    return written


def _traffic(report: Report) -> Figure:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(report.summary.bins.n)
    base = np.zeros(len(places))
    looks = {"alert": ("#D55E00", ""), "flag": ("#E69F00", "///"), "pass": ("#BFD9EA", "")}
    for verdict, (colour, hatch) in looks.items():
        counts = np.array(report.summary.by_bin[verdict])
        axes.bar(places, counts, bottom=base, color=colour, hatch=hatch, label=verdict, width=0.9)
        base += counts
    axes.set_ylabel("decisions")
    axes.legend()
    _time_ticks(axes, report)
    return figure


def _coverage(report: Report) -> Figure:
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.add_subplot()
    counts = {"scored": report.summary.scored, **report.summary.unscored}
    shares = np.array(list(counts.values())) / max(report.summary.received, 1)
    axes.barh(range(len(counts)), shares, color="#56B4E9")
    axes.set_yticks(range(len(counts)), list(counts))
    for place, (share, count) in enumerate(zip(shares, counts.values(), strict=True)):
        axes.text(share, place, f" {count:,}", va="center")
    axes.set_xlabel("share of received tokens")
    axes.set_xlim(0, 1.15)
    return figure


def _grid(rows: Sequence[ClusterRow], draw: Callable[[Axes, ClusterRow], None]) -> Figure:
    n_lines = max(1, -(-len(rows) // COLUMNS))
    figure = Figure(figsize=(4 * COLUMNS, 2.8 * n_lines), layout="constrained")
    for place, row in enumerate(rows, 1):
        axes = figure.add_subplot(n_lines, COLUMNS, place)
        axes.set_title(row.name, fontsize=9)
        draw(axes, row)
    return figure


def _alerts(axes: Axes, row: ClusterRow, report: Report) -> None:
    totals = np.sum(list(report.summary.by_bin.values()), axis=0)
    shares = np.array(row.counts.alerts_by_bin) / np.maximum(totals, 1)
    axes.bar(np.arange(len(shares)), shares, color="#D55E00", width=0.9)
    axes.set_ylim(0, max(1.1 * float(shares.max()), 0.01))
    axes.set_ylabel("alert rate", fontsize=8)
    _time_ticks(axes, report)


def _scores(axes: Axes, row: ClusterRow) -> None:
    if row.counts.scores:
        edges, counts = score_bars(row)
        axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color="#0072B2")
        axes.set_yscale("log")
        axes.set_ylim(0.5, 2 * float(counts.max()))
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    for name, limit in limits_of(row):
        axes.axvline(limit, color="black", linestyle=":" if name == "flag" else "--")
    axes.set_xlabel("score, logits", fontsize=8)
    axes.set_ylabel("decisions", fontsize=8)


def _heat(heat: DecisionHeat) -> Figure:
    levels = np.array([token.levels for token in heat.tokens]).T
    start = 0
    if levels.shape[1] > MAX_TOKENS:
        highest = int(levels[heat.chosen].argmax())
        start = min(max(highest - MAX_TOKENS // 2, 0), levels.shape[1] - MAX_TOKENS)
    shown = heat.tokens[start : start + MAX_TOKENS]
    figure = Figure(
        figsize=(max(5, 0.16 * len(shown) + 2), 0.3 * len(heat.clusters) + 2), layout="constrained"
    )
    axes = figure.add_subplot()
    axes.imshow(
        levels[:, start : start + MAX_TOKENS], cmap="Oranges", vmin=0, vmax=N_HEAT, aspect="auto"
    )
    axes.set_yticks(range(len(heat.clusters)), heat.clusters, fontsize=7)
    marks = [_mark(token.text) or str(token.position) for token in shown]
    axes.set_xticks(range(len(shown)), marks, rotation=90, fontsize=6)
    axes.set_title(f"{heat.decision_id}, {heat.verdict}", fontsize=9)
    return figure


def _mark(text: str) -> str:
    """A token as a tick: on one line, short, and in letters that the font has."""
    plain = " ".join(text.split())[:12]
    return plain if plain.isascii() else ascii(plain)[1:-1]


def _time_ticks(axes: Axes, report: Report) -> None:
    bins = report.summary.bins
    places = sorted({0, bins.n // 2, bins.n - 1})
    axes.set_xticks(places, [time_label(bins, place) for place in places], fontsize=7)
