"""`sae-monitor evaluate`: labelled texts to figures, beside what any monitor must beat."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from monitor.cli.common import (
    EXIT_USAGE,
    bundle_folder,
    err,
    exit_on_error,
    out,
    progress_bar,
    write_whole,
)
from monitor.cli.placement import (
    Backend,
    Device,
    Dtype,
    Gpus,
    Onnx,
    TensorParallel,
    placement,
)
from monitor.config import default_cache_dir

if TYPE_CHECKING:
    from monitor.evaluation.result import EvaluationResult, Interval, Question, VerdictRate


def evaluate(
    data: Annotated[
        list[Path] | None,
        typer.Option(help="JSON lines with text and label; may be given several times."),
    ] = None,
    bundle: Annotated[str, typer.Option(help="A bundle's folder, or default.")] = "default",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here; - is stdout.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write the report here; it shows texts.")
    ] = None,
    train: Annotated[
        list[Path] | None, typer.Option(help="Labelled rows that TF-IDF is trained on.")
    ] = None,
    policy: Annotated[str, typer.Option(help="The bundle's policy to judge by.")] = "default",
    bootstrap: Annotated[int, typer.Option(help="Resamples for the intervals.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of resamples, samples and disguises.")] = 0,
    robustness_rows: Annotated[
        int, typer.Option(help="Harmful rows to disguise, half as many benign; 0 skips it.")
    ] = 200,
    leave_one_source_out: Annotated[
        bool,
        typer.Option("--leave-one-source-out", help="Fit heads anew without each source."),
    ] = False,
    with_prompts: Annotated[
        bool, typer.Option("--with-prompts", help="Read completions after their prompts.")
    ] = False,
    model: Annotated[Path | None, typer.Option(help="The model's folder.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Where token logits are kept; the cache by default.")
    ] = None,
    device: Device = "cpu",
    gpus: Gpus = 1,
    tensor_parallel: TensorParallel = 1,
    dtype: Dtype = "float32",
    backend: Backend = "torch",
    onnx: Onnx = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of the result and stop.")
    ] = False,
) -> None:
    """Figures with intervals, verdict rates against the claim, and how fragile it all is."""
    from monitor.evaluation.page import page_of
    from monitor.evaluation.result import EvaluationResult
    from monitor.evaluation.run import EvaluationPlan
    from monitor.evaluation.run import evaluate as run_evaluation
    from monitor.local import load_local

    if schema:
        sys.stdout.write(json.dumps(EvaluationResult.model_json_schema(), indent=1) + "\n")
        return
    if not data:
        err.print("error: --data: found none, expected at least one file", style="red")
        raise typer.Exit(EXIT_USAGE)
    for option, path in (("--json", json_file), ("--html", html_file)):
        if path is not None and not path.resolve().parent.is_dir():
            err.print(f"error: {option}: found no folder {path.parent}, expected one", style="red")
            raise typer.Exit(EXIT_USAGE)
    with exit_on_error(), progress_bar() as progress:
        placed = placement(device, dtype, gpus, tensor_parallel, backend, onnx)
        served = load_local(
            bundle_folder(bundle),
            model=model,
            cache=default_cache_dir(),
            progress=progress,
            **placed,
        )
        plan = EvaluationPlan(
            data=data,
            train=train or (),
            policy=policy,
            n_resamples=bootstrap,
            seed=seed,
            with_prompts=with_prompts,
            battery_rows=robustness_rows,
            unseen=leave_one_source_out,
            work=work or default_cache_dir() / "evaluation",
        )
        with closing(served):
            found = run_evaluation(served, plan, progress)
        if html_file is not None:
            write_whole(html_file, page_of(found))
    text = found.result.model_dump_json(by_alias=True, indent=1) + "\n"
    if json_file is not None and str(json_file) == "-":
        sys.stdout.write(text)
        return
    if json_file is not None:
        write_whole(json_file, text)
    _show(found.result)


def _show(result: EvaluationResult) -> None:
    _question("overall", result.overall)
    _clusters("clusters, AUROC", result.clusters)
    if result.unseen is not None:
        _question("without their source, overall", result.unseen.overall)
        _clusters("without their source, clusters, AUROC", result.unseen.clusters)
    for difference in result.overall.differences:
        word = "better than" if difference.is_better else "not shown to be better than"
        out.print(
            f"{difference.score} is {word} {difference.minus}: AUROC {_cell(difference.auroc)}",
            highlight=False,
        )
    table = Table(box=None, title="raised", title_justify="left")
    for name in ("rows", "verdict", "raised", "rate", "claimed", ""):
        table.add_column(name)
    for rate in result.verdicts:
        table.add_row(*_rate_cells(rate))
    out.print(table)
    cost = result.cost
    out.print(
        f"{cost.n_texts} texts, {cost.n_tokens} tokens, {cost.ms_per_text:.1f} ms a text, "
        f"{cost.ms_per_1000_tokens:.0f} ms for 1,000 tokens",
        highlight=False,
    )
    for what, why in result.absent.items():
        err.print(f"absent: {what}: {why}", markup=False, highlight=False)


def _question(title: str, question: Question) -> None:
    table = Table(
        box=None,
        title=f"{title}: {question.n_harmful} harmful, {question.n_benign} benign",
        title_justify="left",
    )
    for name in ("score", "AUROC", "TPR at 1 %", "TPR at 0.1 %"):
        table.add_column(name, no_wrap=True)
    for score, f in question.scores.items():
        table.add_row(score, *(_cell(x) for x in (f.auroc, f.tpr_at_1pct, f.tpr_at_01pct)))
    out.print(table)


def _clusters(title: str, questions: dict[str, Question]) -> None:
    """One line a cluster; intervals are in the result and in the report."""
    names = list(dict.fromkeys(name for q in questions.values() for name in q.scores))
    table = Table(box=None, title=title, title_justify="left")
    for name in ("cluster", "harmful", *names):
        table.add_column(name)
    for cluster, question in questions.items():
        found = [question.scores.get(name) for name in names]
        cells = ["-" if f is None else f"{f.auroc[0]:.3f}" for f in found]
        table.add_row(cluster, str(question.n_harmful), *cells)
    out.print(table)


def _cell(found: Interval | None) -> str:
    return "-" if found is None else f"{found[0]:.3f} [{found[1]:.3f}, {found[2]:.3f}]"


def _rate_cells(rate: VerdictRate) -> list[str]:
    claimed = "-" if rate.claimed is None else f"{rate.claimed:.1%}"
    return [
        rate.rows,
        rate.verdict,
        f"{rate.n_raised} of {rate.n}",
        f"{rate.rate:.2%} [{rate.low:.2%}, {rate.high:.2%}]",
        claimed,
        rate.standing or "",
    ]
