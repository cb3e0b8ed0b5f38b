"""The one writer of a chain: it holds the lock, checks the tail, commits, and makes checkpoints.

A chain has one writer because each record names the one before. Every commit looks again at the
head it builds on; should another program have written there, the commit is refused and the chain
does not fork.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, bindparam, insert, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from monitor.audit_log import reader
from monitor.audit_log.checkpoint import CHECKPOINT_PREFIX, Signer, Statement
from monitor.audit_log.linking import LinkedRow, Linking
from monitor.audit_log.locks import FileLock
from monitor.audit_log.merkle import Frontier, leaf_hash
from monitor.audit_log.record import AuditRecord, RecordKind
from monitor.audit_log.schema import (
    checkpoints_table,
    database_path,
    insert_rows,
    is_sqlite,
    open_writer,
    reason,
    records_table,
    save_lost_wal,
    shown,
)
from monitor.audit_log.verify import ChainHead, check_checkpoint, check_row, first_base
from monitor.errors import AuditChainError, AuditError

log = logging.getLogger(__name__)

TAIL_RECORDS = 256
"""Records verified on opening, and those since the checkpoint before them; `audit verify` proves
the rest."""


class DuplicateDecisionError(AuditError):
    """Decisions of these ids are stored already; their records are refused."""

    def __init__(self, message: str, places: frozenset[int]) -> None:
        """`places` are those of the refused rows in their batch."""
        super().__init__(message)
        self.places = places


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Records linked into the chain, ready to be committed together."""

    base: ChainHead
    head: ChainHead
    frontier: Frontier
    latest_us: int
    rows: tuple[LinkedRow, ...]
    checkpoint: dict[str, Any] | None = None


class LastCheckpoint(NamedTuple):
    """The newest checkpoint of a chain."""

    time_us: int = 0
    """When it was made, microseconds since 1970 UTC; 0 where there is none."""
    signed: bool = False


