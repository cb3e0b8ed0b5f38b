"""Log, bundle, verification and what-if: all that a report says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from scipy.stats import binomtest

from monitor import __version__
from monitor.audit_log.query import Filter, body_of, pages, query
from monitor.audit_log.schema import shown
from monitor.audit_log.sealing import KeyRing
from monitor.audit_log.verify import AuditReport, verify
from monitor.audit_report.heat import DecisionHeat, heat_of
from monitor.audit_report.summary import Bins, ClusterCounts, LatentShare, Summary
from monitor.bundle import Bundle
from monitor.errors import AuditChainError, AuditError
from monitor.pages.document import visible
from monitor.what_if.run import WhatIf, what_if
from monitor.what_if.settings import unanswerable

if TYPE_CHECKING:
    from monitor.audit_report.replayed import Replayed

PAGE_RECORDS = 2000
N_LATENTS = 12
"""Of a cluster."""
N_LATEST = 3
"""Decisions shown token by token where none is chosen: the latest that alerted."""

Progress = Callable[[str, float], None]
"""What is being done, and the share of it that is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterRow:
    """One cluster of the log."""

    name: str
    title: str
    """Empty without the bundle."""
    counts: ClusterCounts
    rate: tuple[float, float, float]
    """Share of decisions that alerted, with its 95 % interval (Clopper-Pearson)."""
    flag: float | None
    """Thresholds of the bundle that was given."""
    alert: float | None
    latents: tuple[tuple[str, LatentShare], ...]
    """`sae/id` and what it gave to alerts, the largest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that the page and the plots show."""

    audit: str
    """The log's file, or its URL without the password."""
    made: str
    server_version: str
    summary: Summary
    clusters: tuple[ClusterRow, ...]
    bundle: str | None
    bundle_digest: str | None
    n_of_bundle: int
    """Decisions that this bundle made."""
    verified: AuditReport | None
    broken: str
    """What does not hold; empty where all does."""
    changed: WhatIf | None
    replayed: tuple[Replayed, ...]
    heats: tuple[DecisionHeat, ...]


def build_report(
    url: str,
    *,
    now: datetime,
    bundle: Bundle | None = None,
    challenger: Bundle | None = None,
    replays: Sequence[Path] = (),
    since: float | None = None,
    until: float | None = None,
    decisions: Sequence[str] = (),
    keys: KeyRing | None = None,
    public_key: str | None = None,
    progress: Progress = lambda what, share: None,
) -> Report:
    """Reads the log twice: once to count, once to verify; and a third time with a challenger.

    Args:
        bundle: gives titles, labels and thresholds.
        challenger: what it would have said of the decisions of `bundle` is shown beside.
        replays: folders of `replay`, whose classes and flips are shown.
        decisions: ids to show token by token; the latest alerts where there are none.
        public_key: as for `verify`.

    Raises:
        AuditError: the log cannot be read, or holds no decision of that time; or a folder holds no
            replay of a log.
        SettingsError: a replay's manifest cannot be read.
        NotFoundError: one of `decisions` is not there.
    """
    wanted = Filter(since=since, until=until)
    summary = _count(url, wanted, progress)
    verified, broken = None, ""
    try:
        verified = verify(
            url,
            lambda done, total: progress("verifying records", done / max(total, 1)),
            public_key=public_key,
        )
    except AuditChainError as error:
        broken = str(error)
    changed = None
    if bundle is not None and challenger is not None:
        changed = what_if(
            url,
            bundle,
            challenger.spec,
            label=challenger.label,
            unanswerable=unanswerable(bundle, challenger),
            wanted=wanted,
            progress=lambda done, total: progress("asking the other bundle", done / max(total, 1)),
        )
    limits = {} if bundle is None else {c.id: c.thresholds.alert for c in bundle.spec.clusters}
    labels = {} if bundle is None else _labels(bundle)
    chosen = decisions or summary.latest_alerts[: -N_LATEST - 1 : -1]
    return Report(
        audit=shown(url),
        made=now.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        server_version=__version__,
        summary=summary,
        clusters=tuple(_rows(summary, bundle)),
        bundle=None if bundle is None else bundle.label,
        bundle_digest=None if bundle is None else bundle.digest,
        n_of_bundle=_of_bundle(summary, bundle),
        verified=verified,
        broken=broken,
        changed=changed,
        replayed=_replayed(replays, url, progress),
        heats=tuple(heat_of(url, one, limits, keys, labels) for one in chosen),
    )


def _replayed(folders: Sequence[Path], url: str, progress: Progress) -> tuple[Replayed, ...]:
    if not folders:
        return ()
    # Imports pyarrow, and all that scores: not for a report that needs neither.
    from monitor.audit_report.replayed import read_replay

    return tuple(read_replay(folder, url, progress) for folder in folders)


def _labels(bundle: Bundle) -> dict[tuple[str, int], str]:
    return {(x.sae, x.id): x.label for cluster in bundle.spec.clusters for x in cluster.latents}


def _count(url: str, wanted: Filter, progress: Progress) -> Summary:
    ends = [
        next(
            query(url, limit=1, newest_first=last, since=wanted.since, until=wanted.until),
            None,
        )
        for last in (False, True)
    ]
    if ends[0] is None or ends[1] is None:
        raise AuditError("report: found no decision of that time in the audit log, expected one")
    first_us, last_us = ends[0]["time_us"], ends[1]["time_us"]
    summary = Summary(Bins.over(first_us, last_us))
    for page in pages(url, wanted.statement(), page_records=PAGE_RECORDS):
        for row in page:
            summary.add(body_of(row))
        if page:
            share = (page[-1].time_us - first_us) / max(last_us - first_us, 1)
            progress("counting decisions", min(share, 1.0))
    return summary


def _rows(summary: Summary, bundle: Bundle | None) -> list[ClusterRow]:
    """In the bundle's order, then those that it does not have."""
    models = {} if bundle is None else {c.id: c for c in bundle.spec.clusters}
    names = [name for name in models if name in summary.clusters]
    names += sorted(summary.clusters.keys() - models.keys())
    rows = []
    for name in names:
        counts, model = summary.clusters[name], models.get(name)
        labels = {} if model is None else {(x.sae, x.id): x.label for x in model.latents}
        for key, share in counts.latents.items():
            share.label = labels.get(key, share.label)
        interval = binomtest(counts.alerts, summary.decisions).proportion_ci(0.95)
        ranked = sorted(counts.latents.items(), key=lambda item: -abs(item[1].contribution))
        rows.append(
            ClusterRow(
                name=visible(name),
                title="" if model is None else visible(model.title),
                counts=counts,
                rate=(counts.alerts / summary.decisions, float(interval.low), float(interval.high)),
                flag=None if model is None else model.thresholds.flag,
                alert=None if model is None else model.thresholds.alert,
                latents=tuple((f"{sae}/{i}", share) for (sae, i), share in ranked[:N_LATENTS]),
            )
        )
    return rows


def _of_bundle(summary: Summary, bundle: Bundle | None) -> int:
    if bundle is None:
        return 0
    return sum(
        n
        for made_by, n in summary.versions.items()
        if dict(made_by)["bundle_digest"] == bundle.digest
    )
