"""What a replay made of decisions on record, as the report shows it: classes, causes, flips.

Reads the manifest and the parts that it names; the log is asked for what was scored then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from monitor.audit_log.query import query
from monitor.audit_log.record import iso_time
from monitor.errors import AuditError
from monitor.records import Verdict
from monitor.replay.compare import FACTS
from monitor.replay.manifest import MANIFEST, Manifest, State, load_manifest
from monitor.replay.parts import sha256_of
from monitor.replay.summary import COMPARED, Group, fact_text

EXAMPLES = 5
"""Decisions named of each kind of flip of a cluster."""
_COLUMNS = ["id", "class", "verdict", "verdict_then", "clusters", "clusters_gone", "time_then"]

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """One decision in which a cluster, or the policy, says something else."""

    decision_id: str
    then: str
    """pass, flag or alert."""
    now: str
    score_then: float | None
    """Fused; None for the policy, and where the report's log does not have the decision."""
    score_now: float | None


@dataclass(slots=True, kw_only=True)
class Flips:
    """What became of one cluster's verdicts, or the policy's."""

    compared: int = 0
    alerts_then: int = 0
    alerts_now: int = 0
    by_kind: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Verdict then and now, where they differ -> decisions."""
    examples: dict[tuple[str, str], list[Flip]] = field(default_factory=dict)

    def add(self, decision_id: str, then: str, now: str, score: float | None = None) -> None:
        """Counts a decision."""
        alert = Verdict.ALERT.value
        self.compared += 1
        self.alerts_then += then == alert
        self.alerts_now += now == alert
        if then != now:
            self.by_kind[then, now] += 1
            kept = self.examples.setdefault((then, now), [])
            if len(kept) < EXAMPLES:
                kept.append(
                    Flip(
                        decision_id=decision_id,
                        then=then,
                        now=now,
                        score_then=None,
                        score_now=score,
                    )
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Records that were made by the same things."""

    made_by: str
    classes: tuple[tuple[str, int], ...]
    """Best first."""
    differs: tuple[tuple[str, str, str], ...]
    """What differs, then and now."""
    not_recorded: tuple[str, ...]
    score_difference: float
    """Largest of the clusters' scores, in logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """One replay."""

    folder: str
    source: str
    """The log that was replayed."""
    now: str
    """Bundle, dtype and backend that decided again."""
    first_time: str
    last_time: str
    is_done: bool
    classes: tuple[tuple[str, int], ...]
    """Of the compared, best first."""
    lost: tuple[tuple[str, int], ...]
    """Why rows were not scored."""
    causes: tuple[Cause, ...]
    overall: Flips
    clusters: dict[str, Flips]
    elsewhere: int
    """Examples that are not in the report's log."""

    @property
    def compared(self) -> int:
        """Decisions."""
        return sum(n for _, n in self.classes)


def read_replay(folder: Path, url: str, progress: Progress = lambda what, share: None) -> Replayed:
    """The replay in a folder.

    Args:
        url: the log of the report, which has the scores of then.

    Raises:
        AuditError: there is no replay, nothing of it was compared, or a part is not as it was
            written.
        SettingsError: the manifest cannot be read.
    """
    manifest = load_manifest(folder) if (folder / MANIFEST).is_file() else None
    if manifest is None:
        raise AuditError(f"--replay {folder}: found no manifest.json, expected a replay's folder")
    totals = manifest.totals()
    classes = tuple((c.value, totals.count(c)) for c in COMPARED)
    if not any(n for _, n in classes):
        raise AuditError(
            f"--replay {folder}: found {totals.rows} rows and no decision that was compared, "
            "expected a replay of an audit log"
        )
    overall, clusters = Flips(), dict[str, Flips]()
    first_us, last_us = 2**63, 0
    for row in _rows(manifest, folder, {name for name, _ in classes}, progress):
        first_us, last_us = min(first_us, row["time_then"]), max(last_us, row["time_then"])
        overall.add(row["id"], row["verdict_then"], row["verdict"])
        for result in row["clusters"]:
            # A cluster that was not there then passed, as in the classes.
            then = result["verdict_then"] or Verdict.PASS.value
            flips = clusters.setdefault(result["cluster"], Flips())
            flips.add(row["id"], then, result["verdict"], result["fused"])
        for gone in row["clusters_gone"]:
            flips = clusters.setdefault(gone["cluster"], Flips())
            flips.add(row["id"], gone["verdict_then"], Verdict.PASS.value)
    elsewhere = _scores_then(url, clusters)
    facts = manifest.facts
    return Replayed(
        folder=str(folder),
        source=", ".join(str(one["name"]) for one in manifest.inputs),
        now=f"{facts['bundle']}, {facts['dtype']}, {facts['backend']}",
        first_time=iso_time(first_us),
        last_time=iso_time(last_us),
        is_done=manifest.state is State.DONE,
        classes=classes,
        lost=tuple(totals.reasons.items()),
        causes=tuple(_cause(group, facts) for group in totals.groups),
        overall=overall,
        clusters=clusters,
        elsewhere=elsewhere,
    )


def _rows(
    manifest: Manifest, folder: Path, compared: set[str], progress: Progress
) -> Iterator[dict[str, Any]]:
    """The compared rows of the parts, whose bytes are checked first."""
    for done, index in enumerate(sorted(manifest.parts)):
        part = manifest.parts[index]
        progress(f"reading replay {folder.name}", done / len(manifest.parts))
        path = folder / part.name
        if sha256_of(path) != part.sha256:
            raise AuditError(
                f"{path}: is not there as the manifest names it; run the replay again to mend it"
            )
        try:
            with pq.ParquetFile(path) as opened:
                for batch in opened.iter_batches(columns=_COLUMNS):
                    times = batch.column("time_then").cast(pa.int64()).to_pylist()
                    for row, time_us in zip(batch.to_pylist(), times, strict=True):
                        if row["class"] in compared:
                            yield {**row, "time_then": time_us}
        except (OSError, pa.ArrowException) as error:
            raise AuditError(f"{path}: cannot be read: {error}") from error


def _scores_then(url: str, clusters: Mapping[str, Flips]) -> int:
    """Fills in the scores of the examples; gives how many decisions the log does not have."""
    wanted = {
        e.decision_id for f in clusters.values() for kept in f.examples.values() for e in kept
    }
    bodies = {one: next(query(url, decision_id=one), None) for one in sorted(wanted)}
    for name, flips in clusters.items():
        for kind, kept in flips.examples.items():
            flips.examples[kind] = [_with_score(one, name, bodies[one.decision_id]) for one in kept]
    return sum(body is None for body in bodies.values())


def _with_score(flip: Flip, cluster: str, body: Mapping[str, Any] | None) -> Flip:
    score = None if body is None else body["clusters"].get(cluster, {}).get("fused")
    return Flip(
        decision_id=flip.decision_id,
        then=flip.then,
        now=flip.now,
        score_then=score,
        score_now=flip.score_now,
    )


def _cause(group: Group, facts: Mapping[str, Any]) -> Cause:
    then = group.then
    return Cause(
        made_by=f"{then['bundle']}, {then['dtype']}, {then['backend']}",
        classes=tuple((c.value, n) for c in COMPARED if (n := group.classes.get(c.value))),
        differs=tuple(
            (name, fact_text(then[FACTS[name]]), fact_text(facts[FACTS[name]]))
            if name in FACTS
            else (name, "other tokens were scored", "")
            for name in group.differs
        ),
        not_recorded=group.not_recorded,
        score_difference=group.score_difference,
    )
