"""The bounded queue between the event loop, which puts, and the writing thread, which takes.

What happens when it is full is its policy; a record that somebody waits for is never given up for
want of room without its caller being told.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from monitor.audit_log.record import AuditRecord
from monitor.errors import AuditError


class OnFull(StrEnum):
    """What an append does when the queue is full."""

    BLOCK = "block"
    """Wait for room, then fail."""
    DROP = "drop"
    """Drop it; a durable one takes the place of the oldest that is not."""


@dataclass(slots=True, eq=False, kw_only=True)
class Entry:
    """A record on its way, and who waits for it."""

    make: Callable[[], AuditRecord]
    """Makes the record, on the writing thread; again where a group is put together anew."""
    durable: bool
    queued_at: float
    n_bytes: int
    """About what it keeps in memory until it is stored."""
    waiter: asyncio.Future[int] | None = None
    """Gets the sequence once the record is stored; None when nobody waits, or no longer."""


class RecordQueue:
    """Entries in order of arrival; made inside the event loop that puts."""

    def __init__(
        self, *, capacity: int, capacity_bytes: int, on_full: OnFull, full_timeout_seconds: float
    ) -> None:
        """Either capacity counts records taken and not yet done, too.

        A record that is larger than `capacity_bytes` is taken when there is no other.
        """
        self._capacity = capacity
        self._capacity_bytes = capacity_bytes
        self._on_full = on_full
        self._full_timeout_seconds = full_timeout_seconds
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Event()
        self._changed = threading.Condition()
        self._entries: deque[Entry] = deque()
        self._taken = 0
        self._queued_bytes = 0
        self._taken_bytes = 0
        self._waiters = 0
        self._dropped = 0
        self._give_up_at: float | None = None

    @property
    def pending(self) -> int:
        """Records put and not yet done."""
        return len(self._entries) + self._taken

    @property
    def pending_bytes(self) -> int:
        """About what these keep in memory."""
        return self._queued_bytes + self._taken_bytes

    @property
    def dropped(self) -> int:
        """Records that found no room."""
        return self._dropped

    async def put(
        self, make: Callable[[], AuditRecord], *, durable: bool, n_bytes: int
    ) -> asyncio.Future[int] | None:
        """Queue a record of about this size; for a durable one, the future of its sequence number.

        AuditError when the queue is closed, or stays full for longer than its timeout.
        """
        if not await self._room_for(n_bytes, durable):
            return None
        entry = Entry(make=make, durable=durable, queued_at=time.monotonic(), n_bytes=n_bytes)
        with self._changed:
            if self._give_up_at is not None:
                self._dropped += 1
                raise AuditError("the audit log is closed")
            if durable:
                entry.waiter = self._loop.create_future()
                self._waiters += 1
            self._entries.append(entry)
            self._queued_bytes += n_bytes
            if self._waiters or len(self._entries) == 1 or len(self._entries) % 64 == 0:
                self._changed.notify()
        return entry.waiter

    def _fits(self, n_bytes: int) -> bool:
        pending = self.pending
        fits = self.pending_bytes + n_bytes <= self._capacity_bytes
        return pending < self._capacity and (fits or pending == 0)

    async def _room_for(self, n_bytes: int, durable: bool) -> bool:
        """True once there is room; False when the record has been dropped."""
        give_up_at = time.monotonic() + self._full_timeout_seconds
        while not self._fits(n_bytes):
            if self._on_full is OnFull.DROP:
                if not durable:
                    self._dropped += 1
                    return False
                if self._displace():
                    continue
            self._room.clear()
            try:
                async with asyncio.timeout(give_up_at - time.monotonic()):
                    await self._room.wait()
            except TimeoutError:
                self._dropped += 1
                raise AuditError(
                    f"the audit queue holds {self.pending} records and found no room for another "
                    f"in {self._full_timeout_seconds:g} s: {self.pending_bytes} and {n_bytes} "
                    f"bytes, expected at most {self._capacity} records and {self._capacity_bytes} "
                    "bytes"
                ) from None
        return True

    def _displace(self) -> bool:
        """Drop the oldest record that is not durable, if there is one."""
        with self._changed:
            for entry in self._entries:
                if not entry.durable:
                    self._entries.remove(entry)
                    self._queued_bytes -= entry.n_bytes
                    self._dropped += 1
                    return True
        return False

    def close(self, timeout_seconds: float) -> None:
        """Take no more; what is queued may still be taken, and given up after the timeout."""
        with self._changed:
            self._give_up_at = time.monotonic() + timeout_seconds
            self._changed.notify()

    # What follows is for the writing thread.

    def take(
        self, max_records: int, delay_seconds: float, idle_seconds: float | None = None
    ) -> list[Entry] | None:
        """The next group; None once the queue is closed and empty.

        Returns at once when somebody waits, otherwise when the group is full or its oldest record
        has been queued for `delay_seconds`; with an empty group after `idle_seconds` of nothing.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._entries or self._give_up_at is not None, timeout=idle_seconds
            )
            if self._entries:
                due = self._entries[0].queued_at + delay_seconds
                self._changed.wait_for(
                    lambda: (
                        self._waiters
                        or len(self._entries) >= max_records
                        or self._give_up_at is not None
                    ),
                    timeout=max(0.0, due - time.monotonic()),
                )
            elif self._give_up_at is not None:
                return None
            self._taken = min(len(self._entries), max_records)
            group = [self._entries.popleft() for _ in range(self._taken)]
            self._waiters -= sum(entry.waiter is not None for entry in group)
            self._taken_bytes = sum(entry.n_bytes for entry in group)
            self._queued_bytes -= self._taken_bytes
            return group

    def done(self) -> None:
        """The group taken last is finished with, in whichever way."""
        with self._changed:
            self._taken = self._taken_bytes = 0
        self.on_loop(self._room.set)

    def forget_waiters(self) -> list[Entry]:
        """The queued entries that somebody waits for, to be told now; they stay queued."""
        with self._changed:
            waiting = [entry for entry in self._entries if entry.waiter is not None]
            self._waiters = 0
            return waiting

    def may_give_up(self) -> bool:
        """Whether the queue is closed and its time is up."""
        return self._give_up_at is not None and time.monotonic() >= self._give_up_at

    def on_loop(self, call: Callable[[], None]) -> None:
        """Run a call on the event loop, or nowhere when that is closed: nobody waits any more."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call)
