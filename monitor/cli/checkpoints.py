"""`sae-monitor audit checkpoints`: copies for a place where nobody can edit them."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from monitor.audit_log.retention import export_checkpoints
from monitor.cli.common import Audit, exit_on_error

app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.command()
def export(
    audit: Audit,
    after: Annotated[int, typer.Option(help="Only those beyond this sequence.", min=0)] = 0,
) -> None:
    """Writes every checkpoint to stdout, one JSON object a line; `audit verify` takes them back."""
    with exit_on_error():
        for statement in export_checkpoints(audit):
            if statement.sequence > after:
                sys.stdout.write(json.dumps(statement.to_json()) + "\n")
