"""`sae-monitor bundle`: check, show, compare and seal the registered artefact."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.table import Table

from monitor.bundle import Bundle, load_bundle, seal
from monitor.cli.baseline import baseline
from monitor.cli.bundle_diff import diff
from monitor.cli.common import EXIT_FAILED, bundle_folder, err, exit_on_error, out, progress_bar
from monitor.config import default_cache_dir
from monitor.errors import SAEStoreError

if TYPE_CHECKING:
    from monitor.fidelity import SAEFidelity
    from monitor.model_store import Progress
    from monitor.served import Served

NEAREST_SHOWN = 5
"""Mistakes in the table that were tried and do not fit."""

app = typer.Typer(help=__doc__, no_args_is_help=True)
app.command()(diff)
app.command()(baseline)
Folder = Annotated[str, typer.Argument(help="A bundle's folder, or default.")]
Model = Annotated[Path | None, typer.Option(help="The model's folder.")]


@app.command()
def show(
    folder: Folder = "default", as_json: Annotated[bool, typer.Option("--json")] = False
) -> None:
    """What the bundle registers, and where its model and SAEs are on this machine."""
    from monitor.model_store import converted_folder

    with exit_on_error():
        bundle = load_bundle(bundle_folder(folder))
        saes = _sae_lines(bundle)
    if as_json:
        package = bundle.spec.model.package
        model = None if package is None else converted_folder(package, default_cache_dir())
        content = yaml.safe_load((bundle.folder / "bundle.yaml").read_text(encoding="utf-8"))
        line = {
            "folder": str(bundle.folder),
            "digest": bundle.digest,
            "model_folder": str(model) if model is not None and model.is_dir() else None,
            "saes": saes,
            "bundle": content,
        }
        sys.stdout.write(json.dumps(line) + "\n")
        return
    out.print(f"{bundle.label}  {'sealed' if bundle.sealed else 'not sealed'}  {bundle.digest}")
    out.print(f"model {bundle.spec.model.id}")
    for sae_id, line in saes.items():
        hints = "".join(f" {name}={value}" for name, value in line["hints"].items())
        out.print(
            f"sae {sae_id} {line['origin']} at {line['hook_point']}{hints}: "
            f"{line['path'] or line['problem']}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    table = Table(box=None)
    for name in ("cluster", "severity", "stages", "latents", "dense", "flag", "alert", "title"):
        table.add_column(name)
    for c in bundle.spec.clusters:
        table.add_row(
            c.id,
            c.severity.value,
            ", ".join(stage.value for stage in c.stages),
            str(len(c.latents)),
            "yes" if c.dense_head else "no",
            f"{c.thresholds.flag:.2f}",
            f"{c.thresholds.alert:.2f}",
            c.title,
        )
    out.print(table)


def _sae_lines(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """Each SAE's place and hints, and where it is on this machine, without asking the hub."""
    from monitor.hub import HubAccess
    from monitor.sae_store import hub_place, locate

    lines = {}
    for sae_id, ref in bundle.spec.saes.items():
        line: dict[str, Any] = {
            "origin": ref.path,
            "hook_point": ref.hook_point,
            "hints": dict(ref.hints),
            "path": None,
            "problem": None,
        }
        try:
            if ref.path is None:
                place, hints = hub_place(ref)
                line |= {"origin": f"{place.repo}@{place.revision}:{place.path}", "hints": hints}
            found = locate(ref, bundle.folder, hub=HubAccess(), is_local_only=True)
            line |= {"origin": found.origin, "path": str(found.path)}
        except SAEStoreError as error:
            line["problem"] = str(error)
        lines[sae_id] = line
    return lines


