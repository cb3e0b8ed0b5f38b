"""`sae-monitor bundle baseline`: what live traffic is compared with, from other benign texts."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from monitor.cli.common import AsJson, bundle_folder, err, exit_on_error, out, progress_bar
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
    from monitor.baseline_renewal import RenewedBaseline
    from monitor.model_store import Progress
    from monitor.served import Served
    from sae_core.evaluation.data import LabelledText


def baseline(
    data: Annotated[
        list[Path], typer.Option(help="JSON lines with text and label; benign rows count.")
    ],
    out_folder: Annotated[Path, typer.Option("--out", help="Write a sealed copy here.")],
    folder: Annotated[str, typer.Argument(help="A bundle's folder, or default.")] = "default",
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
    as_json: AsJson = False,
) -> None:
    """Adds or renews the drift baseline in a copy of the bundle; thresholds stay as they are.

    The baseline goes into the calibration artefact that was made with the model, SAEs, heads, data
    type and backend that are served; where there is none, nothing is written.
    """
    from monitor.baseline_renewal import write_renewed
    from monitor.local import load_local
    from sae_core.evaluation.data import read_labelled

    with exit_on_error(), progress_bar() as progress:
        placed = placement(device, dtype, gpus, tensor_parallel, backend, onnx)
        rows = [row for path in data for row in read_labelled(path)]
        benign = [row for row in rows if not row.is_harmful]
        if len(benign) < len(rows):
            err.print(f"{len(rows) - len(benign)} harmful rows are left out")
        served = load_local(
            bundle_folder(folder),
            model=model,
            cache=default_cache_dir(),
            progress=progress,
            **placed,
        )
        names = ", ".join(path.name for path in data) + ", benign rows"
        work = work or default_cache_dir() / "traces"
        with closing(served):
            found = asyncio.run(_run(served, benign, work, names, progress))
        digest = write_renewed(served.bundle, found, out_folder)
    content = found.content
    if as_json:
        line = {"folder": str(out_folder), "digest": digest, "artefact": found.path}
        counts = {name: content[name] for name in ("n_texts", "n_tokens", "ratios")}
        sys.stdout.write(json.dumps({**line, **counts}) + "\n")
        return
    out.print(
        f"{found.path}: baseline of {content['n_texts']} texts, {content['n_tokens']} tokens",
        highlight=False,
    )
    for name, ratio in content["ratios"].items():
        out.print(f"  {name} {ratio:.4g}", highlight=False)
    out.print(f"{out_folder}\n{digest}", highlight=False, soft_wrap=True)


async def _run(
    served: Served, rows: list[LabelledText], work: Path, data: str, progress: Progress
) -> RenewedBaseline:
    from monitor.baseline_renewal import renew_baseline
    from monitor.local import local_pipeline
    from monitor.traces import TraceStore

    async with local_pipeline(lambda: served) as pipeline:
        saes = served.scorer.live_fit.sae_ids
        with TraceStore(work, served.logits_key, saes) as store:
            return await renew_baseline(served, pipeline, rows, store, data=data, progress=progress)
