"""Why a chain has one writer: a lock on a file, or one that PostgreSQL holds.

Either goes when its holder goes, however that ends: the operating system's with the process, the
database's with the connection.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

from sqlalchemy.engine.interfaces import DBAPIConnection

from monitor.errors import AuditError


class FileLock:
    """An exclusive lock on PATH.lock for as long as this process lives or until release."""

    def __init__(self, path: Path) -> None:
        """Take it, or raise AuditError naming the process that has it."""
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
                "each server needs a log of its own, or PostgreSQL with a chain of its own"
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let go; the file stays, since to remove it would race with the next to lock it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def hold_chain(connection: DBAPIConnection, chain: str, name: str) -> None:
    """Lock a chain of a PostgreSQL log for as long as this connection lives, or AuditError."""
    digest = hashlib.sha256(b"sae-monitor audit chain\n" + chain.encode()).digest()
    key = int.from_bytes(digest[:8], "big", signed=True)
    cursor = connection.cursor()
    cursor.execute("SELECT pg_try_advisory_lock(%s)", (key,))
    row = cursor.fetchone()
    cursor.close()
    connection.commit()
    if row is None or not row[0]:
        raise AuditError(
            f"audit log {name}: chain {chain!r} is being written by another process; "
            "each server needs a chain of its own (audit_chain)"
        )
