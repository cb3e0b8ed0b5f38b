"""Rows of a replay as Parquet parts: a segment each, written whole or not at all.

`SCHEMA` is the layout; what each column holds is in its field's metadata, under `description`.
Parts hold no token ids and no texts, whatever the input held. `trace` is as `trace.decode_trace`
reads it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from monitor.audit_log.trace import encode_trace
from monitor.errors import MonitorError, SettingsError
from monitor.hash_cache import CHUNK_BYTES
from monitor.pipeline import Traced
from monitor.records import Decision
from monitor.replay.compare import Comparison, compare
from monitor.replay.rows import ReplayClass, ReplayRow, Unreadable

SCHEMA_VERSION = 2
PARTIAL = ".partial"


def _field(name: str, kind: pa.DataType, description: str) -> pa.Field:
    return pa.field(name, kind, metadata={"description": description})


_SCORES = [("fused", pa.float64()), ("dense", pa.float64()), ("sae", pa.float64())]
_CLUSTER = pa.struct(
    [
        ("cluster", pa.string()),
        ("verdict", pa.string()),
        ("verdict_then", pa.string()),
        ("stage", pa.string()),
        ("first_crossing", pa.int64()),
        ("calibrated", pa.bool_()),
        ("benign_p", pa.float64()),
        *_SCORES,
    ]
)

SCHEMA = pa.schema(
    [
        _field("source", pa.string(), "the input file's name, or the audit log's chain"),
        _field("place", pa.int64(), "line or row of the file from 1, or sequence in the chain"),
        _field("id", pa.string(), "the row's own id, else its place; a record's decision id"),
        _field("class", pa.string(), "bitwise, numeric, decision, flipped, new, failed, skipped"),
        _field("reason", pa.string(), "of failed and skipped: in a word or two, to count by"),
        _field("error", pa.string(), "of failed and skipped: in full"),
        _field("differs", pa.list_(pa.string()), "what differs between then and now; null if new"),
        _field("score_difference", pa.float64(), "largest of the clusters' scores, logits"),
        _field("token_difference", pa.float64(), "largest of the tokens' logits"),
        _field("trace_error", pa.float64(), "by how much the stored trace may be off, logits"),
        _field("time_then", pa.timestamp("us", "UTC"), "when the decision on record was made"),
        _field("verdict_then", pa.string(), "pass, flag or alert, on record"),
        _field("asked_stage", pa.string(), "prompt, completion or chat; null where not on record"),
        _field("asked_priority", pa.string(), "completion, prompt or replay; null likewise"),
        _field("session_id", pa.string(), "the stream's name on record; empty for a request"),
        _field("verdict", pa.string(), "pass, flag or alert, now"),
        _field("action", pa.string(), "allow, flag or block, now"),
        _field("policy", pa.string(), "name of the policy, now"),
        _field("overall", pa.struct(_SCORES), "0 at flag, 1 at alert"),
        _field("clusters", pa.list_(_CLUSTER), "every cluster's result now, in bundle order"),
        _field(
            "clusters_gone",
            pa.list_(pa.struct([("cluster", pa.string()), ("verdict_then", pa.string())])),
            "clusters on record that there are no longer",
        ),
        _field("rules", pa.list_(pa.string()), "joint rules that fire now"),
        _field("tokens_received", pa.int64(), "tokens of the request or stream"),
        _field("tokens_scored", pa.int64(), "those of them that were scored"),
        _field("trace", pa.binary(), "scores of every token now"),
    ],
    metadata={"sae-monitor replay": str(SCHEMA_VERSION)},
)


@dataclass(frozen=True, slots=True)
class PartRow:
    """A row of a part, and what its counts are made of."""

    columns: dict[str, Any]
    replay_class: ReplayClass
    comparison: Comparison | None = None
    reason: str | None = None
    n_scored: int = 0


def part_row(
    row: ReplayRow, outcome: Traced | MonitorError | Unreadable, facts: dict[str, Any]
) -> PartRow:
    """What a part says of one row."""
    columns: dict[str, Any] = {"source": row.source, "place": row.place, "id": row.id}
    if row.original is not None:
        columns["time_then"] = row.original.time_us
        columns["verdict_then"] = row.original.body["verdict"]
        columns["session_id"] = row.original.body["session_id"]
        for name, value in row.original.body.get("asked", {}).items():
            columns[f"asked_{name}"] = value
    if not isinstance(outcome, Traced):
        return _not_scored(columns, outcome)
    stored = encode_trace(outcome.trace)
    found = None if row.original is None else compare(row.original, outcome, stored, facts)
    replay_class = ReplayClass.NEW if found is None else found.replay_class
    then = {} if row.original is None else row.original.body["clusters"]
    columns |= _decided(outcome.decision, then) | {"class": replay_class.value, "trace": stored}
    if found is not None:
        columns["differs"] = list(found.differs)
        for name in ("score_difference", "token_difference", "trace_error"):
            columns[name] = getattr(found, name)
    return PartRow(columns, replay_class, found, None, outcome.decision.coverage.scored)


def write_part(folder: Path, index: int, rows: Sequence[PartRow]) -> tuple[str, str, int]:
    """Writes a part under a name of its own content; gives name, sha256 and bytes.

    Raises:
        SettingsError: the folder cannot be written.
    """
    partial = folder / f".{index:06d}.{os.getpid()}{PARTIAL}"
    try:
        with pq.ParquetWriter(partial, SCHEMA, compression="zstd") as writer:
            writer.write_table(pa.Table.from_pylist([row.columns for row in rows], SCHEMA))
        digest = sha256_of(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        name = f"part-{index:06d}-{digest[:12]}.parquet"
        size = partial.stat().st_size
        os.replace(partial, folder / name)
    except OSError as error:
        raise SettingsError(f"{folder}: cannot be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    return name, digest, size


def sha256_of(path: Path) -> str:
    """The file's sha256 in hexadecimal; an empty text where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(CHUNK_BYTES):
                digest.update(piece)
    except OSError:
        return ""
    return digest.hexdigest()


