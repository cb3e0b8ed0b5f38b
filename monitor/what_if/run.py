"""A log or an export under two bundles: the whole comparison."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from monitor.audit_log.logged_traces import Counted, LoggedTraces, Progress
from monitor.audit_log.query import Filter
from monitor.bundle import Bundle
from monitor.bundle_spec import BundleSpec
from monitor.errors import AuditError
from monitor.what_if.changes import Change
from monitor.what_if.comparison import Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """What a challenger would have said of the champion's decisions."""

    champion: str
    champion_digest: str
    challenger: str
    compared: int
    """Decisions."""
    overall: dict[str, Change]
    """By level, flag (or more) and alert: what the policy says."""
    clusters: dict[str, dict[str, Change]]
    """The same for each cluster that both have."""
    rules: dict[str, Change]
    """For each joint rule of either; they alert."""
    unanswerable: dict[str, str]
    """Clusters of the challenger that stored scores say nothing of, and why; left out everywhere,
    `overall` too, with the rules that name them."""
    left_out: dict[str, Counted]
    """Decisions of which nothing can be said, by reason."""
    not_reproduced: Counted
    """Compared decisions whose recorded verdict is not what the champion makes of their trace:
    streams that alerted and were re-tokenised, or a log that was edited."""
    seconds: float


def what_if(
    place: str | Path,
    champion: Bundle,
    challenger: BundleSpec,
    *,
    label: str,
    unanswerable: dict[str, str] | None = None,
    wanted: Filter | None = None,
    progress: Progress = lambda done, total: None,
) -> WhatIf:
    """What `challenger` would have said of the decisions that `champion` made.

    Args:
        place: the log's URL, or the path of an export.
        label: what the challenger is called.
        unanswerable: see `settings.unanswerable`; none where only settings differ.
        wanted: a time filter.

    Raises:
        AuditError: the log cannot be read, or none of its decisions can be compared.
    """
    started = time.perf_counter()
    comparison = Comparison(champion.spec, challenger, unanswerable or {})
    traces = LoggedTraces(
        place,
        bundle_digest=champion.digest,
        clusters=[cluster.id for cluster in champion.spec.clusters],
        policies=comparison.policies,
        sources=comparison.sources,
        wanted=wanted,
        progress=progress,
    )
    for batch in traces:
        comparison.add(batch)
    comparison.add_empty(traces.n_empty)
    if not comparison.n:
        raise AuditError(_nothing(place, champion, traces))
    overall, clusters, rules = comparison.changes()
    return WhatIf(
        champion=champion.label,
        champion_digest=champion.digest,
        challenger=label,
        compared=comparison.n,
        overall=overall,
        clusters=clusters,
        rules=rules,
        unanswerable=unanswerable or {},
        left_out={reason.value: counted for reason, counted in traces.left_out.items()},
        not_reproduced=comparison.not_reproduced,
        seconds=time.perf_counter() - started,
    )


def _nothing(place: str | Path, champion: Bundle, traces: LoggedTraces) -> str:
    found = ", ".join(f"{c.count} {reason}" for reason, c in traces.left_out.items())
    shown = place if isinstance(place, Path) else "the audit log"
    return (
        f"what-if: found no decision of bundle {champion.label} ({champion.digest[:16]}...) with a "
        f"trace in {shown} ({found or 'no decisions'}), expected at least one"
    )
