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

from monitor.audit_log.queue import Entry, RecordQueue
from monitor.audit_log.store import AuditStore, Batch, DuplicateDecisionError
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
        checkpoint_seconds: float,
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
        self.checkpoint_failures = 0
        """Attempts at a checkpoint, alone or with records, that failed."""
        self.last_sync_timestamp = 0.0
        self._queue = queue
        self._store = store
        self._commit_records = commit_records
        self._commit_delay_seconds = commit_delay_seconds
        self._checkpoint_seconds = checkpoint_seconds
        self._checkpoint_due = time.monotonic() + checkpoint_seconds
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
        while (group := self._take()) is not None:
            try:
                self._store_all(group)
            except Exception:
                log.exception("audit log: an unexpected error cost %d records", len(group))
                self.healthy = False
                self._refuse(group, AuditError("the audit log failed; see the server's log"))
            if time.monotonic() >= self._checkpoint_due:
                self._checkpoint()
            self._queue.done()
        self._checkpoint()

    def _take(self) -> list[Entry] | None:
        """The next group; an empty one where only a checkpoint is due."""
        idle = max(0.0, self._checkpoint_due - time.monotonic()) if self._store.uncovered else None
        return self._queue.take(self._commit_records, self._commit_delay_seconds, idle)

    def _checkpoint(self) -> None:
        self._checkpoint_due = time.monotonic() + self._checkpoint_seconds
        if not self._store.uncovered or not self.healthy:
            return
        try:
            self._store.commit(self._store.link_checkpoint())
        except Exception as error:  # the thread goes on, and tries again
            self.checkpoint_failures += 1
            log.error("audit log: no checkpoint: %s", error)

    def _store_all(self, group: list[Entry]) -> None:
        """Commit a group, however often it takes, but for those records that cannot be stored."""
        while group:
            group, batch = self._linked(group)
            while group:
                started = time.perf_counter()
                try:
                    self._store.commit(batch)
                except DuplicateDecisionError as error:
                    for place in error.places:
                        decision = batch.rows[place].decision_id
                        log.error("audit log: decision %s: %s", decision, error)
                        self._refuse([group[place]], error)
                    group = [e for place, e in enumerate(group) if place not in error.places]
                    break
                except AuditError as error:
                    self.checkpoint_failures += batch.checkpoint is not None
                    self._tell_failure(group, error)
                    if self._queue.may_give_up():
                        log.error("audit log: closed with %d records not written", len(group))
                        self._refuse(group, error)
                        return
                    time.sleep(RETRY_SECONDS)
                else:
                    self._tell_success(group, batch.base.sequence, time.perf_counter() - started)
                    return

    def _linked(self, group: list[Entry]) -> tuple[list[Entry], Batch]:
        """The entries whose records could be made and have bytes, and those records as a batch."""
        linking = self._store.linking()
        good = []
        for entry in group:
            record = None
            try:
                record = entry.make()
                linking.add(record)
            except AuditError as error:
                decision = None if record is None else record.decision_id
                log.error("audit log: decision %s: %s", decision, error)
                self._refuse([entry], error)
            except Exception as error:
                log.exception("audit log: a record could not be made")
                self._refuse([entry], AuditError(f"an audit record cannot be made: {error}"))
            else:
                good.append(entry)
        return good, self._store.batch(linking)

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

        self._queue.done()  # who is told finds nothing pending of what is stored
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
