"""The commands of `sae-monitor`, joined."""

from __future__ import annotations

import typer

from monitor import __version__
from monitor.cli import audit, bundle, serve
from monitor.cli.score import score

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
app.add_typer(bundle.app, name="bundle")
app.add_typer(audit.app, name="audit")


@app.command()
def version() -> None:
    """Prints the version."""
    typer.echo(__version__)
