"""`sae-monitor audit keys`: fresh keys for the audit log."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from monitor.audit_log.checkpoint import new_signing_key
from monitor.audit_log.sealing import new_key
from monitor.cli.common import exit_on_error
from monitor.errors import SettingsError

app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.command()
def new(name: Annotated[str, typer.Argument(help="What records will call it.")]) -> None:
    """Prints a line for the file of keys; put it first, and it seals from the next start on."""
    with exit_on_error():
        sys.stdout.write(new_key(name) + "\n")


@app.command()
def new_signing(file: Annotated[Path, typer.Argument(help="Written for its owner only.")]) -> None:
    """Makes a key that signs checkpoints; prints the public key that `audit verify` wants."""
    with exit_on_error():
        pem, public_key = new_signing_key()
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise SettingsError(f"signing key {file}: cannot be made: {error.strerror}") from None
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(pem)
    sys.stdout.write(public_key + "\n")