class AuditStore:
    """A chain open for writing. Not thread-safe: one thread commits."""

    def __init__(
        self,
        url: str,
        chain: str,
        *,
        signer: Signer | None = None,
        checkpoint_records: int = 1000,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Take the lock, open the tables, verify the tail; AuditError says what is in the way.

        Args:
            checkpoint_records: a batch that brings as many since the last checkpoint ends in one.
            clock: Unix seconds, for the time that checkpoints state.
        """
        self.name = shown(url)
        self._signer = signer
        self._checkpoint_records = checkpoint_records
        self._clock = clock
        self._path = database_path(url) if is_sqlite(url) else None
        self._lock = None if self._path is None else FileLock(self._path)
        try:
            self._engine: Engine = open_writer(url, chain)
            self._inode = None if self._path is None else _inode(self._path)
            self._wal_inode: tuple[int, int] | None = None
            self._open(chain)
        except SQLAlchemyError as error:
            self.close()
            raise AuditError(f"audit log {self.name} cannot be opened: {reason(error)}") from error
        except BaseException:
            self.close()
            raise

    @property
    def uncovered(self) -> int:
        """Records since the last checkpoint."""
        return self.head.sequence - self._covered

    def linking(self) -> Linking:
        """What puts records at the places that follow the head; see `batch`."""
        return Linking(self.head)

    def batch(self, linking: Linking) -> Batch:
        """What `linking` holds, to be committed together, with a checkpoint where one is due."""
        head, rows = linking.head, tuple(linking.rows)
        frontier = self._frontier.extended(linking.leaves)
        latest_us = max((row.time_us for row in rows), default=0)
        latest_us = max(latest_us, self._latest_us)
        due = head.sequence - self._covered >= self._checkpoint_records
        return Batch(
            base=linking.base,
            head=head,
            frontier=frontier,
            latest_us=latest_us,
            rows=rows,
            checkpoint=self._checkpoint_row(head, frontier, latest_us) if due else None,
        )

    def link(self, records: Iterable[AuditRecord]) -> Batch:
        """The records at the places that follow the head; nothing is written yet."""
        linking = self.linking()
        for record in records:
            linking.add(record)
        return self.batch(linking)

    def link_checkpoint(self) -> Batch:
        """A checkpoint of the records as they are, and no further record."""
        return Batch(
            base=self.head,
            head=self.head,
            frontier=self._frontier,
            latest_us=self._latest_us,
            rows=(),
            checkpoint=self._checkpoint_row(self.head, self._frontier, self._latest_us),
        )

    def commit(self, batch: Batch) -> None:
        """Store a batch whole, on disk, or raise AuditError and store nothing of it.

        A batch whose first commit failed may be given again: had it reached the disk after all,
        it is found there and not written twice.
        """
        try:
            with self._engine.begin() as connection:
                self._write(connection, batch)
            self._check_still_there()
        except IntegrityError as error:
            message = f"audit log {self.name} refuses a record: {reason(error)}"
            places = self._stored_before(batch.rows)
            refused = DuplicateDecisionError(message, places) if places else AuditError(message)
            raise refused from error
        except SQLAlchemyError as error:
            raise AuditError(f"audit log {self.name} cannot be written: {reason(error)}") from error
        self.head, self._frontier, self._latest_us = batch.head, batch.frontier, batch.latest_us
        if batch.checkpoint is not None:
            self._covered = batch.head.sequence
            self.last_checkpoint = _last(batch.checkpoint["time_us"], batch.checkpoint["signature"])

    def _stored_before(self, rows: Sequence[LinkedRow]) -> frozenset[int]:
        """The places of decisions that are stored already, in any chain, or earlier in `rows`."""
        c = records_table.c
        kind = RecordKind.DECISION.value
        ids = [row.decision_id if row.kind == kind else None for row in rows]
        statement = select(c.sequence).where(c.decision_id == bindparam("id"), c.kind == kind)
        try:
            with self._engine.connect() as connection:
                return frozenset(
                    place
                    for place, decision_id in enumerate(ids)
                    if decision_id is not None
                    and (
                        decision_id in ids[:place]
                        or connection.execute(statement, {"id": decision_id}).first() is not None
                    )
                )
        except SQLAlchemyError as error:
            raise AuditError(f"audit log {self.name} cannot be read: {reason(error)}") from error

    def close(self) -> None:
        """Close the database, then let go of the lock."""
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.dispose()
        if self._lock is not None:
            self._lock.release()

    def _write(self, connection: Connection, batch: Batch) -> None:
        row = reader.head(connection, batch.base.chain)
        found = (
            self._first
            if row is None
            else ChainHead(chain=batch.base.chain, sequence=row.sequence, hash=row.hash)
        )
        if found == batch.base:
            if batch.rows:
                insert_rows(connection, batch.rows)
            if batch.checkpoint is not None:
                self._write_checkpoint(connection, batch.checkpoint)
        elif found != batch.head:
            raise AuditChainError(
                f"audit log {self.name}: found head {found.sequence} ({found.hash}), "
                f"expected {batch.base.sequence} ({batch.base.hash}): something else "
                "wrote to this chain",
                chain=found.chain,
                sequence=found.sequence,
            )

    def _write_checkpoint(self, connection: Connection, row: dict[str, Any]) -> None:
        """Once: an attempt that seemed to fail may have reached the disk."""
        stored = reader.checkpoint_near(connection, row["chain"], row["sequence"])
        if stored is None or stored.sequence != row["sequence"]:
            connection.execute(insert(checkpoints_table), row)

    def _check_still_there(self) -> None:
        """AuditError when the file was removed or replaced: SQLite would write on to nowhere.

        Where only its write-ahead log was, what that holds is saved into the file.
        """
        if self._path is None:
            return
        if self._inode != _inode(self._path):
            raise AuditError(
                f"audit log {self.name}: the file was removed or replaced while it was written; "
                "put it back, or start again"
            )
        found = _inode(Path(f"{self._path}-wal"))
        if self._wal_inode is not None and self._wal_inode != found:
            save_lost_wal(self._engine, self.name)
            log.warning("audit log %s: its -wal file was removed; nothing is lost", self.name)
            found = None
        self._wal_inode = found

    def _checkpoint_row(
        self, head: ChainHead, frontier: Frontier, latest_us: int
    ) -> dict[str, Any]:
        statement = Statement.make(
            CHECKPOINT_PREFIX,
            chain=head.chain,
            frontier=frontier,
            head_hash=head.hash,
            time_us=round(self._clock() * 1e6),
            signer=self._signer,
        )
        return {
            "chain": statement.chain,
            "sequence": statement.sequence,
            "time_us": statement.time_us,
            "latest_us": latest_us,
            "body": statement.body,
            "signature": statement.signature,
            "frontier": frontier.to_bytes(),
        }

    def _open(self, chain: str) -> None:
        """Verify the tail, from the checkpoint before it on, and go on from there."""
        self._first, frontier = first_base(self._engine, chain)
        head, self._covered, self._latest_us = self._first, self._first.sequence, 0
        self.last_checkpoint = LastCheckpoint()
        with self._engine.connect() as connection:
            last = reader.head(connection, chain)
            stored = self._first.sequence if last is None else int(last.sequence)
            checkpoint = reader.checkpoint_near(connection, chain, stored - TAIL_RECORDS)
            newest = reader.last_checkpoint(connection, chain)
        if newest is not None:
            self._covered, self._latest_us = int(newest.sequence), int(newest.latest_us)
            self.last_checkpoint = _last(newest.time_us, newest.signature)
        if checkpoint is not None and checkpoint.sequence > head.sequence:
            head, frontier = check_checkpoint(checkpoint, None)
        for row in reader.rows(self._engine, chain, head.sequence):
            head = check_row(row, head)
            frontier = frontier.extended([leaf_hash(bytes.fromhex(head.hash))])
            self._latest_us = max(self._latest_us, row.time_us)
        if self._covered > head.sequence:
            raise AuditChainError(
                f"audit log {self.name}, chain {chain!r}: found {head.sequence} records, expected "
                f"{self._covered} or more, of which a checkpoint speaks",
                chain=chain,
                sequence=head.sequence + 1,
            )
        self.head, self._frontier = head, frontier


def _last(time_us: int, signature: str | None) -> LastCheckpoint:
    return LastCheckpoint(int(time_us), signature is not None)


def _inode(path: Path) -> tuple[int, int] | None:
    """What the path leads to; None where there is nothing."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
