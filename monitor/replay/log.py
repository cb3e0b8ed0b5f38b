"""The decisions of an audit log as rows: their tokens opened, their stages as they were scored.

A record whose tokens cannot be had is a row all the same, and says why. Nothing is verified but
that traces and sealed bytes are those of their records; `audit verify` proves the rest.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from monitor.audit_log.query import BESIDE, Filter, Place, heads, rows
from monitor.audit_log.record import RecordKind
from monitor.audit_log.schema import shown
from monitor.audit_log.sealing import KeyRing, unpack
from monitor.audit_log.trace import DecodedTrace, decode_trace
from monitor.errors import AuditError, SettingsError
from monitor.records import AuditLevel, ScoreRequest
from monitor.replay.rows import (
    NO_TOKENS,
    Input,
    Original,
    Progress,
    ReplayRow,
    Start,
    Survey,
    Unreadable,
)


@dataclass(frozen=True, slots=True)
class LogInput:
    """Decisions of an audit log.

    Args:
        url: the log's.
        wanted: which decisions.
        keys_file: opens what is sealed; read again wherever a segment is scored.
        through: the last sequence of each chain that counts; all of now where None.
    """

    url: str
    wanted: Filter = field(default_factory=Filter)
    keys_file: Path | None = None
    through: Mapping[str, int] | None = None

    def pinned(self, identity: Mapping[str, Any]) -> Input:
        """See `Input`; records that came later are left to another run."""
        through = identity.get("through")
        return replace(self, through=through) if isinstance(through, dict) else self

    def survey(self, part_rows: int, progress: Progress) -> Survey:
        """See `Input`; the digest is over the hashes of the records, in order."""
        self.keys()
        through = heads(self.url) if self.through is None else self.through
        digest = hashlib.sha256()
        starts: list[tuple[Start, int]] = []
        n_rows = 0
        alerts = replace(self.wanted, kind=RecordKind.STREAM_ALERT)
        streams = {body["decision_id"] for _, body in rows(self.url, alerts, through=through)}
        for row, body in rows(self.url, self.wanted, through=through):
            streams.discard(body["decision_id"])
            if n_rows % part_rows == 0:
                progress(f"reading the audit log: {n_rows:,} decisions", 0.0)
                starts.append(((row.time_us, row.chain, row.sequence), 0))
            n_rows += 1
            starts[-1] = (starts[-1][0], starts[-1][1] + 1)
            digest.update(bytes.fromhex(row.hash))
        return Survey(
            identity={
                "kind": "audit",
                "name": shown(self.url),
                "rows": n_rows,
                "sha256": digest.hexdigest(),
                "filter": {
                    name: value for name, value in asdict(self.wanted).items() if value is not None
                },
                "through": dict(through),
                "undecided": sorted(filter(self._is_undecided, streams)),
            },
            starts=tuple(starts),
        )

    def rows(self, start: Start, n_rows: int, *, policy: str) -> Iterator[ReplayRow]:
        """See `Input`."""
        time_us, chain, sequence = start
        place: Place = (int(time_us), str(chain), int(sequence))
        keys, starts = self.keys(), self._server_starts()
        found = rows(self.url, self.wanted, *BESIDE, start=place, through=self.through)
        for row, body in islice(found, n_rows):
            facts = {**body["provenance"], **starts.facts(row.chain, row.sequence, body)}
            original = Original(
                decision_id=body["decision_id"], time_us=row.time_us, body=body, facts=facts
            )
            request: ScoreRequest | Unreadable
            try:
                trace, request = _opened(body, row.trace, row.sealed, keys)
                original = replace(original, trace=trace)
            except _Refused as refused:
                request = refused.unreadable
            yield ReplayRow(
                source=row.chain,
                place=row.sequence,
                id=original.decision_id,
                request=request,
                stages=() if original.trace is None else original.trace.trace.stages,
                original=original,
            )

    def keys(self) -> KeyRing | None:
        """The ring of `keys_file`; SettingsError where it cannot be read."""
        if self.keys_file is None:
            return None
        try:
            text = self.keys_file.read_text("utf-8", errors="replace")
        except OSError as error:
            raise SettingsError(f"{self.keys_file}: cannot be read: {error.strerror}") from None
        return KeyRing.parse(text, str(self.keys_file))

    def _is_undecided(self, stream: str) -> bool:
        """Whether an alerting stream has no decision: its server died before."""
        return next(rows(self.url, Filter(decision_id=stream)), None) is None

    def _server_starts(self) -> _ServerStarts:
        starts = _ServerStarts()
        for row, body in rows(self.url, Filter(kind=RecordKind.SERVER_START)):
            starts.add(row.chain, row.sequence, body)
        return starts


class _ServerStarts:
    """What servers recorded of themselves, by chain."""

    def __init__(self) -> None:
        self._sequences: dict[str, list[int]] = {}
        self._bodies: dict[str, list[Mapping[str, Any]]] = {}

    def add(self, chain: str, sequence: int, body: Mapping[str, Any]) -> None:
        at = bisect.bisect(self._sequences.setdefault(chain, []), sequence)
        self._sequences[chain].insert(at, sequence)
        self._bodies.setdefault(chain, []).insert(at, body)

    def facts(self, chain: str, sequence: int, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a record's provenance leaves out; nothing where no start of its bundle is known."""
        at = bisect.bisect(self._sequences.get(chain, []), sequence)
        if not at:
            return {}
        start = self._bodies[chain][at - 1]
        if start.get("bundle_digest") != body["provenance"]["bundle_digest"]:
            return {}
        return {name: start[name] for name in _BESIDE_PROVENANCE if name in start}


_BESIDE_PROVENANCE = ("sae_digests", "heads_digest", "torch", "transformers", "max_step_tokens")


class _Refused(Exception):
    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.unreadable = Unreadable(reason=reason, detail=detail)


def _opened(
    body: Mapping[str, Any], trace: bytes | None, sealed: bytes | None, keys: KeyRing | None
) -> tuple[DecodedTrace, ScoreRequest]:
    level = AuditLevel(body["level"])
    if level.rank < AuditLevel.TOKENS.rank:
        raise _Refused(f"level {level.value}")
    if trace is None or sealed is None:
        raise _Refused("no token ids", "its activations were given without ids")
    for name, stored in (("trace", trace), ("sealed", sealed)):
        if hashlib.sha256(stored).hexdigest() != body[name]["sha256"]:
            raise _Refused(f"damaged {name}", f"{name}: not the bytes of the record's sha256")
    key = body["sealed"]["key"]
    if key is not None and (keys is None or key not in keys):
        raise _Refused(f"key {key}", f"sealed under key {key!r}, which is not given")
    try:
        value = unpack(sealed) if key is None else _open(sealed, key, body, keys)
        decoded = decode_trace(trace)
    except AuditError as error:
        raise _Refused("damaged sealed", str(error)) from error
    token_ids = tuple(value["token_ids"])
    if not token_ids:
        raise _Refused(NO_TOKENS)
    return decoded, ScoreRequest(
        token_ids=token_ids,
        tokenizer_fingerprint=body["provenance"]["tokenizer_fingerprint"],
        policy=body["policy"],
    )


def _open(sealed: bytes, key: str, body: Mapping[str, Any], keys: KeyRing | None) -> Any:
    assert keys is not None
    return keys.open(sealed, key, body["decision_id"])
