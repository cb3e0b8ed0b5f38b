"""`sae-monitor bundle diff`: what differs, and with a log what would change."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from monitor.bundle import load_bundle
from monitor.cli.audit_filters import Since, seconds_of
from monitor.cli.common import AsJson, bundle_folder, exit_on_error, out
from monitor.cli.what_if import Export, MaybeAudit, compare, show


def diff(
    before: Annotated[str, typer.Argument(help="A bundle's folder, or default.")],
    after: Annotated[str, typer.Argument(help="Another's.")],
    audit: MaybeAudit = None,
    export: Export = None,
    since: Since = None,
    until: Since = None,
    as_json: AsJson = False,
) -> None:
    """Digests, thresholds, clusters, latents, heads: what differs between two bundles.

    With a log or an export of the first one's decisions also what alerts would appear and vanish,
    as what-if says.
    """
    from monitor.bundle_diff import differences

    result = None
    with exit_on_error():
        first, second = (load_bundle(bundle_folder(name)) for name in (before, after))
        found = differences(first, second)
        if audit is not None or export is not None:
            from monitor.what_if.settings import unanswerable

            result = compare(
                first,
                second.spec,
                label=second.label,
                unanswerable=unanswerable(first, second),
                audit=audit,
                export=export,
                since=seconds_of(since),
                until=seconds_of(until),
            )
    if as_json:
        line = {
            "differences": [asdict(one) for one in found],
            "what_if": None if result is None else asdict(result),
        }
        sys.stdout.write(json.dumps(line) + "\n")
        return
    table = Table("", first.label, second.label, box=None)
    for one in found:
        table.add_row(one.place, *("-" if x is None else x for x in (one.before, one.after)))
    out.print(table if found else "no difference")
    if result is not None:
        show(result)
