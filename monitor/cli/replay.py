"""`sae-monitor replay`: an audit log, or files of requests, scored again without a network."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from monitor.audit_log.query import Filter
from monitor.audit_log.schema import database_path, is_sqlite
from monitor.cli.audit_filters import (
    Cluster,
    OnlyCallerHmac,
    OnlyDecision,
    OnlySeverity,
    OnlyVerdict,
    Since,
    seconds_of,
)
from monitor.cli.common import (
    EXIT_FAILED,
    EXIT_STOPPED,
    bundle_folder,
    err,
    exit_on_error,
    out,
    progress_bar,
    require,
)
from monitor.cli.placement import (
    Backend,
    Device,
    Gpus,
    Onnx,
    TensorParallel,
    placement,
)
from monitor.config import default_cache_dir
from monitor.errors import SettingsError

if TYPE_CHECKING:
    from monitor.replay.manifest import Manifest
    from monitor.replay.rows import Input
    from monitor.replay.run import Engine, Replayed
    from monitor.replay.summary import Group

Expected = Literal["bitwise", "numeric", "decision"]


def replay(
    out_folder: Annotated[
        Path, typer.Option("--out", help="Folder of parts and manifest; goes on in its own.")
    ],
    audit: Annotated[
        str | None, typer.Option(help="An audit log's URL, sqlite:///PATH or postgresql://...")
    ] = None,
    inputs: Annotated[
        list[Path] | None,
        typer.Option("--input", help="JSON lines or Parquet; may be given several times."),
    ] = None,
    bundle: Annotated[str, typer.Option(help="A bundle's folder, or default.")] = "default",
    keys_file: Annotated[
        Path | None, typer.Option(help="Keys that open what the log has sealed.")
    ] = None,
    verdict: OnlyVerdict = None,
    severity: OnlySeverity = None,
    cluster: Cluster = None,
    decision: OnlyDecision = None,
    caller_hmac: OnlyCallerHmac = None,
    since: Since = None,
    until: Since = None,
    policy: Annotated[str, typer.Option(help="Judges rows of --input that name none.")] = "default",
    model: Annotated[Path | None, typer.Option(help="The model's folder.")] = None,
    device: Device = "auto",
    gpus: Gpus = 1,
    tensor_parallel: TensorParallel = 1,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="auto, float32, bfloat16 or int8; by default that of the log's first decision, "
            "and auto for files."
        ),
    ] = None,
    backend: Backend = "torch",
    onnx: Onnx = None,
    fidelity: Annotated[
        Literal["gate", "off"], typer.Option(help="An SAE that does not fit: stop, or do not look.")
    ] = "gate",
    max_step_tokens: Annotated[int, typer.Option(help="Tokens of one forward.", min=1)] = 2048,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="In this process, or in actors of Ray.")
    ] = "local",
    actors: Annotated[int, typer.Option(help="Of --engine ray.", min=1)] = 1,
    gpus_per_actor: Annotated[
        float, typer.Option(help="A whole number, or a share of one.", min=0)
    ] = 0.0,
    cpus_per_actor: Annotated[float, typer.Option(help="Threads of torch.", min=0.01)] = 1.0,
    part_rows: Annotated[int, typer.Option(help="Rows of a part.", min=1)] = 10_000,
    expect: Annotated[
        Expected | None, typer.Option(help="Exit code 1 where a record's class is worse.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The manifest on stdout.")] = False,
) -> None:
    """Scores an audit log or files of requests again, and says what became of each decision.

    The same command in the same folder goes on where the last one stopped. Exit codes: 0 done; 1
    done, but rows were not scored or are worse than --expect; 2 it could not start; 130 stopped by
    Ctrl-C.
    """
    with exit_on_error(), progress_bar() as progress:
        require("pyarrow", "parquet", "replay")
        from monitor.replay.run import LocalEngine
        from monitor.replay.run import replay as run
        from monitor.replay.scorer import Job, Loading

        wanted = Filter(
            verdict=verdict,
            severity=severity,
            cluster=cluster,
            decision_id=decision,
            caller_hmac=caller_hmac,
            since=seconds_of(since),
            until=seconds_of(until),
        )
        found = _inputs(audit, inputs or [], wanted, keys_file)
        if dtype is None:
            dtype = "auto" if audit is None else _recorded_dtype(audit, wanted, backend)
        loading = Loading(
            bundle=bundle_folder(bundle).resolve(),
            model=None if model is None else model.resolve(),
            cache=default_cache_dir(),
            check_fit=fidelity == "gate",
            **placement(device, dtype, gpus, tensor_parallel, backend, onnx),
        )
        job = Job(
            inputs=found,
            out=out_folder.resolve(),
            policy=policy,
            max_step_tokens=max_step_tokens,
        )
        scoring: Engine
        if engine == "local":
            scoring = LocalEngine(loading)
        else:
            require("ray", "ray", "--engine ray")
            from monitor.replay.on_ray import RayEngine

            scoring = RayEngine(
                loading,
                actors=actors,
                gpus_per_actor=gpus_per_actor,
                cpus_per_actor=cpus_per_actor,
            )
        try:
            done = run(job, scoring, part_rows=part_rows, progress=progress)
        except KeyboardInterrupt:
            err.print("stopped; the same command goes on from here")
            raise typer.Exit(EXIT_STOPPED) from None
    if as_json:
        sys.stdout.write(done.manifest.to_json().decode())
    else:
        _show(done)
    if _is_bad(done.manifest, expect):
        raise typer.Exit(EXIT_FAILED)


def _inputs(
    audit: str | None, files: list[Path], wanted: Filter, keys_file: Path | None
) -> list[Input]:
    from monitor.replay.files import open_file
    from monitor.replay.log import LogInput

    if (audit is None) == (not files):
        raise SettingsError("--audit, --input: found both or neither, expected one of them")
    if audit is not None:
        return [LogInput(_anywhere(audit), wanted, keys_file and keys_file.resolve())]
    if wanted != Filter() or keys_file is not None:
        raise SettingsError(
            "--verdict, --severity, --cluster, --decision, --caller-hmac, --since, --until, "
            "--keys-file: found one with --input, expected --audit"
        )
    return [open_file(path.resolve()) for path in files]


def _recorded_dtype(url: str, wanted: Filter, backend: str) -> str:
    """What the first decision of interest was computed in, where this backend can do so too."""
    from monitor.audit_log.query import rows

    found = next((body for _, body in rows(url, wanted, limit=1)), None)
    recorded = None if found is None else found["provenance"]["dtype"]
    possible = recorded in ("float32", "bfloat16") if backend == "torch" else recorded == "int8"
    return str(recorded) if possible else "auto"


def _anywhere(url: str) -> str:
    """The log's URL, also for a process that works in another folder."""
    return f"sqlite:///{database_path(url).resolve()}" if is_sqlite(url) else url