@app.command()
def check(folder: Folder = "default", model: Model = None) -> None:
    """Loads the bundle with its model, as the server would, measures its SAEs, runs its canaries.

    Says what is not calibrated. Exit code 1 where an SAE does not fit the stream it reads (the
    table then has what was tried to find out why), or a cluster fails its canaries.
    """
    from monitor.bundle_canaries import check_canaries
    from monitor.fidelity import check_fidelity

    with exit_on_error(), progress_bar() as progress:
        served = _load(folder, model, progress)
        progress("measuring the SAEs on the probe texts", 0.0)
        judged = check_fidelity(served)
        progress("running the canaries", 0.0)
        failing = asyncio.run(check_canaries(served))
    for one in judged:
        out.print(_fidelity_table(one))
        if one.causes:
            out.print(_tried_table(one))
    for cluster, reason in served.uncalibrated_reasons.items():
        err.print(f"uncalibrated: {cluster}: {reason}", markup=False, highlight=False)
    if served.expected is None:
        err.print(f"no baseline: {served.no_baseline}", markup=False, highlight=False)
    if not served.bundle.canaries:
        err.print("no canaries: nothing proves that alerts would come", highlight=False)
    n = len(served.bundle.spec.clusters)
    out.print(f"{served.bundle.label}: {n} clusters on {', '.join(served.hook_points)}, loads")
    unfit = [one for one in judged if not one.fits]
    for one in unfit:
        err.print(one.message, markup=False, highlight=False, soft_wrap=True)
    for line in failing:
        err.print(f"canaries: {line}", markup=False, highlight=False, soft_wrap=True)
    if unfit or failing:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def measure(
    folder: Folder,
    model: Model = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write even where another place fits better.")
    ] = False,
    canary_data: Annotated[
        list[Path] | None,
        typer.Option(help="Labelled JSON lines to pick canaries from, where there are none."),
    ] = None,
) -> None:
    """Writes fidelity/<sae>.json: what each SAE gives on the probe texts, here and now.

    For a bundle whose SAEs are known to belong where they are; later starts are held to these
    numbers. Where an SAE reconstructs another place better than its own, nothing is written and
    the exit code is 1. Without fidelity.jsonl, probe texts of general prose are written first.

    Then canaries/expected.json: what the canaries score. Where one does not get its verdict that
    is not written, and the exit code is 1.
    """
    from monitor.bundle_canaries import write_canaries
    from monitor.bundle_fidelity import write_bands, write_default_probes
    from sae_core.evaluation.data import read_labelled

    with exit_on_error(), progress_bar() as progress:
        rows = [row for path in canary_data or () for row in read_labelled(path)]
        place = bundle_folder(folder)
        added = write_default_probes(place)
        served = _load(folder, model, progress)
        outcome = write_bands(served, force=force)
        canaries = asyncio.run(write_canaries(served, rows, force=force, progress=progress))
    if added:
        out.print(f"{added}: written")
    for line in (*outcome.written, *canaries.written):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in (*outcome.doubts, *canaries.problems):
        err.print(line, markup=False, highlight=False, soft_wrap=True)
    if canaries.refused or (outcome.doubts and not force):
        raise typer.Exit(EXIT_FAILED)


def _load(folder: str, model: Path | None, progress: Progress) -> Served:
    from monitor.local import load_local

    return load_local(
        bundle_folder(folder),
        model=model,
        cache=default_cache_dir(),
        check_fit=False,
        progress=progress,
    )


def _fidelity_table(one: SAEFidelity) -> Table:
    """Numbers beside their bands."""
    from sae_core.fidelity import FIRING_AGREEMENT

    m, b = one.measured, one.bands
    table = Table(box=None, title=f"SAE {one.sae} at {one.hook_point}", title_justify="left")
    for name in ("", "measured", "expected", ""):
        table.add_column(name, overflow="fold")

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    def row(name: str, value: float | None, expected: str, word: str) -> None:
        outside = any(problem.startswith(word) for problem in one.problems)
        word = "not measured" if value is None else "OUTSIDE" if outside else "ok"
        table.add_row(name, number(value), expected, word)

    def band(least: float | None, most: float | None) -> str:
        return f"{number(least)} to {number(most)}"

    row("probe tokens", m.n_tokens, str(b.n_tokens), "the probe texts")
    row("FVU", m.fvu, band(b.fvu_min, b.fvu_max), "FVU")
    row("FVU, median dimension", m.fvu_median, band(b.fvu_median_min, b.fvu_median_max), "median")
    row("L0", m.l0, band(b.l0_min, b.l0_max), "L0")
    agreement = b.firing_agreement(m)
    row("registered latents fire as before", agreement, f">= {FIRING_AGREEMENT}", "registered")
    not_held = f"{len(b.silent)} of {len(b.firings)}"
    table.add_row("fire on no probe text", not_held, "", "not held")
    return table


