"""`sae-monitor discover`: which latents of a bundle's SAEs speak of a risk."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from monitor.cli.common import bundle_folder, exit_on_error, out, progress_bar
from monitor.config import default_cache_dir


def discover(
    data: Annotated[list[Path], typer.Option(help="Labelled JSON lines: text, label, category.")],
    out_folder: Annotated[Path, typer.Option("--out", help="Where findings and bundle go.")],
    folder: Annotated[str, typer.Option("--bundle", help="A bundle's folder, or default.")] = (
        "default"
    ),
    model: Annotated[Path | None, typer.Option(help="The model's folder.")] = None,
    risk: Annotated[
        list[str] | None,
        typer.Option(help="id=category,category or id=* for any; default: every category."),
    ] = None,
    silent: Annotated[
        list[str] | None,
        typer.Option(
            help="id=event,event:reference,reference: latents that fire on texts of the "
            "reference's categories and go silent in the event's."
        ),
    ] = None,
    fdr: Annotated[float, typer.Option(help="False discovery rate.")] = 0.01,
    stability: Annotated[float, typer.Option(help="Least share of halves that select.")] = 0.7,
    latents: Annotated[int, typer.Option(min=1, help="Latents a risk keeps, in each SAE.")] = 32,
    endpoint: Annotated[
        str | None,
        typer.Option(help="OpenAI-compatible URL that names latents; examples are sent to it."),
    ] = None,
    endpoint_model: Annotated[str, typer.Option(help="Its model's name.")] = "default",
    endpoint_key: Annotated[Path | None, typer.Option(help="File with its key.")] = None,
) -> None:
    """Finds, audits and groups the latents of each risk, for a person to review.

    Writes findings.json, review.html, and bundle/ with the latents that passed: weights fitted,
    thresholds provisional and not calibrated. Activations stay in work/ for another run.
    """
    from monitor.discovery import discover as find
    from monitor.discovery import relabelled, risks_of, silences_of, write_proposal
    from monitor.discovery_review import (
        findings_json,
        review_page,
        review_table,
        silent_table,
    )
    from monitor.label_endpoint import LabelEndpoint
    from monitor.local import load_local
    from sae_core.evaluation.data import read_labelled
    from sae_core.training.findings import DiscoverySettings

    with exit_on_error(), ExitStack() as stack:
        settings = DiscoverySettings(
            false_discovery_rate=fdr, min_stability=stability, n_latents=latents
        )
        rows = tuple(row for path in data for row in read_labelled(path))
        plans = risks_of(rows, risk or (), min_positive=settings.min_positive)
        silences = silences_of(rows, silent or ())
        namer = (
            None
            if endpoint is None
            else stack.enter_context(LabelEndpoint(endpoint, endpoint_model, endpoint_key))
        )
        with progress_bar() as progress:
            served = load_local(
                bundle_folder(folder), model=model, cache=default_cache_dir(), progress=progress
            )
            found = find(
                *(served, rows, plans, out_folder / "work", settings, progress),
                silences=silences,
            )
            if namer is not None:
                found = relabelled(found, lambda risk, i: namer.label(risk.latents[i]))
        label = served.bundle.label
        content = findings_json(label, found.n_texts, found.findings, found.silent)
        (out_folder / "findings.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        page = review_page(label, found.n_texts, found.findings, found.silent)
        (out_folder / "review.html").write_text(page, "utf-8")
        for sae_id, risks in found.findings.items():
            for one in risks:
                out.print(review_table(sae_id, one))
            for silence in found.silent[sae_id]:
                out.print(silent_table(sae_id, silence))
        written = write_proposal(served, found, out_folder / "bundle")
    out.print(f"{out_folder / 'bundle'}: {', '.join(written)}", highlight=False, soft_wrap=True)
    out.print("thresholds are provisional; next: bundle measure, calibrate", highlight=False)
