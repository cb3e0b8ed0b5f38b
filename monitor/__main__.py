"""`python -m monitor` and the `sae-monitor` command."""

from __future__ import annotations

from monitor.cli.app import app


def main() -> None:
    """Runs the command line; exit codes are listed in the README."""
    app()


if __name__ == "__main__":
    main()
