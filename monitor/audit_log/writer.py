"""AuditLog: decisions in, a verifiable log on disk; what the pipeline and the server hold.

A durable append returns its record's sequence number once the record is on disk; any other returns
None as soon as it is queued, since a number is given only to what is stored.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from monitor.audit_log.chain import Json
from monitor.audit_log.checkpoint import Signer
from monitor.audit_log.committer import Committer
from monitor.audit_log.queue import OnFull, RecordQueue
from monitor.audit_log.record import (
    Asked,
    AuditRecord,
    Observed,
    RecordKind,
    check_hash_key,
    decision_record,
    held_bytes,
    parse_level,
    stream_alert_record,
)
from monitor.audit_log.sealing import KeyRing
from monitor.audit_log.store import AuditStore
from monitor.errors import AuditError, SettingsError
from monitor.records import AuditLevel, Decision, Mode, Provenance, StreamUpdate, Verdict

EVENT_BYTES = 8192
"""About what an event of the server's own takes in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditStatistics:
    """Where the log stands, for the metrics; counts are since it was started."""

    written: int = 0
    failed: int = 0
    """Records in commits that failed; they are tried again, so also counted when written."""
    dropped: int = 0
    """Records that will never be stored: no room, refused by the store, or left at close."""
    pending: int = 0
    """Records accepted and not yet on disk."""
    pending_bytes: int = 0
    """About what they keep in memory."""
    sequence: int = 0
    """Of the last record on disk."""
    last_sync_timestamp: float = 0.0
    """Unix time of the last commit; 0 before the first."""
    uncovered: int = 0
    """Records on disk of which no checkpoint speaks yet."""
    checkpoint_failures: int = 0
    """Attempts at a checkpoint that failed; each is made again."""
    last_checkpoint_timestamp: float = 0.0
    """Unix time of the chain's last checkpoint; 0 where it has none."""
    last_checkpoint_signed: bool = False


