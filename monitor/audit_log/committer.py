"""The thread that commits queued records in groups, and what it counts.

While the store cannot be written, whoever waits is told so and the group is tried again until it
is stored or the queue is closed and out of time: an alert is written late rather than never.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence

from monitor.audit_log.chain import canonical_bytes
from monitor.audit_log.queue import Entry, RecordQueue
from monitor.audit_log.record import RecordKind
from monitor.audit_log.store import AuditStore, DuplicateDecisionError
from monitor.errors import AuditError

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.25
"""Between attempts on a store that cannot be written."""


class Committer:
    """One thread between one queue and one store."""

    def __init__(
        self,
        queue: RecordQueue,
        store: AuditStore,
        *,
        commit_records: int,
        commit_delay_seconds: float,
        clock: Callable[[], float],
        on_sync: Callable[[float], None] | None,
    ) -> None:
        """Nothing runs before `start`."""
        self.healthy = True
        """Whether the last commit succeeded; True before the first."""
        self.written = 0
        self.failed = 0
        """Records in attempts that failed; tried again, so counted as written later."""
        self.refused = 0
        """Records given up: the store would not have them, or the log closed before it could."""
        self.last_sync_timestamp = 0.0
        self._queue = queue
        self._store = store
        self._commit_records = commit_records
        self._commit_delay_seconds = commit_delay_seconds
        self._clock = clock
        self._on_sync = on_sync
        self._thread = threading.Thread(target=self._run, name="audit-log", daemon=True)

    def start(self) -> None:
        """Start the thread; it ends when the queue is closed and empty."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread's end."""
        self._thread.join()

    def _run(self) -> None:
        while group := self._queue.take(self._commit_records, self._commit_delay_seconds):
            try:
                self._store_all(group)
            except Exception:
                log.exception("audit log: an unexpected error cost %d records", len(group))
                self.healthy = False
                self._refuse(group, AuditError("the audit log failed; see the server's log"))
            self._queue.done()

    def _store_all(self, group: list[Entry]) -> None:
        """Commit a group, however often it takes, but for those records that cannot be stored."""
        while group:
            try:
                batch = self._store.link([entry.record for entry in group])
            except AuditError:
                group = self._without_malformed(group)
                continue
            while True:
                started = time.perf_counter()
                try:
                    self._store.commit(batch)
                except DuplicateDecisionError as error:
                    group = self._without_duplicates(group, error)
                    break
                except AuditError as error:
                    self._tell_failure(group, error)
                    if self._queue.may_give_up():
                        log.error("audit log: closed with %d records not written", len(group))
                        self._refuse(group, error)
                        return
                    time.sleep(RETRY_SECONDS)
                else:
                    self._tell_success(group, batch.base.sequence, time.perf_counter() - started)
                    return

    def _without_malformed(self, group: list[Entry]) -> list[Entry]:
        good = []
        for entry in group:
            try:
                canonical_bytes(entry.record.body("", 0))
            except AuditError as error:
                log.error("audit log: decision %s: %s", entry.record.decision_id, error)
                self._refuse([entry], error)
            else:
                good.append(entry)
        return good

    def _without_duplicates(self, group: list[Entry], error: AuditError) -> list[Entry]:
        seen: set[str] = set()
        good = []
        for entry in group:
            decision_id = entry.record.decision_id
            if entry.record.kind is RecordKind.DECISION and decision_id is not None:
                if decision_id in seen or self._store.holds(decision_id):
                    log.error("audit log: decision %s: %s", decision_id, error)
                    self._refuse([entry], error)
                    continue
                seen.add(decision_id)
            good.append(entry)
        return good

    def _tell_success(self, group: Sequence[Entry], base: int, seconds: float) -> None:
        if not self.healthy:
            log.warning("audit log: written again, from sequence %d", base + 1)
        self.healthy = True
        self.written += len(group)
        self.last_sync_timestamp = self._clock()
        waiters = [(entry.waiter, base + place) for place, entry in enumerate(group, start=1)]

        def tell() -> None:
            for waiter, sequence in waiters:
                if waiter is not None and not waiter.done():
                    waiter.set_result(sequence)
            if self._on_sync is not None:
                self._on_sync(seconds)

        self._queue.on_loop(tell)

    def _tell_failure(self, group: Sequence[Entry], error: AuditError) -> None:
        """Tell all who wait, those still in the queue too, that the store cannot be written."""
        if self.healthy:
            log.error("audit log: %s", error)
        self.healthy = False
        self.failed += len(group)
        self._raise_in([*group, *self._queue.forget_waiters()], error)

    def _refuse(self, group: Sequence[Entry], error: AuditError) -> None:
        self.refused += len(group)
        self._raise_in(group, error)

    def _raise_in(self, entries: Sequence[Entry], error: AuditError) -> None:
        waiters: list[asyncio.Future[int]] = []
        for entry in entries:
            if entry.waiter is not None:
                waiters.append(entry.waiter)
                entry.waiter = None

        def tell() -> None:
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(AuditError(str(error)))

        if waiters:
            self._queue.on_loop(tell)
