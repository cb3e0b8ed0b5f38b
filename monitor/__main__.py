"""`python -m monitor` and the `sae-monitor` command."""

from __future__ import annotations

from monitor.cli.app import app
from monitor.config import configure_logging, wait_briefly


def main() -> None:
    """Runs the command line; exit codes are listed in the README."""
    wait_briefly()
    # Before any warning: structlog's own default prints to stdout, among the results. `serve`
    # configures it again, by its settings.
    configure_logging("warning", as_json=False)
    app()


if __name__ == "__main__":
    main()