def _not_scored(columns: dict[str, Any], outcome: MonitorError | Unreadable) -> PartRow:
    if isinstance(outcome, Unreadable):
        replay_class, reason = ReplayClass.SKIPPED, outcome.reason
        error = outcome.detail or outcome.reason
    else:
        replay_class, reason = ReplayClass.FAILED, type(outcome).__name__.removesuffix("Error")
        error = str(outcome)
    columns |= {"class": replay_class.value, "reason": reason, "error": error}
    return PartRow(columns, replay_class, None, reason)


def _decided(decision: Decision, then: dict[str, Any]) -> dict[str, Any]:
    return {
        "verdict": decision.verdict.value,
        "action": decision.action.value,
        "policy": decision.policy,
        "overall": {name: _number(getattr(decision.overall, name)) for name, _ in _SCORES},
        "clusters": [
            {
                "cluster": result.cluster,
                "verdict": result.verdict.value,
                "verdict_then": then.get(result.cluster, {}).get("verdict"),
                "stage": None if result.stage is None else result.stage.value,
                "first_crossing": result.first_crossing,
                "calibrated": result.calibrated,
                "benign_p": result.benign_p,
                **{name: _number(getattr(result, name)) for name, _ in _SCORES},
            }
            for result in decision.clusters
        ],
        "clusters_gone": [
            {"cluster": name, "verdict_then": result["verdict"]}
            for name, result in then.items()
            if name not in {one.cluster for one in decision.clusters}
        ],
        "rules": [rule.rule for rule in decision.rules],
        "tokens_received": decision.coverage.received,
        "tokens_scored": decision.coverage.scored,
    }


def _number(value: float) -> float | None:
    return value if value == value else None
