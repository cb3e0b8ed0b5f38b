"""The one writer of a chain: it holds the file's lock, checks the tail, and commits.

A chain has one writer because each record names the one before. The lock is the operating
system's, on a file beside the database, so it goes when the process goes, however it goes. Every
commit looks again at the head it builds on; should another program have written there, the commit
is refused and the chain does not fork.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, insert, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from monitor.audit_log import reader
from monitor.audit_log.chain import canonical_bytes, record_hash
from monitor.audit_log.record import AuditRecord, RecordKind
from monitor.audit_log.schema import database_path, open_writer, reason, records_table
from monitor.audit_log.verify import ChainHead, check_rows, start_of
from monitor.errors import AuditChainError, AuditError

TAIL_RECORDS = 256
"""Records verified on opening; `audit verify` proves the rest."""


class DuplicateDecisionError(AuditError):
    """A decision of this id is stored already; the record is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Records linked into the chain, ready to be committed together."""

    base: ChainHead
    head: ChainHead
    rows: tuple[dict[str, Any], ...]


class AuditStore:
    """A chain open for writing. Not thread-safe: one thread commits."""

    def __init__(self, url: str, chain: str) -> None:
        """Take the lock, open the tables, verify the tail; AuditError says what is in the way."""
        self.path = database_path(url)
        self._lock = _Lock(self.path)
        try:
            self._engine: Engine = open_writer(url)
            self.head = self._verified_head(chain)
        except BaseException:
            self.close()
            raise

    def link(self, records: Sequence[AuditRecord]) -> Batch:
        """The records at the places that follow the head; nothing is written yet."""
        head = self.head
        rows = []
        for record in records:
            sequence = head.sequence + 1
            body = record.body(head.chain, sequence)
            body_bytes = canonical_bytes(body)
            digest = record_hash(head.hash, body_bytes)
            rows.append(
                {
                    "chain": head.chain,
                    "sequence": sequence,
                    "kind": body["kind"],
                    "decision_id": record.decision_id,
                    "time": body["time"],
                    "time_us": record.time_us,
                    "verdict": body["verdict"],
                    "body": body_bytes,
                    "prev_hash": head.hash,
                    "hash": digest,
                }
            )
            head = ChainHead(chain=head.chain, sequence=sequence, hash=digest)
        return Batch(base=self.head, head=head, rows=tuple(rows))

    def commit(self, batch: Batch) -> None:
        """Store a batch whole, on disk, or raise AuditError and store nothing of it.

        A batch whose first commit failed may be given again: had it reached the disk after all,
        it is found there and not written twice.
        """
        try:
            with self._engine.begin() as connection:
                row = reader.head(connection, batch.base.chain)
                found = (
                    start_of(batch.base.chain)
                    if row is None
                    else ChainHead(chain=batch.base.chain, sequence=row.sequence, hash=row.hash)
                )
                if found == batch.base:
                    connection.execute(insert(records_table), batch.rows)
                elif found != batch.head:
                    raise AuditChainError(
                        f"audit log {self.path}: found head {found.sequence} ({found.hash}), "
                        f"expected {batch.base.sequence} ({batch.base.hash}): something else "
                        "wrote to this chain",
                        chain=found.chain,
                        sequence=found.sequence,
                    )
        except IntegrityError as error:
            raise DuplicateDecisionError(
                f"audit log {self.path} refuses a record: {reason(error)}"
            ) from error
        except SQLAlchemyError as error:
            raise AuditError(f"audit log {self.path} cannot be written: {reason(error)}") from error
        self.head = batch.head

    def holds(self, decision_id: str) -> bool:
        """Whether a decision of this id is stored, in any chain."""
        statement = select(records_table.c.sequence).where(
            records_table.c.decision_id == decision_id,
            records_table.c.kind == RecordKind.DECISION.value,
        )
        try:
            with self._engine.connect() as connection:
                return connection.execute(statement).first() is not None
        except SQLAlchemyError as error:
            raise AuditError(f"audit log {self.path} cannot be read: {reason(error)}") from error

    def close(self) -> None:
        """Close the database, then let go of the lock."""
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.dispose()
        self._lock.release()

    def _verified_head(self, chain: str) -> ChainHead:
        """The head after the last records of the chain have been verified."""
        with self._engine.connect() as connection:
            row = reader.head(connection, chain)
            if row is None:
                return start_of(chain)
            after = row.sequence - TAIL_RECORDS
            if after <= 0:
                base = start_of(chain)
            else:
                table = records_table
                base_hash = connection.execute(
                    select(table.c.hash).where(table.c.chain == chain, table.c.sequence == after)
                ).scalar_one_or_none()
                base = ChainHead(chain=chain, sequence=after, hash=base_hash or "")
        return check_rows(reader.rows(self._engine, chain, base.sequence), base)


class _Lock:
    """An exclusive lock on PATH.lock for as long as this process lives or until release."""

    def __init__(self, path: Path) -> None:
        lock_path = Path(f"{path}.lock")
        try:
            lock_path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise AuditError(f"audit log lock {lock_path} cannot be opened: {error}") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise AuditError(
                f"audit log {path} is being written by process {holder or 'unknown'}; "
                "each server needs a log of its own"
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let go; the file stays, since to remove it would race with the next to lock it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
