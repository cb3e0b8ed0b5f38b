"""What the commands share: consoles, exit codes, and where things are by default."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from monitor.errors import AuditChainError, MonitorError, SettingsError
from sae_core.errors import SAECoreError

ProgressCall = Callable[[str, float], None]
"""What is being done, and the share of it that is done."""

EXIT_FAILED = 1
"""The work was done and the answer is bad: a broken chain, a line that could not be scored."""
EXIT_USAGE = 2
"""The work could not start: bad bundle, model, settings, port in use."""

EXIT_STOPPED = 130
"""Stopped by Ctrl-C; a run that had begun can go on."""

DEFAULT_BUNDLE = Path(__file__).resolve().parent.parent / "bundles" / "gemma3-270m-default"

Audit = Annotated[
    str, typer.Option("--audit", help="The log's URL, sqlite:///PATH or postgresql://...")
]
AsJson = Annotated[bool, typer.Option("--json", help="Machine output on stdout.")]

out = Console()
"""Results; machine output bypasses it."""
err = Console(stderr=True)
"""Diagnostics and progress."""


def bundle_folder(name: str) -> Path:
    """The folder of a bundle given by path, or of the one that ships as `default`."""
    return DEFAULT_BUNDLE if name == "default" else Path(name)


def require(module: str, extra: str, what: str) -> None:
    """SettingsError, which says what brings it, where a module is not installed."""
    if importlib.util.find_spec(module) is None:
        raise SettingsError(
            f"{what}: needs {module}, which is not installed; "
            f"pip install 'sae-monitor[{extra}]' brings it"
        )


def read_file(path: Path) -> bytes:
    """The file's bytes, or those of stdin for `-`; SettingsError where they cannot be had."""
    if str(path) == "-":
        return sys.stdin.buffer.read()
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None


def write_whole(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all; SettingsError where it cannot."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be written: {error.strerror}") from None


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
