"""AuditLog: decisions in, a verifiable log on disk; what the pipeline and the server hold.

A durable append returns its record's sequence number once the record is on disk; any other returns
None as soon as it is queued, since a number is given only to what is stored.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from monitor.audit_log.chain import Json
from monitor.audit_log.committer import Committer
from monitor.audit_log.queue import OnFull, RecordQueue
from monitor.audit_log.record import (
    AuditLevel,
    AuditRecord,
    RecordKind,
    check_caller_key,
    decision_record,
    parse_level,
    stream_alert_record,
)
from monitor.audit_log.store import AuditStore
from monitor.errors import AuditError, SettingsError
from monitor.records import Decision, Mode, Provenance, StreamUpdate, Verdict


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
    sequence: int = 0
    """Of the last record on disk."""
    last_sync_timestamp: float = 0.0
    """Unix time of the last commit; 0 before the first."""


class AuditLog:
    """One audit log open for writing, or, at level none, nothing at all."""

    def __init__(
        self,
        store: AuditStore | None,
        *,
        level: AuditLevel,
        on_full: OnFull,
        caller_key: bytes | None,
        queue_records: int,
        full_timeout_seconds: float,
        commit_records: int,
        commit_delay_seconds: float,
        clock: Callable[[], float],
        on_sync: Callable[[float], None] | None,
    ) -> None:
        """Take what `open` has checked."""
        self.level = level
        self._store = store
        self._on_full = on_full
        self._caller_key = caller_key
        self._queue_records = queue_records
        self._full_timeout_seconds = full_timeout_seconds
        self._commit_records = commit_records
        self._commit_delay_seconds = commit_delay_seconds
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
        caller_key: bytes | None = None,
        chain: str = "main",
        queue_records: int = 8192,
        full_timeout_seconds: float = 5.0,
        commit_records: int = 64,
        commit_delay_seconds: float = 0.05,
        clock: Callable[[], float] = time.time,
        on_sync: Callable[[float], None] | None = None,
    ) -> AuditLog:
        """Lock the log, verify its tail, and continue its chain; level none opens nothing.

        Args:
            on_full: block, an append waits for room and fails after `full_timeout_seconds`; or
                drop, records that nobody waits for are dropped, and give way to those that
                somebody does.
            caller_key: callers are stored as HMAC-SHA256 under it, and not at all without one.
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
        if min(queue_records, commit_records) < 1:
            raise SettingsError(
                f"audit queue_records and commit_records: found {queue_records} and "
                f"{commit_records}, expected at least 1"
            )
        check_caller_key(caller_key)
        return cls(
            None if parsed_level is AuditLevel.NONE else AuditStore(url, chain),
            level=parsed_level,
            on_full=OnFull(on_full),
            caller_key=caller_key,
            queue_records=queue_records,
            full_timeout_seconds=full_timeout_seconds,
            commit_records=commit_records,
            commit_delay_seconds=commit_delay_seconds,
            clock=clock,
            on_sync=on_sync,
        )

    def start(self) -> None:
        """Start writing; call inside the event loop that will append."""
        if self._store is None:
            return
        self._queue = RecordQueue(
            capacity=self._queue_records,
            on_full=self._on_full,
            full_timeout_seconds=self._full_timeout_seconds,
        )
        self._committer = Committer(
            self._queue,
            self._store,
            commit_records=self._commit_records,
            commit_delay_seconds=self._commit_delay_seconds,
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
        sequence = 0 if self._store is None else self._store.head.sequence
        if self._queue is None or self._committer is None:
            return AuditStatistics(sequence=sequence)
        return AuditStatistics(
            written=self._committer.written,
            failed=self._committer.failed,
            dropped=self._queue.dropped + self._committer.refused,
            pending=self._queue.pending,
            sequence=sequence,
            last_sync_timestamp=self._committer.last_sync_timestamp,
        )

    async def append_decision(
        self, decision: Decision, *, input_digest: str | None, caller: str | None = None
    ) -> int | None:
        """Store a decision; one that alerts is on disk when this returns."""
        if self._store is None:
            return None
        record = decision_record(
            decision,
            level=self.level,
            time_us=self._time_us(),
            input_digest=input_digest,
            caller=caller,
            caller_key=self._caller_key,
        )
        alerts = bool(decision.alerts) or decision.verdict is Verdict.ALERT
        return await self.append(record, durable=alerts)

    async def append_stream_alert(
        self, update: StreamUpdate, *, policy: str, mode: Mode, provenance: Provenance
    ) -> int | None:
        """Store an alert inside a stream; it is on disk when this returns, so before it is sent."""
        if self._store is None:
            return None
        record = stream_alert_record(
            update,
            level=self.level,
            time_us=self._time_us(),
            policy=policy,
            mode=mode,
            provenance=provenance,
        )
        return await self.append(record, durable=True)

    async def append_event(self, kind: RecordKind, content: Mapping[str, Json]) -> int | None:
        """Store what happened to the server itself; it is on disk when this returns."""
        if self._store is None:
            return None
        record = AuditRecord(kind=kind, time_us=self._time_us(), content=content)
        return await self.append(record, durable=True)

    async def append(self, record: AuditRecord, *, durable: bool) -> int | None:
        """Queue a record; with `durable`, wait until it is on disk and return its sequence.

        AuditError: the store cannot be written (the record stays queued and is tried again), the
        store refuses it, or there was no room in time (it is dropped, and counted).
        """
        if self._store is None:
            return None
        if self._queue is None:
            raise AuditError("the audit log has not been started")
        waiter = await self._queue.put(record, durable=durable)
        return None if waiter is None else await waiter

    def _time_us(self) -> int:
        return round(self._clock() * 1e6)
