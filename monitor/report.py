"""Decisions as a person reads them in a terminal: tokens shaded by risk, clusters, latents.

Pure rendering: records in, rich renderables out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from monitor.records import (
    Attribution,
    ClusterInfo,
    ClusterResult,
    Decision,
    Severity,
    TokenScores,
    Verdict,
)

# One hue, darker with risk, readable without telling red from green.
_SHADES = ("", "on #3b2a10", "on #6b4410", "on #a86400", "bold black on #ffa319")
_STEPS = (-0.5, 0.0, 0.5, 1.0)
"""On the policy's scale: 0 is the flag threshold, 1 the alert threshold."""
_VERDICT_STYLE = {
    Verdict.PASS: "green",
    Verdict.FLAG: "yellow",
    Verdict.ALERT: "bold red",
}


def token_level(token: TokenScores, clusters: Sequence[ClusterInfo]) -> float:
    """The token's highest fused logit on the policy's scale; NaN where it has no score."""
    if token.stage is None:
        return math.nan
    levels = [
        (logit - info.flag) / (info.alert - info.flag)
        for logit, info in zip(token.fused, clusters, strict=True)
        if token.stage in info.stages and not math.isnan(logit)
    ]
    return max(levels, default=math.nan)


def tokens_text(tokens: Sequence[TokenScores], clusters: Sequence[ClusterInfo]) -> Text:
    """The text with every token shaded by its own risk; tokens left out of scores are dim."""
    text = Text()
    for token in tokens:
        level = token_level(token, clusters)
        if math.isnan(level):
            text.append(token.text, style="dim")
        else:
            text.append(token.text, style=_SHADES[sum(level >= step for step in _STEPS)])
    return text


def verdict_text(verdict: Verdict) -> Text:
    """The verdict in its colour."""
    return Text(verdict.value.upper(), style=_VERDICT_STYLE[verdict])


def cluster_table(decision: Decision, n_rows: int = 4) -> Table:
    """The clusters with the highest fused scores, flagged ones first."""
    table = Table(box=None, pad_edge=False)
    for name, justify in (
        ("cluster", "left"),
        ("verdict", "left"),
        ("fused", "right"),
        ("dense", "right"),
        ("SAE", "right"),
        ("stage", "left"),
        ("first at", "right"),
        ("benign p", "right"),
    ):
        table.add_column(name, justify="right" if justify == "right" else "left")
    ranked = sorted(
        (c for c in decision.clusters if not math.isnan(c.fused)),
        key=lambda c: (-c.verdict.rank, -c.fused),
    )
    for c in ranked[:n_rows]:
        table.add_row(
            c.cluster,
            verdict_text(c.verdict),
            f"{c.fused:.2f}",
            f"{c.dense:.2f}",
            f"{c.sae:.2f}",
            "" if c.stage is None else c.stage.value,
            "" if c.first_crossing is None else str(c.first_crossing),
            _p_value(c),
        )
    return table


def attribution_text(result: ClusterResult, tokens: Mapping[int, str], n_latents: int = 4) -> Text:
    """Which terms made a cluster's score; `tokens` maps positions to their text."""
    explained = result.attribution
    if explained is None:
        return Text()
    text = Text(f"  {result.cluster} = {result.fused:.2f} over tokens ", style="dim")
    text.append(f"{explained.window_start}..{explained.window_stop - 1}", style="dim")
    text.append(f": bias {explained.bias:+.2f}, dense {explained.dense:+.2f}", style="dim")
    if explained.gate:
        text.append(f", evidence gate {explained.gate:+.2f}", style="dim")
    for latent in explained.latents[:n_latents]:
        text.append(f"\n    latent {latent.sae}/{latent.latent_id:<6}", style="cyan")
        text.append(f" {latent.contribution:+.2f}  {latent.label or '(no label)'}")
        where = " ".join(tokens.get(p, "").strip() for p in latent.positions[:6])
        if where:
            text.append(f"  at: {where}", style="dim")
    hidden = _rest(explained, n_latents)
    if hidden:
        text.append(f"\n    {hidden} more latents", style="dim")
    return text


def decision_view(decision: Decision, clusters: Sequence[ClusterInfo]) -> RenderableType:
    """Everything of one decision: shaded text, verdict, clusters, and why."""
    header = Text.assemble(
        "verdict ",
        verdict_text(decision.verdict),
        f"  action {decision.action.value}  overall {_score(decision.overall.fused)}"
        f"  scored {decision.coverage.scored} of {decision.coverage.received} tokens"
        f"  {decision.timings.total_seconds * 1000:.0f} ms",
    )
    texts = {token.position: token.text for token in decision.tokens}
    why = [
        attribution_text(c, texts)
        for c in decision.clusters
        if c.attribution is not None and c.verdict is not Verdict.PASS
    ]
    parts: list[RenderableType] = []
    if decision.tokens:
        parts.append(tokens_text(decision.tokens, clusters))
    return Group(*parts, header, cluster_table(decision), *why)


def severity_style(severity: Severity) -> str:
    """The style of a severity's name."""
    return {"info": "blue", "warning": "yellow", "critical": "bold red"}[severity.value]


def _p_value(result: ClusterResult) -> str:
    if result.benign_p is None:
        return "uncalibrated" if not result.calibrated else ""
    return f"{result.benign_p:.3f}"


def _score(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.2f}"


def _rest(explained: Attribution, shown: int) -> int:
    return max(0, len(explained.latents) - shown)
