"""A report as one HTML file. It shows what the log holds, texts too where keys were given."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from monitor.audit_report.build import Report
from monitor.audit_report.charts import alert_chart, score_chart, traffic_chart
from monitor.audit_report.heat import DecisionHeat
from monitor.pages.document import render, visible

HERE = Path(__file__).resolve().parent
CLASS_MEANS = {
    "bitwise": "every number on record is the same",
    "numeric": "the same verdicts, scores within the bound of rounding",
    "decision": "the same verdicts",
    "flipped": "another verdict, of the policy or of a cluster",
}
"""What a replay's classes are; its own module would bring along all that scores."""


def page_of(report: Report) -> str:
    """The page as text."""
    return render(
        HERE,
        filters={
            "percent": lambda value: f"{value:.2%}",
            "signed": lambda value: f"{value:+.3%}",
            "score": lambda value: "–" if value is None else f"{value:.2f}",
            "count": lambda value: f"{value:,}",
            "visible": visible,
            "title_of": _title,
        },
        data={"decisions": [_data(heat) for heat in report.heats]},
        report=report,
        summary=report.summary,
        versions=[(dict(made_by), n) for made_by, n in report.summary.versions.most_common()],
        class_means=CLASS_MEANS,
        traffic=traffic_chart(report.summary),
        alert_charts=[alert_chart(row, report.summary) for row in report.clusters],
        score_charts=[score_chart(row) if row.counts.scores else None for row in report.clusters],
    )


def _data(heat: DecisionHeat) -> dict[str, Any]:
    """What the script needs of a decision beside the page's own text."""
    return {
        "clusters": heat.clusters,
        "tokens": [
            {
                "position": token.position,
                "text": token.text,
                "stage": token.stage,
                "fused": token.fused,
                "dense": token.dense,
                "sae": token.sae,
                "levels": token.levels,
            }
            for token in heat.tokens
        ],
        "explained": [asdict(why) for why in heat.explained],
        "latents": [asdict(found) for found in heat.latents],
    }


def _title(heat: DecisionHeat) -> str:
    return visible(f"{heat.decision_id}, {heat.verdict}, {heat.time}")
