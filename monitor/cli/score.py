"""`sae-monitor score`: texts to verdicts in this process, one JSON object a line on request."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from monitor.cli.common import (
    EXIT_FAILED,
    bundle_folder,
    err,
    exit_on_error,
    out,
    progress_bar,
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
from monitor.errors import InvalidRequestError, MonitorError
from monitor.in_flight import in_order
from monitor.records import Decision, ScoreRequest, Stage
from monitor.report import decision_view
from monitor.request_rows import RequestRow, read_lines

if TYPE_CHECKING:
    from monitor.served import Served


def score(
    text: Annotated[str | None, typer.Option(help="Score this text.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Score each line of this JSON-lines file (text or messages; - is stdin)."
        ),
    ] = None,
    bundle: Annotated[str, typer.Option(help="A bundle's folder, or default.")] = "default",
    model: Annotated[Path | None, typer.Option(help="The model's folder.")] = None,
    stage: Annotated[Stage, typer.Option(help="Stage of --text.")] = Stage.PROMPT,
    policy: Annotated[str, typer.Option(help="The bundle's policy to judge by.")] = "default",
    device: Device = "cpu",
    gpus: Gpus = 1,
    tensor_parallel: TensorParallel = 1,
    dtype: Dtype = "float32",
    backend: Backend = "torch",
    onnx: Onnx = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Per-token scores too.")] = False,
) -> None:
    """Scores a text or a file of them; exit code 1 when a line could not be scored."""
    from monitor.local import load_local

    if (text is None) == (file is None):
        raise typer.BadParameter("found both or neither of --text and --file, expected one")
    with exit_on_error(), progress_bar() as progress:
        placed = placement(device, dtype, gpus, tensor_parallel, backend, onnx)

        if text is not None:
            request = ScoreRequest(
                text=text,
                stage=stage,
                policy=policy,
                want_tokens=tokens or not as_json,
                want_attribution=not as_json,
            )
            rows: Iterator[RequestRow] = iter([RequestRow(id=1, number=1, request=request)])
        else:
            rows = read_rows(file or Path("-"), policy=policy, want_tokens=tokens)
        served = load_local(
            bundle_folder(bundle),
            model=model,
            cache=default_cache_dir(),
            progress=progress,
            **placed,
        )
        with closing(served):
            failed = asyncio.run(_score(served, rows, as_json))
    if failed:
        err.print(f"{failed} lines could not be scored")
        raise typer.Exit(EXIT_FAILED)


def read_rows(file: Path, *, policy: str, want_tokens: bool) -> Iterator[RequestRow]:
    """The rows of a JSON-lines file, or of stdin for `-`."""
    if str(file) != "-" and not file.is_file():
        raise InvalidRequestError("--file", f"no file {file}", "a JSON-lines file or -")
    with sys.stdin if str(file) == "-" else file.open(encoding="utf-8") as lines:
        yield from read_lines(lines, policy=policy, want_tokens=want_tokens)


def decision_json(row_id: str | int, decision: Decision) -> dict[str, object]:
    """The documented JSON object of one decision; scores that do not exist are null."""
    ids = [c.cluster for c in decision.clusters]
    result: dict[str, object] = {
        "id": row_id,
        "verdict": decision.verdict.value,
        "overall": {
            "fused": _number(decision.overall.fused),
            "dense": _number(decision.overall.dense),
            "sae": _number(decision.overall.sae),
        },
        "clusters": {
            c.cluster: {
                "fused": _number(c.fused),
                "dense": _number(c.dense),
                "sae": _number(c.sae),
                "verdict": c.verdict.value,
                "first_crossing": c.first_crossing,
            }
            for c in decision.clusters
        },
        "coverage": {
            "received": decision.coverage.received,
            "scored": decision.coverage.scored,
            "unscored": {reason.value: n for reason, n in decision.coverage.unscored.items()},
        },
        "bundle": decision.provenance.bundle_digest,
        "model": decision.provenance.model_digest,
    }
    if decision.anomaly is not None:
        result["anomaly"] = asdict(decision.anomaly)
    if decision.tokens:
        result["tokens"] = [
            {
                "position": token.position,
                "id": token.token_id,
                "text": token.text,
                "stage": None if token.stage is None else token.stage.value,
                **{
                    source: {c: _number(v) for c, v in zip(ids, values, strict=True)}
                    for source, values in (
                        ("fused", token.fused),
                        ("dense", token.dense),
                        ("sae", token.sae),
                    )
                },
            }
            for token in decision.tokens
        ]
    return result


async def _score(served: Served, rows: Iterator[RequestRow], as_json: bool) -> int:
    from monitor.local import local_pipeline

    failed = 0
    async with local_pipeline(lambda: served) as pipeline:

        async def one(row: RequestRow) -> Decision | MonitorError:
            if isinstance(row.request, MonitorError):
                return row.request
            try:
                return await pipeline.score(row.request)
            except MonitorError as error:
                return error

        async for row, outcome in in_order(rows, one):
            if isinstance(outcome, MonitorError):
                failed += 1
                if as_json:
                    sys.stdout.write(json.dumps({"id": row.id, "error": str(outcome)}) + "\n")
                else:
                    err.print(f"{row.id}: {outcome}", markup=False)
            elif as_json:
                line = json.dumps(decision_json(row.id, outcome), allow_nan=False)
                sys.stdout.write(line + "\n")
            else:
                out.print(f"[dim]{row.id}[/dim]")
                out.print(decision_view(outcome, pipeline.clusters()))
    return failed


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
