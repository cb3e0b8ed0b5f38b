"""`sae-monitor report`: an audit log as one page."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from monitor.bundle import load_bundle
from monitor.cli.audit_filters import Since, seconds_of
from monitor.cli.common import (
    EXIT_FAILED,
    EXIT_USAGE,
    Audit,
    bundle_folder,
    err,
    exit_on_error,
    out,
    progress_bar,
    read_file,
    require,
    write_whole,
)
from monitor.errors import SettingsError


def report(
    audit: Audit,
    page: Annotated[Path, typer.Option("--out", help="The HTML file to write.")],
    bundle: Annotated[
        str | None,
        typer.Option(help="Gives titles, labels and thresholds: a folder, or default."),
    ] = None,
    compare_bundle: Annotated[
        str | None,
        typer.Option(help="Shows what this one would have said of --bundle's decisions."),
    ] = None,
    replays: Annotated[
        list[Path] | None,
        typer.Option(
            "--replay", help="A folder of sae-monitor replay; may be given several times."
        ),
    ] = None,
    since: Since = None,
    until: Since = None,
    decision: Annotated[
        list[str] | None,
        typer.Option(help="Shown token by token; the latest alerts where none is given."),
    ] = None,
    keys_file: Annotated[
        Path | None, typer.Option(help="Keys that open tokens; the page then shows them.")
    ] = None,
    public_key: Annotated[
        str | None, typer.Option(help="The signer's of the checkpoints, in hexadecimal.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for the same charts as PNG (extra plots).")
    ] = None,
) -> None:
    """Traffic, coverage, alerts, scores, latents, single decisions and the chain, on one page.

    Exit code 1 where the chain does not hold; the page is written and says so.
    """
    from monitor.audit_log.sealing import KeyRing
    from monitor.audit_report.build import build_report
    from monitor.audit_report.page import page_of

    if compare_bundle is not None and bundle is None:
        err.print("error: --compare-bundle: expected --bundle with it", style="red")
        raise typer.Exit(EXIT_USAGE)
    with exit_on_error(), progress_bar() as progress:
        if replays:
            require("pyarrow", "parquet", "--replay")
        keys = None
        if keys_file is not None:
            keys = KeyRing.parse(read_file(keys_file).decode(errors="replace"), str(keys_file))
        found = build_report(
            audit,
            now=datetime.now(UTC),
            bundle=None if bundle is None else load_bundle(bundle_folder(bundle)),
            challenger=None
            if compare_bundle is None
            else load_bundle(bundle_folder(compare_bundle)),
            replays=replays or (),
            since=seconds_of(since),
            until=seconds_of(until),
            decisions=decision or (),
            keys=keys,
            public_key=public_key,
            progress=progress,
        )
        written = [page]
        write_whole(page, page_of(found))
        if plots is not None:
            try:
                from monitor.audit_report.plots import write_plots
            except ModuleNotFoundError as error:
                raise SettingsError(
                    f"--plots needs {error.name}, which is not installed; "
                    "pip install 'sae-monitor[plots]' brings it"
                ) from None
            written += write_plots(found, plots)
    for path in written:
        out.print(str(path), markup=False, highlight=False, soft_wrap=True)
    if found.broken:
        err.print(f"broken: {found.broken}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(EXIT_FAILED)
