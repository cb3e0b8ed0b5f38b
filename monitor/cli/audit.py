"""`sae-monitor audit`: prove the log, look things up in it, and keep it in order."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from monitor.audit_log.checkpoint import load_signer
from monitor.audit_log.proof import prove as prove_decision
from monitor.audit_log.query import Filter, sealed_of, trace_of
from monitor.audit_log.query import query as query_log
from monitor.audit_log.record import caller_hash
from monitor.audit_log.retention import prune as prune_log
from monitor.audit_log.schema import bring_up_to_date
from monitor.audit_log.sealing import KeyRing
from monitor.audit_log.verify import read_kept
from monitor.audit_log.verify import verify as verify_log
from monitor.cli import audit_keys, checkpoints
from monitor.cli.audit_filters import (
    TIME_FORMATS,
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
    EXIT_USAGE,
    AsJson,
    Audit,
    err,
    exit_on_error,
    out,
    progress_bar,
    read_file,
)
from monitor.errors import AuditChainError, AuditError

app = typer.Typer(help=__doc__, no_args_is_help=True)
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(audit_keys.app, name="keys")


@app.command()
def verify(
    audit: Audit,
    public_key: Annotated[
        str | None,
        typer.Option(help="The signer's, in hexadecimal."),
    ] = None,
    checkpoints: Annotated[
        Path | None, typer.Option(help="Checkpoints kept elsewhere, as exported; - for stdin.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Proves records, chain and checkpoints; exit code 1 names the first broken record."""
    try:
        with exit_on_error(), progress_bar() as progress:
            kept = [] if checkpoints is None else read_kept(read_file(checkpoints).decode())
            report = verify_log(
                audit,
                lambda done, total: progress("verifying records", done / max(total, 1)),
                public_key=public_key,
                kept=kept,
            )
    except AuditChainError as error:
        if as_json:
            sys.stdout.write(json.dumps({"verified": False, "error": str(error)}) + "\n")
        _say_broken(error)
        raise typer.Exit(EXIT_FAILED) from None
    if as_json:
        sys.stdout.write(json.dumps({"verified": True, **asdict(report)}) + "\n")
        return
    for chain in report.chains:
        pruned = f", {chain.pruned} before them pruned" if chain.pruned else ""
        steps = f", the clock stepped back {chain.clock_steps} times" if chain.clock_steps else ""
        out.print(
            f"chain {chain.head.chain}: {chain.records} records hold{pruned}, "
            f"{chain.first_time or 'never'} to {chain.last_time or 'never'}{steps}, "
            f"{chain.checkpoints} checkpoints ({chain.signed} signed), "
            f"head {chain.head.sequence} {chain.head.hash}",
            highlight=False,
            soft_wrap=True,
        )
    if report.kept_elsewhere:
        out.print(f"{report.kept_elsewhere} checkpoints kept elsewhere agree", highlight=False)
    out.print(report.not_proven, style="dim", highlight=False)


