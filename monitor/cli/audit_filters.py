"""Which decisions of an audit log: the options that several commands share."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from monitor.records import Severity, Verdict

TIME_FORMATS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]
Since = Annotated[datetime | None, typer.Option(formats=TIME_FORMATS, help="UTC.")]
Cluster = Annotated[str | None, typer.Option(help="Only where it flagged or alerted.")]
OnlyVerdict = Annotated[Verdict | None, typer.Option(help="Only this verdict.")]
OnlySeverity = Annotated[
    Severity | None, typer.Option(help="Only where this is the gravest that was raised.")
]
OnlyDecision = Annotated[str | None, typer.Option(help="Only this decision id.")]
OnlyCallerHmac = Annotated[str | None, typer.Option(help="Only this keyed hash.")]


def seconds_of(moment: datetime | None) -> float | None:
    """Unix seconds of a time that was given without a zone, in UTC."""
    return None if moment is None else moment.replace(tzinfo=UTC).timestamp()
