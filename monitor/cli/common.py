"""What the commands share: consoles, exit codes, and where things are by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from monitor.errors import AuditChainError, MonitorError
from sae_core.errors import SAECoreError

ProgressCall = Callable[[str, float], None]
"""What is being done, and the share of it that is done."""

EXIT_FAILED = 1
"""The work was done and the answer is bad: a broken chain, a line that could not be scored."""
EXIT_USAGE = 2
"""The work could not start: bad bundle, model, settings, port in use."""

DEFAULT_BUNDLE = Path(__file__).resolve().parent.parent / "bundles" / "gemma3-270m-default"

out = Console()
"""Results; machine output bypasses it."""
err = Console(stderr=True)
"""Diagnostics and progress."""


def bundle_folder(name: str) -> Path:
    """The folder of a bundle given by path, or of the one that ships as `default`."""
    return DEFAULT_BUNDLE if name == "default" else Path(name)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """One clear line on stderr and exit code 2 for whatever the service or the numbers refuse.

    A broken audit chain is an answer, not a refusal, and passes through.
    """
    try:
        yield
    except AuditChainError:
        raise
    except (MonitorError, SAECoreError) as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_USAGE) from None


@contextmanager
def progress_bar() -> Iterator[ProgressCall]:
    """A bar on stderr that shows what is being done, how far it is and how long it will take."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    )
    task: list[int] = []

    def show(what: str, share: float) -> None:
        if not task:
            bar.start()
            task.append(bar.add_task(what, total=1.0))
        bar.update(task[0], description=what, completed=share)  # type: ignore[arg-type]

    try:
        yield show
    finally:
        if task:  # one that never started would still write an empty line
            bar.stop()
