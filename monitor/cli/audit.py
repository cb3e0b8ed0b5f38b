"""`sae-monitor audit`: prove the log, and look things up in it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table

from monitor.audit_log.query import query as query_log
from monitor.audit_log.verify import verify as verify_log
from monitor.cli.common import EXIT_FAILED, err, exit_on_error, out, progress_bar
from monitor.errors import AuditChainError
from monitor.records import Verdict

app = typer.Typer(help=__doc__, no_args_is_help=True)
Audit = Annotated[str, typer.Option("--audit", help="The log's URL, e.g. sqlite:///audit.sqlite")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine output on stdout.")]
_TIME_FORMATS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]


@app.command()
def verify(audit: Audit, as_json: AsJson = False) -> None:
    """Proves every record and the chain; exit code 1 names the first broken record."""
    try:
        with exit_on_error(), progress_bar() as progress:
            report = verify_log(
                audit, lambda done, total: progress("verifying records", done / max(total, 1))
            )
    except AuditChainError as error:
        if as_json:
            sys.stdout.write(json.dumps({"verified": False, "error": str(error)}) + "\n")
        err.print(f"broken: {error}", style="bold red", markup=False, soft_wrap=True)
        raise typer.Exit(EXIT_FAILED) from None
    if as_json:
        sys.stdout.write(json.dumps({"verified": True, **asdict(report)}) + "\n")
        return
    for chain in report.chains:
        out.print(
            f"chain {chain.head.chain}: {chain.records} records hold, "
            f"{chain.first_time or 'never'} to {chain.last_time or 'never'}, "
            f"head {chain.head.sequence} {chain.head.hash}",
            highlight=False,
            soft_wrap=True,
        )
    out.print(report.not_proven, style="dim", highlight=False)


@app.command()
def query(
    audit: Audit,
    verdict: Annotated[Verdict | None, typer.Option(help="Only this verdict.")] = None,
    cluster: Annotated[str | None, typer.Option(help="Only where it flagged or alerted.")] = None,
    decision: Annotated[str | None, typer.Option(help="Only this decision id.")] = None,
    since: Annotated[datetime | None, typer.Option(formats=_TIME_FORMATS, help="UTC.")] = None,
    until: Annotated[datetime | None, typer.Option(formats=_TIME_FORMATS, help="UTC.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many.", min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """Decisions by time, verdict, cluster or id: a table, or one record a line."""
    with exit_on_error():
        records = query_log(
            audit,
            verdict=verdict,
            cluster=cluster,
            decision_id=decision,
            since=_seconds(since),
            until=_seconds(until),
            limit=limit,
        )
        if as_json:
            for record in records:
                sys.stdout.write(json.dumps(record) + "\n")
            return
        table = Table(box=None)
        for name in ("time", "sequence", "decision", "verdict", "policy", "alerts", "tokens"):
            table.add_column(name)
        for record in records:
            table.add_row(
                record["time"],
                str(record["sequence"]),
                record["decision_id"],
                record["verdict"],
                record["policy"],
                ", ".join(alert["cluster"] for alert in record["alerts"]),
                f"{record['coverage']['scored']}/{record['coverage']['received']}",
            )
    out.print(table)


def _seconds(moment: datetime | None) -> float | None:
    return None if moment is None else moment.replace(tzinfo=UTC).timestamp()
