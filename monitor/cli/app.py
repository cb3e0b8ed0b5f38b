"""The commands of `sae-monitor`, joined."""

from __future__ import annotations

import typer

from monitor import __version__
from monitor.cli import audit, bundle, serve
from monitor.cli.calibrate import calibrate
from monitor.cli.discover import discover
from monitor.cli.evaluate import evaluate
from monitor.cli.export import export_onnx
from monitor.cli.replay import replay
from monitor.cli.report import report
from monitor.cli.score import score
from monitor.cli.train_sae import train_sae
from monitor.cli.what_if import what_if

app = typer.Typer(
    name="sae-monitor",
    help="Inference-time safety monitor for open-weight LLMs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(serve.demo)
app.command()(serve.serve)
app.command()(serve.health)
app.command()(score)
app.command()(replay)
app.command(name="export-onnx")(export_onnx)
app.command(name="train-sae")(train_sae)
app.command()(discover)
app.command()(calibrate)
app.command()(evaluate)
app.command(name="what-if")(what_if)
app.command()(report)
app.add_typer(bundle.app, name="bundle")
app.add_typer(audit.app, name="audit")


@app.command()
def version() -> None:
    """Prints the version."""
    typer.echo(__version__)
