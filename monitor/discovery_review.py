"""What was found, for a person to judge: tables in a terminal, a page of HTML, plain JSON.

Pure rendering. The page needs nothing from elsewhere and runs no script; texts are escaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import jinja2
from rich.markup import escape
from rich.table import Table

from sae_core.training.findings import RiskFindings, SilentFindings

Findings = Mapping[str, tuple[RiskFindings, ...]]
Silent = Mapping[str, tuple[SilentFindings, ...]]

_templates = jinja2.Environment(
    loader=jinja2.PackageLoader("monitor", "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
)


def review_page(bundle: str, n_texts: int, findings: Findings, silent: Silent) -> str:
    """The whole page."""
    return _templates.get_template("discovery.html").render(
        bundle=bundle, n_texts=n_texts, findings=findings, silent=silent, number=_number
    )


def review_table(sae_id: str, risk: RiskFindings) -> Table:
    """One risk's latents."""
    title = f"{risk.plan.id} in {sae_id}: {len(risk.used)} used of {len(risk.latents)} selected"
    table = Table(box=None, title=escape(title), title_justify="left")
    for name in ("latent", "AUROC", "left out", "length", "keyword", "stable", "group", "weight"):
        table.add_column(name, justify="right")
    table.add_column("flags", style="red")
    table.add_column("label", overflow="fold")
    for x in risk.latents:
        table.add_row(
            str(x.latent_id),
            _number(x.auroc),
            _number(x.audit.left_out),
            _number(x.audit.like_length),
            _number(x.audit.without_keywords),
            f"{x.stability:.2f}",
            str(x.group),
            f"{x.weight:.3g}",
            ", ".join(x.audit.flags),
            escape(x.label),
        )
    return table


def silent_table(sae_id: str, silence: SilentFindings) -> Table:
    """The latents of one silence."""
    plan = silence.plan
    title = f"{plan.id} in {sae_id}: {len(silence.latents)} go silent in {', '.join(plan.event)}"
    table = Table(box=None, title=escape(title), title_justify="left")
    names = ("latent", "fires in reference", "in event", "AUROC", "left out", "stable", "group")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("flags", style="red")
    table.add_column("label", overflow="fold")
    for x in silence.latents:
        table.add_row(
            str(x.found.latent_id),
            f"{x.fires_on_reference:.1%}",
            f"{x.fires_on_event:.1%}",
            _number(x.found.auroc),
            _number(x.found.audit.left_out),
            f"{x.found.stability:.2f}",
            str(x.found.group),
            ", ".join(x.found.audit.flags),
            escape(x.found.label),
        )
    return table


def findings_json(bundle: str, n_texts: int, findings: Findings, silent: Silent) -> dict[str, Any]:
    """Everything as plain data, examples with their texts."""
    return {
        "schema": 1,
        "bundle": bundle,
        "n_texts": n_texts,
        "saes": {sae_id: [asdict(risk) for risk in risks] for sae_id, risks in findings.items()},
        "silent": {sae_id: [asdict(one) for one in some] for sae_id, some in silent.items()},
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
