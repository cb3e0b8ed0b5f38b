"""`sae-monitor calibrate`: benign texts to thresholds with a bound, in a copy of a bundle."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from monitor.cli.common import EXIT_FAILED, bundle_folder, err, exit_on_error, out, progress_bar
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
    from monitor.calibration import Calibration, Targets
    from monitor.model_store import Progress
    from monitor.served import Served
    from sae_core.evaluation.data import LabelledText


def calibrate(
    data: Annotated[
        list[Path], typer.Option(help="JSON lines with text and label; benign rows count.")
    ],
    bundle: Annotated[str, typer.Option(help="A bundle's folder, or default.")] = "default",
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", help="Write a sealed copy with the new thresholds here."),
    ] = None,
    target_flag: Annotated[
        float, typer.Option(help="Benign texts flagged or alerted stay below this share.")
    ] = 0.05,
    target_alert: Annotated[
        float, typer.Option(help="Benign texts alerted stay below this share.")
    ] = 0.01,
    confidence: Annotated[float, typer.Option(help="Of both bounds.")] = 0.95,
    escalate_budget: Annotated[
        float | None,
        typer.Option(help="Benign texts flagged and not alerted stay below this share."),
    ] = None,
    policy: Annotated[str, typer.Option(help="The policy whose rate is claimed.")] = "default",
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
    seed: Annotated[int, typer.Option(help="Of the folds for the held-out rates.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The artefact on stdout.")] = False,
) -> None:
    """Finds thresholds; without --out nothing is written.

    Exit code 1 where the texts do not carry the claim: the thresholds are then the strictest that
    they allow, and the bundle says `uncalibrated` of itself.
    """
    from monitor.calibration import Targets, write_calibrated
    from monitor.local import load_local
    from sae_core.evaluation.data import read_labelled

    with exit_on_error(), progress_bar() as progress:
        targets = Targets(
            flag=target_flag,
            alert=target_alert,
            confidence=confidence,
            escalate_budget=escalate_budget,
        )
        placed = placement(device, dtype, gpus, tensor_parallel, backend, onnx)
        rows = [row for path in data for row in read_labelled(path)]
        benign = [row for row in rows if not row.is_harmful]
        if len(benign) < len(rows):
            err.print(f"{len(rows) - len(benign)} harmful rows are left out")
        served = load_local(
            bundle_folder(bundle),
            model=model,
            cache=default_cache_dir(),
            progress=progress,
            **placed,
        )
        names = ", ".join(path.name for path in data) + ", benign rows"
        work = work or default_cache_dir() / "traces"
        with closing(served):
            found = asyncio.run(_run(served, benign, work, targets, policy, names, seed, progress))
        digest = None if out_folder is None else write_calibrated(served.bundle, found, out_folder)
    if as_json:
        sys.stdout.write(json.dumps(found.artefact) + "\n")
    else:
        _show(found)
        if digest is not None:
            out.print(f"{out_folder}\n{digest}", highlight=False, soft_wrap=True)
    if found.canaries is not None:
        for line in (*found.canaries.problems, *found.canaries.unwatched):
            err.print(f"canaries: {line}", markup=False, highlight=False, soft_wrap=True)
    if not found.artefact["calibrated"]:
        err.print(f"not shown: {found.artefact['reason']}", markup=False, soft_wrap=True)
        raise typer.Exit(EXIT_FAILED)


async def _run(
    served: Served,
    rows: list[LabelledText],
    work: Path,
    targets: Targets,
    policy: str,
    data: str,
    seed: int,
    progress: Progress,
) -> Calibration:
    from monitor.calibration import calibrate as find_thresholds
    from monitor.local import local_pipeline
    from monitor.traces import TraceStore

    async with local_pipeline(lambda: served) as pipeline:
        saes = served.scorer.live_fit.sae_ids
        with TraceStore(work, served.logits_key, saes) as store:
            return await find_thresholds(
                served,
                pipeline,
                rows,
                store,
                targets=targets,
                policy=policy,
                data=data,
                seed=seed,
                progress=progress,
            )


def _show(found: Calibration) -> None:
    artefact = found.artefact
    for zone in ("flag", "alert"):
        out.print(artefact["policy"]["fused"][zone]["claim"], highlight=False, soft_wrap=True)
        held = artefact["held_out"][zone]
        out.print(
            f"  chosen without them: {held['n_false_positive']} of {held['n_benign']} "
            f"({held['achieved']:.2%}, bound {held['upper_bound']:.2%})",
            highlight=False,
        )
    if "escalate" in artefact:
        middle = artefact["escalate"]
        word = "within" if middle["is_within"] else "not shown to be within"
        out.print(
            f"flagged and not alerted: {middle['n_escalated']} of {middle['n']}, below "
            f"{middle['bound']:.2%}, {word} the budget of {middle['budget']:.2%}",
            highlight=False,
        )
    if "baseline" not in artefact:
        out.print("no baseline: too few texts, or no latent, to compare live traffic with")
    table = Table(box=None)
    for name in ("scored tokens", "texts", "flagged", "below", "alerted", "below"):
        table.add_column(name)
    for bucket, zones in artefact["length_buckets"].items():
        table.add_row(bucket, str(zones["flag"]["n_benign"]), *_cells(zones))
    out.print(table)
    table = Table(box=None)
    for name in ("cluster", "flag", "alert", "clear", "own rate"):
        table.add_column(name)
    for cluster, entry in artefact["clusters"].items():
        limits = [f"{entry['thresholds'][name]:.5f}" for name in ("flag", "alert", "clear")]
        table.add_row(cluster, *limits, f"{entry['spend']['flag']:.2%}")
    out.print(table)


def _cells(zones: dict[str, Any]) -> list[str]:
    cells = []
    for zone in ("flag", "alert"):
        cells.append(f"{zones[zone]['achieved']:.2%}")
        mark = "" if zones[zone]["calibrated"] else " (not shown)"
        cells.append(f"{zones[zone]['upper_bound']:.2%}{mark}")
    return cells