class AuditLog:
    """One audit log open for writing, or, at level none, nothing at all."""

    def __init__(
        self,
        store: AuditStore | None,
        *,
        level: AuditLevel,
        on_full: OnFull,
        hash_key: bytes | None,
        keys: KeyRing | None,
        queue_records: int,
        queue_bytes: int,
        full_timeout_seconds: float,
        commit_records: int,
        commit_delay_seconds: float,
        checkpoint_seconds: float,
        clock: Callable[[], float],
        on_sync: Callable[[float], None] | None,
    ) -> None:
        """Take what `open` has checked."""
        self.level = level
        self._store = store
        self._on_full = on_full
        self._hash_key = hash_key
        self._keys = keys
        self._queue_records = queue_records
        self._queue_bytes = queue_bytes
        self._full_timeout_seconds = full_timeout_seconds
        self._commit_records = commit_records
        self._commit_delay_seconds = commit_delay_seconds
        self._checkpoint_seconds = checkpoint_seconds
        self._clock = clock
        self._on_sync = on_sync
        self._queue: RecordQueue | None = None
        self._committer: Committer | None = None

    @classmethod
    def open(
        cls,
        url: str,
        *,
        level: str = "scores",
        on_full: str = "block",
        hash_key: bytes | None = None,
        keys: KeyRing | None = None,
        chain: str = "main",
        signer: Signer | None = None,
        checkpoint_records: int = 1000,
        checkpoint_seconds: float = 60.0,
        queue_records: int = 8192,
        queue_bytes: int = 256 << 20,
        full_timeout_seconds: float = 5.0,
        commit_records: int = 256,
        commit_delay_seconds: float = 0.05,
        clock: Callable[[], float] = time.time,
        on_sync: Callable[[float], None] | None = None,
    ) -> AuditLog:
        """Lock the log, verify its tail, and continue its chain; level none opens nothing.

        Args:
            on_full: block, an append waits for room and fails after `full_timeout_seconds`; or
                drop, records that nobody waits for are dropped, and give way to those that
                somebody does.
            level: the most that is stored, and what is stored where a policy names no level.
            hash_key: callers are stored as HMAC-SHA256 under it, and not at all without one;
                digests of inputs are hashed with it too.
            keys: what the levels above scores are sealed under; in the clear without.
            chain: its name; of the servers that write to one PostgreSQL each has its own.
            signer: signs the checkpoints; they are unsigned without.
            checkpoint_records: records after which there is a checkpoint, at the latest.
            checkpoint_seconds: the same in seconds; there is one on closing, too.
            queue_records: the most that wait to be written.
            queue_bytes: about the most memory that they may take together; one record alone may
                take more.
            commit_delay_seconds: the longest that records nobody waits for are gathered.
            on_sync: called on the event loop with the seconds that each commit took.

        Raises:
            SettingsError: an impossible level, policy, size, key or URL.
            AuditError: the log cannot be opened, another process writes it, or its tail does not
                verify (AuditChainError).
        """
        parsed_level = parse_level(level)
        if on_full not in set(OnFull):
            raise SettingsError(f"audit on_full: found {on_full!r}, expected block or drop")
        for name, size in (
            ("queue_records", queue_records),
            ("queue_bytes", queue_bytes),
            ("commit_records", commit_records),
            ("checkpoint_records", checkpoint_records),
        ):
            if size < 1:
                raise SettingsError(f"audit {name}: found {size}, expected at least 1")
        check_hash_key(hash_key)
        return cls(
            None
            if parsed_level is AuditLevel.NONE
            else AuditStore(
                url, chain, signer=signer, checkpoint_records=checkpoint_records, clock=clock
            ),
            level=parsed_level,
            on_full=OnFull(on_full),
            hash_key=hash_key,
            keys=keys,
            queue_records=queue_records,
            queue_bytes=queue_bytes,
            full_timeout_seconds=full_timeout_seconds,
            commit_records=commit_records,
            commit_delay_seconds=commit_delay_seconds,
            checkpoint_seconds=checkpoint_seconds,
            clock=clock,
            on_sync=on_sync,
        )

    def start(self) -> None:
        """Start writing; call inside the event loop that will append."""
        if self._store is None:
            return
        self._queue = RecordQueue(
            capacity=self._queue_records,
            capacity_bytes=self._queue_bytes,
            on_full=self._on_full,
            full_timeout_seconds=self._full_timeout_seconds,
        )
        self._committer = Committer(
            self._queue,
            self._store,
            commit_records=self._commit_records,
            commit_delay_seconds=self._commit_delay_seconds,
            checkpoint_seconds=self._checkpoint_seconds,
            clock=self._clock,
            on_sync=self._on_sync,
        )
        self._committer.start()

    async def close(self, timeout_seconds: float = 5.0) -> None:
        """Write what is queued and let go of the log; what cannot be written in time is dropped."""
        if self._queue is not None and self._committer is not None:
            self._queue.close(timeout_seconds)
            await asyncio.to_thread(self._committer.join)
        if self._store is not None:
            self._store.close()

    @property
    def healthy(self) -> bool:
        """Whether the last commit succeeded; True before the first and at level none."""
        return self._committer is None or self._committer.healthy

    def statistics(self) -> AuditStatistics:
        """The counts as they are now."""
        if self._store is None:
            return AuditStatistics()
        stored = AuditStatistics(
            sequence=self._store.head.sequence,
            uncovered=self._store.uncovered,
            last_checkpoint_timestamp=self._store.last_checkpoint.time_us / 1e6,
            last_checkpoint_signed=self._store.last_checkpoint.signed,
        )
        if self._queue is None or self._committer is None:
            return stored
        return replace(
            stored,
            written=self._committer.written,
            failed=self._committer.failed,
            dropped=self._queue.dropped + self._committer.refused,
            pending=self._queue.pending,
            pending_bytes=self._queue.pending_bytes,
            last_sync_timestamp=self._committer.last_sync_timestamp,
            checkpoint_failures=self._committer.checkpoint_failures,
        )

    def level_for(self, asked: AuditLevel | None) -> AuditLevel:
        """How much is stored under a policy that asks for this level: never more than `level`."""
        return self.level if asked is None else min(asked, self.level, key=lambda one: one.rank)

    async def append_decision(
        self,
        decision: Decision,
        *,
        input_digest: str | None,
        caller: str | None = None,
        observed: Observed | None = None,
        asked: Asked | None = None,
        level: AuditLevel | None = None,
    ) -> int | None:
        """Store a decision; one that alerts is on disk when this returns.

        `level` is what the policy asks for; see `level_for`.
        """
        stored_level = self.level_for(level)
        if self._store is None or stored_level is AuditLevel.NONE:
            return None
        time_us = self._time_us()
        if decision.tokens:  # no record holds them, and they would wait with it
            decision = replace(decision, tokens=())

        def make() -> AuditRecord:
            return decision_record(
                decision,
                level=stored_level,
                time_us=time_us,
                input_digest=input_digest,
                caller=caller,
                hash_key=self._hash_key,
                observed=observed,
                asked=asked,
                keys=self._keys,
            )

        alerts = bool(decision.alerts) or decision.verdict is Verdict.ALERT
        return await self.append(make, durable=alerts, n_bytes=held_bytes(decision, observed))

    async def append_stream_alert(
        self,
        update: StreamUpdate,
        *,
        policy: str,
        mode: Mode,
        provenance: Provenance,
        level: AuditLevel | None = None,
    ) -> int | None:
        """Store an alert inside a stream; it is on disk when this returns, so before it is sent."""
        stored_level = self.level_for(level)
        if self._store is None or stored_level is AuditLevel.NONE:
            return None
        record = stream_alert_record(
            update,
            level=stored_level,
            time_us=self._time_us(),
            policy=policy,
            mode=mode,
            provenance=provenance,
        )
        return await self.append(record, durable=True, n_bytes=held_bytes(update))

    async def append_event(self, kind: RecordKind, content: Mapping[str, Json]) -> int | None:
        """Store what happened to the server itself; it is on disk when this returns."""
        if self._store is None:
            return None
        record = AuditRecord(kind=kind, time_us=self._time_us(), content=content)
        return await self.append(record, durable=True, n_bytes=EVENT_BYTES)

    async def append(
        self, record: AuditRecord | Callable[[], AuditRecord], *, durable: bool, n_bytes: int
    ) -> int | None:
        """Queue a record; with `durable`, wait until it is on disk and return its sequence.

        A record given as a call is made on the writing thread, which keeps the event loop free.
        `n_bytes` is about what it keeps in memory meanwhile.

        AuditError: the store cannot be written (the record stays queued and is tried again), the
        store refuses it, or there was no room in time (it is dropped, and counted).
        """
        if self._store is None:
            return None
        if self._queue is None:
            raise AuditError("the audit log has not been started")
        make = (lambda: record) if isinstance(record, AuditRecord) else record
        waiter = await self._queue.put(make, durable=durable, n_bytes=n_bytes)
        return None if waiter is None else await waiter

    def _time_us(self) -> int:
        return round(self._clock() * 1e6)