def _tried_table(one: SAEFidelity) -> Table:
    """What was tried to find out why, what fits first, and the nearest of what does not."""
    table = Table(box=None, title="tried, the likeliest first", title_justify="left")
    for name in ("", "FVU", "L0", "what"):
        table.add_column(name, overflow="fold")
    n_fitting = sum(cause.explains for cause in one.causes)
    shown = one.causes[: n_fitting + NEAREST_SHOWN]
    for cause in shown:
        fvu = "-" if cause.measured.fvu is None else f"{cause.measured.fvu:.4g}"
        word, what = ("FITS", cause.what) if cause.explains else ("no", cause.tried)
        table.add_row(word, fvu, f"{cause.measured.l0:.4g}", what)
    if left := len(one.causes) - len(shown):
        table.add_row("no", "", "", f"and {left} more, farther off")
    return table


@app.command(name="seal")
def seal_command(folder: Folder) -> None:
    """Pins SAEs that are not in the folder, writes MANIFEST.json, and prints the digest."""
    from monitor.sae_pins import pin_saes

    with exit_on_error(), progress_bar() as progress:
        pin_saes(bundle_folder(folder), cache=default_cache_dir(), progress=progress)
        digest = seal(bundle_folder(folder))
    out.print(digest, highlight=False)


@app.command()
def fetch(folder: Folder = "default", model: Model = None) -> None:
    """Brings the bundle's model and SAEs to this machine; prints the model's folder and digest.

    Every file is read and compared with its sha256, also those that were compared before.
    """
    from monitor.model_store import find_model
    from monitor.sae_store import find_saes

    with exit_on_error(), progress_bar() as progress:
        bundle = load_bundle(bundle_folder(folder))
        cache = default_cache_dir()
        saes = find_saes(bundle, cache=cache, again=True, progress=progress)
        found = find_model(bundle, override=model, cache=cache, progress=progress)
    out.print(f"{found.folder}\n{found.digest}", highlight=False, soft_wrap=True)
    for sae_id, files in saes.items():
        line = f"sae {sae_id}: {files.path}"
        out.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def build(
    corpus: Annotated[Path, typer.Option(help="Folder of JSON lines with text and source.")],
    train: Annotated[Path, typer.Option(help="Labelled JSON lines to fit on.")],
    val: Annotated[Path, typer.Option(help="Labelled JSON lines to calibrate and measure on.")],
    out_folder: Annotated[Path, typer.Option("--out", help="The bundle to write.")],
    work: Annotated[Path, typer.Option(help="Intermediate files; a second run goes on there.")],
    folder: Annotated[
        str,
        typer.Option(
            "--like",
            help="A bundle whose model is taken, and the version after its own; or default.",
        ),
    ] = "default",
    model: Model = None,
) -> None:
    """Trains the SAEs, finds latents, fits heads, calibrates, measures, and writes a bundle."""
    from monitor.bundle_canaries import write_canaries
    from monitor.model_store import find_model
    from sae_core.training.build import build_default
    from sae_core.training.build_heads import BuildInputs

    with exit_on_error(), progress_bar() as progress:
        reference = load_bundle(bundle_folder(folder))
        found = find_model(reference, override=model, cache=default_cache_dir(), progress=progress)
        inputs = BuildInputs(
            model_folder=found.folder,
            model_id=reference.spec.model.id,
            model_package=reference.spec.model.package,
            version=reference.spec.version + 1,
            corpus=corpus,
            train=train,
            val=val,
            work=work,
            out=out_folder,
        )
        measured = build_default(
            inputs, lambda line: err.print(line, markup=False, highlight=False, soft_wrap=True)
        )
        served = _load(str(out_folder), model, progress)
        canaries = asyncio.run(write_canaries(served, ()))
        digest = seal(out_folder)
    for line in (*canaries.written, *canaries.problems):
        err.print(line, markup=False, highlight=False, soft_wrap=True)
    out.print(measured.to_markdown(), markup=False, highlight=False, soft_wrap=True)
    out.print(digest, highlight=False)