def _is_bad(manifest: Manifest, expect: Expected | None) -> bool:
    from monitor.replay.rows import ReplayClass

    totals = manifest.totals()
    below = 0 if expect is None else totals.n_below(ReplayClass(expect))
    return bool(totals.n_lost or manifest.undecided or below)


def _show(done: Replayed) -> None:
    from monitor.replay.rows import ReplayClass

    manifest, totals = done.manifest, done.manifest.totals()
    for name in done.damaged:
        _say(f"{name} was not as it had been written, and was made again")
    kept = f", {done.n_kept} of them from before" if done.n_kept else ""
    _say(f"{totals.rows:,} rows, {totals.tokens:,} tokens, {len(manifest.parts)} parts{kept}")
    table = Table(box=None)
    for name in ("class", "rows", ""):
        table.add_column(name, justify="right" if name == "rows" else "left")
    for one in ReplayClass:
        if totals.count(one):
            table.add_row(one.value, f"{totals.count(one):,}", _MEANING[one.value])
    out.print(table)
    for group in totals.groups:
        _show_group(group, manifest.facts)
    for reason, n in totals.reasons.items():
        _say(f"{reason}: {n:,}")
    if manifest.undecided:
        streams = ", ".join(manifest.undecided[:3])
        _say(
            f"alerted, and no decision on record: {len(manifest.undecided)} streams "
            f"({streams}{', ...' if len(manifest.undecided) > 3 else ''})"
        )


_MEANING = {
    "bitwise": "every number on record, bit for bit",
    "numeric": "the same verdicts, scores within the bound",
    "decision": "the same verdicts",
    "flipped": "another verdict",
    "new": "nothing on record to compare with",
    "failed": "could not be scored",
    "skipped": "tokens could not be had",
}


def _show_group(group: Group, facts: Mapping[str, Any]) -> None:
    """What differs between then and now for one kind of records, and what came of it."""
    from monitor.replay.compare import FACTS
    from monitor.replay.summary import fact_text

    then = group.then
    counts = ", ".join(f"{n:,} {name}" for name, n in group.classes.items())
    _say(f"made by {then['bundle']}, {then['dtype']}, {then['backend']}: {counts}")
    for name in group.differs:
        if name in FACTS:
            before, after = fact_text(then[FACTS[name]]), fact_text(facts[FACTS[name]])
            _say(f"  {name}: {before} then, {after} now")
        else:
            _say(f"  {name}: other tokens were scored then")
    if not group.differs:
        _say("  nothing on record differs; which requests shared a step is not recorded")
    if group.not_recorded:
        _say(f"  not on record: {', '.join(group.not_recorded)}")
    _say(
        f"  largest difference of a score {group.score_difference:.2g}, of a token's "
        f"{group.token_difference:.2g} (stored to within {group.trace_error:.2g})"
    )


def _say(line: str) -> None:
    out.print(line, markup=False, highlight=False, soft_wrap=True)
