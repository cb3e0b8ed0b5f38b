"""`sae-monitor score`: texts to verdicts in this process, one JSON object a line on request."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from monitor.cli.common import EXIT_FAILED, bundle_folder, err, exit_on_error, out, progress_bar
from monitor.config import default_cache_dir
from monitor.errors import InvalidRequestError, MonitorError
from monitor.records import Decision, Message, ScoreRequest, Stage
from monitor.report import decision_view

if TYPE_CHECKING:
    from monitor.pipeline import Pipeline
    from monitor.served import Served

IN_FLIGHT = 64
"""Rows handed to the engine at a time: enough for full batches, bounded in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One input line."""

    id: str | int
    request: ScoreRequest | MonitorError
    """What to score, or why the line cannot be."""


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
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Per-token scores too.")] = False,
) -> None:
    """Scores a text or a file of them; exit code 1 when a line could not be scored."""
    from monitor.local import load_local

    if (text is None) == (file is None):
        raise typer.BadParameter("found both or neither of --text and --file, expected one")
    with exit_on_error(), progress_bar() as progress:

        def load() -> Served:
            return load_local(
                bundle_folder(bundle),
                model=model,
                cache=default_cache_dir(),
                device=device,
                dtype=dtype,
                progress=progress,
            )

        if text is not None:
            request = ScoreRequest(
                text=text,
                stage=stage,
                policy=policy,
                want_tokens=tokens or not as_json,
                want_attribution=not as_json,
            )
            rows: Iterator[Row] = iter([Row(id=1, request=request)])
        else:
            rows = read_rows(file or Path("-"), policy=policy, want_tokens=tokens)
        failed = asyncio.run(_score(load, rows, as_json))
    if failed:
        err.print(f"{failed} lines could not be scored")
        raise typer.Exit(EXIT_FAILED)


def read_rows(file: Path, *, policy: str, want_tokens: bool) -> Iterator[Row]:
    """The rows of a JSON-lines file; a line that cannot be read becomes a row with the reason."""
    if str(file) != "-" and not file.is_file():
        raise InvalidRequestError("--file", f"no file {file}", "a JSON-lines file or -")
    with sys.stdin if str(file) == "-" else file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _row(number, line, policy, want_tokens)


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


async def _score(load: Callable[[], Served], rows: Iterator[Row], as_json: bool) -> int:
    from monitor.local import local_pipeline

    failed = 0
    async with local_pipeline(load) as pipeline:
        async for row, outcome in _in_order(pipeline, rows):
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


async def _in_order(
    pipeline: Pipeline, rows: Iterator[Row]
) -> AsyncIterator[tuple[Row, Decision | MonitorError]]:
    """Scores rows side by side, gives them back in the order they came."""

    async def one(row: Row) -> Decision | MonitorError:
        if isinstance(row.request, MonitorError):
            return row.request
        try:
            return await pipeline.score(row.request)
        except MonitorError as error:
            return error

    waiting: list[tuple[Row, asyncio.Task[Decision | MonitorError]]] = []
    for row in rows:
        waiting.append((row, asyncio.create_task(one(row))))
        if len(waiting) >= IN_FLIGHT:
            first, task = waiting.pop(0)
            yield first, await task
    for row, task in waiting:
        yield row, await task


def _row(number: int, line: str, policy: str, want_tokens: bool) -> Row:
    where = f"line {number}"
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        return Row(id=number, request=InvalidRequestError(where, f"{error}", "a JSON object"))
    if not isinstance(content, dict):
        found = type(content).__name__
        return Row(id=number, request=InvalidRequestError(where, found, "a JSON object"))
    row_id = content.get("id", number)
    text, messages = content.get("text"), content.get("messages")
    if isinstance(text, str):
        stage = Stage.COMPLETION if content.get("kind") == "completion" else Stage.PROMPT
        request = ScoreRequest(text=text, stage=stage, policy=policy, want_tokens=want_tokens)
        return Row(id=row_id, request=request)
    if isinstance(messages, list) and all(_is_message(m) for m in messages):
        turns = tuple(Message(role=m["role"], content=m["content"]) for m in messages)
        request = ScoreRequest(messages=turns, policy=policy, want_tokens=want_tokens)
        return Row(id=row_id, request=request)
    found = f"keys {', '.join(sorted(content))}" if content else "no keys"
    expected = "`text` (a string) or `messages` (objects with role and content)"
    return Row(id=row_id, request=InvalidRequestError(where, found, expected))


def _is_message(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
