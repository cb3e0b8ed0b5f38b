"""`sae-monitor what-if`: other settings on decisions of the past, from their stored scores."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from monitor.bundle import load_bundle
from monitor.cli.audit_filters import Since, seconds_of
from monitor.cli.common import (
    EXIT_USAGE,
    AsJson,
    bundle_folder,
    err,
    exit_on_error,
    out,
    progress_bar,
)

if TYPE_CHECKING:
    from monitor.bundle import Bundle
    from monitor.bundle_spec import BundleSpec
    from monitor.what_if.changes import Change, Example
    from monitor.what_if.run import WhatIf

MaybeAudit = Annotated[
    str | None, typer.Option("--audit", help="The log's URL, sqlite:///PATH or postgresql://...")
]
Export = Annotated[
    Path | None, typer.Option(help="In its place, what audit export wrote; many times as fast.")
]


def what_if(
    audit: MaybeAudit = None,
    export: Export = None,
    bundle: Annotated[
        str, typer.Option(help="The bundle that made the decisions: its folder, or default.")
    ] = "default",
    challenger: Annotated[
        str | None, typer.Option(help="Another bundle's folder, or default.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="CLUSTER.KEY=VALUE",
            help="As weapons.thresholds.alert=3.5; * is every cluster. May be given several times.",
        ),
    ] = None,
    settings: Annotated[
        Path | None, typer.Option(help="YAML: clusters by id, rules, policies by name.")
    ] = None,
    since: Since = None,
    until: Since = None,
    as_json: AsJson = False,
) -> None:
    """Which alerts would appear and vanish under other thresholds, aggregates, fusion or rules.

    Reads stored scores; no model is loaded. Decisions of other bundles, and those without scores,
    are counted and left out.
    """
    from monitor.what_if.settings import unanswerable

    if (challenger is None) == (not assignments and settings is None):
        err.print(
            "error: what-if: expected either --challenger, or --set and --settings", style="red"
        )
        raise typer.Exit(EXIT_USAGE)
    with exit_on_error():
        champion = load_bundle(bundle_folder(bundle))
        if challenger is None:
            spec, label, left = _changed(champion, assignments or [], settings), "as set", {}
        else:
            other = load_bundle(bundle_folder(challenger))
            spec, label, left = other.spec, other.label, unanswerable(champion, other)
        result = compare(
            champion,
            spec,
            label=label,
            unanswerable=left,
            audit=audit,
            export=export,
            since=seconds_of(since),
            until=seconds_of(until),
        )
    if as_json:
        sys.stdout.write(json.dumps(asdict(result)) + "\n")
    else:
        show(result)


def compare(
    champion: Bundle,
    challenger: BundleSpec,
    *,
    label: str,
    unanswerable: dict[str, str],
    audit: str | None,
    export: Path | None,
    since: float | None = None,
    until: float | None = None,
) -> WhatIf:
    """The comparison, from whichever of log and export was given."""
    from monitor.audit_log.query import Filter
    from monitor.what_if.run import what_if as run_what_if

    place = audit or export
    if place is None or (audit is not None and export is not None):
        err.print("error: expected either --audit or --export", style="red")
        raise typer.Exit(EXIT_USAGE)
    with progress_bar() as progress:
        return run_what_if(
            place,
            champion,
            challenger,
            label=label,
            unanswerable=unanswerable,
            wanted=Filter(since=since, until=until),
            progress=lambda done, total: progress("reading decisions", done / max(total, 1)),
        )


def _changed(champion: Bundle, assignments: list[str], settings: Path | None) -> BundleSpec:
    from monitor.what_if.settings import changed_spec, parse_assignment, read_settings

    changes = [] if settings is None else [read_settings(settings)]
    changes += [parse_assignment(text, champion.spec) for text in assignments]
    return changed_spec(champion.spec, changes)


def show(result: WhatIf) -> None:
    """The result as a person reads it."""
    _say(
        f"{result.compared} decisions of {result.champion} against {result.challenger}, "
        f"{result.seconds:.1f} s"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    table.add_column("level", no_wrap=True)
    for name in ("then", "now", "new", "gone", "unsure", "% points, 95 %", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, level, change in _lines(result):
        table.add_row(name, level, *_cells(change))
    out.print(table)
    for name, level, change in _lines(result):
        if name != "overall":
            for word in ("appeared", "vanished", "uncertain"):
                _examples(f"{name} {level}", word, getattr(change, f"{word}_examples"))
    for name, reason in result.unanswerable.items():
        _warn(f"not compared: {name}: {reason} (replay answers this)")
    for reason, counted in result.left_out.items():
        _warn(f"left out: {counted.count} {reason}: {', '.join(counted.examples)} ...")
    if result.not_reproduced.count:
        _warn(
            f"not reproduced: {result.not_reproduced.count} recorded verdicts are not what their "
            f"traces give: {', '.join(result.not_reproduced.examples)} ..."
        )


def _lines(result: WhatIf) -> Iterator[tuple[str, str, Change]]:
    """Everything together first; a cluster's flags only where they change."""
    for level, change in result.overall.items():
        yield "overall", level, change
    for name, changes in result.clusters.items():
        for level, change in changes.items():
            if level == "alert" or change.appeared or change.vanished or change.uncertain:
                yield name, level, change
    for name, change in result.rules.items():
        yield f"rule:{name}", "alert", change


def _cells(change: Change) -> list[str]:
    counts = (change.champion, change.challenger, change.appeared, change.vanished)
    points = (100 * share for share in (change.rate_change, change.low, change.high))
    rate = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*points)
    return [*map(str, counts), str(change.uncertain), rate, f"{change.p_value:.2g}"]


def _examples(what: str, word: str, examples: tuple[Example, ...]) -> None:
    if examples:
        shown = ", ".join(f"{e.decision_id} ({_scores(e)})" for e in examples)
        _say(f"{what}, {word}: {shown}")


def _scores(example: Example) -> str:
    if example.champion is None and example.challenger is None:
        return "by a rule"
    then, now = (
        "below" if score is None else f"{score:.3f}"
        for score in (example.champion, example.challenger)
    )
    return then if then == now else f"{then} -> {now}"


def _say(line: str) -> None:
    out.print(line, markup=False, highlight=False, soft_wrap=True)


def _warn(line: str) -> None:
    err.print(line, markup=False, highlight=False, soft_wrap=True)
