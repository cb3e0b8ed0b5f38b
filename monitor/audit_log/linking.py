"""Records at their places in a chain: each one's bytes, its hash, and the row that stores them.

A record is put in its place as soon as it is made, so that of a group only bytes are kept.
"""

from __future__ import annotations

from typing import NamedTuple

from monitor.audit_log.chain import canonical_bytes, record_digest
from monitor.audit_log.merkle import leaf_hash
from monitor.audit_log.record import AuditRecord
from monitor.audit_log.verify import ChainHead


class LinkedRow(NamedTuple):
    """A row of the records' table, in the order of its columns."""

    chain: str
    sequence: int
    kind: str
    decision_id: str | None
    time: str
    time_us: int
    verdict: str | None
    body: bytes
    prev_hash: str
    hash: str
    severity: str | None
    caller_hmac: str | None
    trace: bytes | None
    sealed: bytes | None


class Linking:
    """Rows that follow a head, one after the other; nothing is written."""

    def __init__(self, base: ChainHead) -> None:
        self.base = base
        self.rows: list[LinkedRow] = []
        self.leaves: list[bytes] = []
        """The leaf hash of each row."""
        self._digest = bytes.fromhex(base.hash)
        self._hash = base.hash

    @property
    def head(self) -> ChainHead:
        """The head after the last row."""
        sequence = self.base.sequence + len(self.rows)
        return ChainHead(chain=self.base.chain, sequence=sequence, hash=self._hash)

    def add(self, record: AuditRecord) -> None:
        """Put a record after the last; AuditError, and nothing put, where it has no bytes."""
        sequence = self.base.sequence + len(self.rows) + 1
        body = record.body(self.base.chain, sequence)
        body_bytes = canonical_bytes(body, plain=record.plain)
        digest = record_digest(self._digest, body_bytes)
        row = LinkedRow(
            self.base.chain,
            sequence,
            record.kind._value_,
            record.decision_id,
            body["time"],  # type: ignore[arg-type]  # all four are strings in a body
            record.time_us,
            body["verdict"],  # type: ignore[arg-type]
            body_bytes,
            self._hash,
            digest.hex(),
            body.get("severity"),  # type: ignore[arg-type]
            body.get("caller_hmac"),  # type: ignore[arg-type]
            record.trace,
            record.sealed,
        )
        self.rows.append(row)
        self.leaves.append(leaf_hash(digest))
        self._digest, self._hash = digest, row.hash
