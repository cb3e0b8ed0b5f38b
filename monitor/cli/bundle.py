"""`sae-monitor bundle`: check, show and seal the registered artefact."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.table import Table

from monitor.bundle import load_bundle, seal
from monitor.cli.common import bundle_folder, err, exit_on_error, out, progress_bar
from monitor.config import default_cache_dir

app = typer.Typer(help=__doc__, no_args_is_help=True)
Folder = Annotated[str, typer.Argument(help="A bundle's folder, or default.")]
Model = Annotated[Path | None, typer.Option(help="The model's folder.")]


@app.command()
def show(
    folder: Folder = "default", as_json: Annotated[bool, typer.Option("--json")] = False
) -> None:
    """What the bundle registers, and where its model is on this machine."""
    from monitor.model_store import converted_folder

    with exit_on_error():
        bundle = load_bundle(bundle_folder(folder))
    if as_json:
        package = bundle.spec.model.package
        model = None if package is None else converted_folder(package, default_cache_dir())
        content = yaml.safe_load((bundle.folder / "bundle.yaml").read_text(encoding="utf-8"))
        line = {
            "folder": str(bundle.folder),
            "digest": bundle.digest,
            "model_folder": str(model) if model is not None and model.is_dir() else None,
            "bundle": content,
        }
        sys.stdout.write(json.dumps(line) + "\n")
        return
    out.print(f"{bundle.label}  {'sealed' if bundle.sealed else 'not sealed'}  {bundle.digest}")
    out.print(f"model {bundle.spec.model.id}")
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


@app.command()
def check(folder: Folder = "default", model: Model = None) -> None:
    """Loads the bundle with its model, as the server would, and says what is not calibrated."""
    from monitor.local import load_local

    with exit_on_error(), progress_bar() as progress:
        served = load_local(
            bundle_folder(folder), model=model, cache=default_cache_dir(), progress=progress
        )
    for cluster, reason in served.uncalibrated_reasons.items():
        err.print(f"uncalibrated: {cluster}: {reason}", markup=False, highlight=False)
    n = len(served.bundle.spec.clusters)
    out.print(f"{served.bundle.label}: {n} clusters on {', '.join(served.hook_points)}, loads")


@app.command(name="seal")
def seal_command(folder: Folder) -> None:
    """Writes MANIFEST.json over what the folder holds now, and prints the digest."""
    with exit_on_error():
        out.print(seal(bundle_folder(folder)), highlight=False)


@app.command()
def fetch(folder: Folder = "default", model: Model = None) -> None:
    """Brings the bundle's model to this machine and prints its folder and digest."""
    from monitor.model_store import find_model

    with exit_on_error(), progress_bar() as progress:
        bundle = load_bundle(bundle_folder(folder))
        found = find_model(bundle, override=model, cache=default_cache_dir(), progress=progress)
    out.print(f"{found.folder}\n{found.digest}", highlight=False, soft_wrap=True)


@app.command()
def build(
    corpus: Annotated[Path, typer.Option(help="Folder of JSON lines with text and source.")],
    train: Annotated[Path, typer.Option(help="Labelled JSON lines to fit on.")],
    val: Annotated[Path, typer.Option(help="Labelled JSON lines to calibrate and measure on.")],
    out_folder: Annotated[Path, typer.Option("--out", help="The bundle to write.")],
    work: Annotated[Path, typer.Option(help="Intermediate files; a second run goes on there.")],
    folder: Annotated[
        str, typer.Option("--like", help="A bundle whose model is taken, or default.")
    ] = "default",
    model: Model = None,
) -> None:
    """Trains the SAE, finds latents, fits heads, calibrates, measures, and writes a bundle."""
    from monitor.model_store import find_model
    from sae_core.training.build import BuildInputs, build_default

    with exit_on_error(), progress_bar() as progress:
        reference = load_bundle(bundle_folder(folder))
        found = find_model(reference, override=model, cache=default_cache_dir(), progress=progress)
        inputs = BuildInputs(
            model_folder=found.folder,
            model_id=reference.spec.model.id,
            model_package=reference.spec.model.package,
            corpus=corpus,
            train=train,
            val=val,
            work=work,
            out=out_folder,
        )
        measured = build_default(
            inputs, lambda line: err.print(line, markup=False, highlight=False, soft_wrap=True)
        )
        digest = seal(out_folder)
    out.print(measured.to_markdown(), markup=False, highlight=False, soft_wrap=True)
    out.print(digest, highlight=False)
