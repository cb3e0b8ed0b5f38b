"""A PostgreSQL server of the tests' own, in a folder that goes with it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

DEBIAN = Path("/usr/lib/postgresql")


def binaries() -> Path | None:
    """The folder with initdb and postgres, the newest that Debian has, or the one on PATH."""
    found = [folder / "bin" for folder in DEBIAN.glob("*") if (folder / "bin/initdb").exists()]
    if found:
        return max(found, key=lambda folder: int(folder.parent.name))
    initdb = shutil.which("initdb")
    return None if initdb is None else Path(initdb).resolve().parent


class PostgresServer:
    """Started by its constructor; `kill` and `start` are the database going and coming back."""

    def __init__(self, binaries: Path) -> None:
        self._binaries = binaries
        self._folder = Path(tempfile.mkdtemp(prefix="saemonitor-postgres-"))
        # It refuses to run as root, so root gives the folder to Debian's user for it.
        self._as_user: Sequence[str] = ()
        if os.geteuid() == 0:
            shutil.chown(self._folder, "postgres", "postgres")
            self._as_user = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        # No sync when the folder is made; the server itself syncs as it always does.
        initdb = ["--auth=trust", "--username=test", "--encoding=UTF8", "--no-sync"]
        self._run("initdb", *initdb, "-D", str(self._data))
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def url(self, database: str) -> str:
        """The URL of a database, made when it is not there."""
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self._port), "-U", "test", database)
        return f"postgresql://test@127.0.0.1:{self._port}/{database}"

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        self._process = subprocess.Popen(
            [
                *self._as_user,
                str(self._binaries / "postgres"),
                *("-D", str(self._data), "-p", str(self._port), "-k", str(self._folder)),
                *("-c", "listen_addresses=127.0.0.1"),
            ],
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        ready = [str(self._binaries / "pg_isready"), "-h", "127.0.0.1", "-p", str(self._port)]
        while subprocess.run(ready, capture_output=True).returncode != 0:
            if self._process.poll() is not None:
                raise RuntimeError(f"postgres ended with {self._process.returncode}")

    def kill(self) -> None:
        """Ends it as a crash would: no shutdown checkpoint, open connections cut."""
        assert self._process is not None
        self._run("pg_ctl", "stop", "-m", "immediate", "-D", str(self._data))
        self._process.wait()

    def remove(self) -> None:
        """Ends it and takes its folder away."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        shutil.rmtree(self._folder)

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._as_user, str(self._binaries / program), *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=self._folder)