@app.command()
def query(
    audit: Audit,
    verdict: OnlyVerdict = None,
    severity: OnlySeverity = None,
    cluster: Cluster = None,
    decision: OnlyDecision = None,
    caller_hmac: OnlyCallerHmac = None,
    caller: Annotated[
        str | None, typer.Option(help="Only this caller; needs --hash-key-file.")
    ] = None,
    hash_key_file: Annotated[Path | None, typer.Option(help="Hashes --caller.")] = None,
    since: Since = None,
    until: Since = None,
    limit: Annotated[int | None, typer.Option(help="At most this many.", min=1)] = None,
    newest_first: Annotated[bool, typer.Option(help="From the end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Decisions by time, verdict, severity, cluster, caller or id: a table, or one a line."""
    with exit_on_error():
        if caller is not None:
            if hash_key_file is None or caller_hmac is not None:
                err.print("error: --caller: expected --hash-key-file with it, and no --caller-hmac")
                raise typer.Exit(EXIT_USAGE)
            caller_hmac = caller_hash(read_file(hash_key_file).strip(), caller)
        records = query_log(
            audit,
            verdict=verdict,
            severity=severity,
            cluster=cluster,
            caller_hmac=caller_hmac,
            decision_id=decision,
            since=seconds_of(since),
            until=seconds_of(until),
            limit=limit,
            newest_first=newest_first,
        )
        if as_json:
            for record in records:
                sys.stdout.write(json.dumps(record) + "\n")
            return
        # Lines of their own width and not a table: ids stay whole, and nothing is gathered.
        _line("time", "sequence", "decision", "verdict", "severity", "tokens", "policy", "alerts")
        for record in records:
            _line(
                f"{record['time'][:19]}Z",
                str(record["sequence"]),
                record["decision_id"],
                record["verdict"],
                record.get("severity") or "",
                f"{record['coverage']['scored']}/{record['coverage']['received']}",
                record["policy"],
                ", ".join(alert["cluster"] for alert in record["alerts"]),
            )


_QUERY_WIDTHS = (20, 8, 36, 7, 8, 11, 8, 0)


def _line(*cells: str) -> None:
    padded = (cell.ljust(width) for cell, width in zip(cells, _QUERY_WIDTHS, strict=True))
    out.print("  ".join(padded).rstrip(), markup=False, highlight=False, soft_wrap=True)


@app.command()
def show(
    decision_id: str,
    audit: Audit,
    keys_file: Annotated[Path | None, typer.Option(help="Keys that open what is sealed.")] = None,
) -> None:
    """One decision as JSON, with its tokens' scores and, where a key opens them, the tokens."""
    with exit_on_error():
        found = next(query_log(audit, decision_id=decision_id), None)
        if found is None:
            raise AuditError(f"decision: found none of id {decision_id!r} in the audit log")
        trace = trace_of(audit, decision_id)
        if trace is not None:
            found["token_scores"] = {
                "clusters": trace.trace.clusters,
                "stages": trace.trace.stages,
                "max_error": trace.max_error.tolist(),
                "logits": [
                    [[None if x != x else x for x in sources] for sources in clusters]
                    for clusters in trace.trace.logits.tolist()
                ],
            }
        if "sealed" in found and (keys_file is not None or found["sealed"]["key"] is None):
            keys = None
            if keys_file is not None:
                keys = KeyRing.parse(read_file(keys_file).decode(errors="replace"), str(keys_file))
            found |= sealed_of(audit, decision_id, keys)
    sys.stdout.write(json.dumps(found) + "\n")


@app.command()
def prove(
    decision_id: str,
    audit: Audit,
    out_file: Annotated[Path | None, typer.Option("--out", help="Instead of stdout.")] = None,
) -> None:
    """Writes the proof that a decision is in the log, against the first checkpoint over it."""
    try:
        with exit_on_error():
            proof = json.dumps(prove_decision(audit, decision_id), indent=1) + "\n"
    except AuditChainError as error:
        _say_broken(error)
        raise typer.Exit(EXIT_FAILED) from None
    if out_file is None:
        sys.stdout.write(proof)
    else:
        out_file.write_text(proof, "utf-8")


@app.command()
def prune(
    audit: Audit,
    before: Annotated[datetime, typer.Option(formats=TIME_FORMATS, help="UTC.")],
    signing_key: Annotated[
        Path | None,
        typer.Option(help="Needed where checkpoints are signed."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Deletes periods that are older; their checkpoints stay, so that the rest still verifies."""
    with exit_on_error():
        signer = None if signing_key is None else load_signer(signing_key)
        before_us = round(before.replace(tzinfo=UTC).timestamp() * 1e6)
        pruned = prune_log(audit, before_us=before_us, signer=signer, clock=time.time)
    for one in pruned:
        if as_json:
            sys.stdout.write(json.dumps(asdict(one)) + "\n")
        else:
            out.print(
                f"chain {one.chain}: {one.records} records deleted, {one.through} pruned in all",
                highlight=False,
            )


@app.command()
def migrate(audit: Audit) -> None:
    """Brings an existing log to the current layout, as a server does when it opens it."""
    with exit_on_error():
        bring_up_to_date(audit)


@app.command()
def export(
    audit: Audit,
    out_file: Annotated[Path, typer.Option("--out", help="A .parquet file.")],
    verdict: OnlyVerdict = None,
    severity: OnlySeverity = None,
    cluster: Cluster = None,
    since: Since = None,
    until: Since = None,
) -> None:
    """Decisions as one Parquet table, a row each (monitor/audit_log/export.py has its columns)."""
    with exit_on_error(), progress_bar() as progress:
        try:
            from monitor.audit_log.export import export as export_log
        except ModuleNotFoundError as error:
            raise AuditError(
                f"export needs {error.name}, which is not installed; "
                "pip install 'sae-monitor[parquet]' brings it"
            ) from None
        wanted = Filter(
            verdict=verdict,
            severity=severity,
            cluster=cluster,
            since=seconds_of(since),
            until=seconds_of(until),
        )
        done = export_log(audit, out_file, wanted, lambda n: progress(f"{n} decisions", 0.0))
    err.print(f"{done} decisions in {out_file}", highlight=False)


def _say_broken(error: AuditChainError) -> None:
    err.print(f"broken: {error}", style="bold red", markup=False, soft_wrap=True)
