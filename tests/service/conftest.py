"""The real server on loopback, in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from monitor.client import MonitorClient, RetryPolicy
from monitor.config import ServeSettings
from monitor.server import MonitorServer, Ready

Result = TypeVar("Result")

NO_RETRY = RetryPolicy(max_attempts=1)


class RunningServer:
    """A started server; `call` runs something in its event loop."""

    def __init__(
        self, server: MonitorServer, loop: asyncio.AbstractEventLoop, ready: Ready
    ) -> None:
        self.server = server
        self.ready = ready
        self.address = ready.listen.split(",")[0]
        self._loop = loop

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=60)

    def run(self, work: Callable[[], Result]) -> Result:
        async def call() -> Result:
            return work()

        return self.call(call())

    def start(self, work: Coroutine[Any, Any, Result]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def value(self, name: str, **labels: str) -> float:
        found = self.server.metrics.registry.get_sample_value(name, labels)
        assert found is not None, (name, labels)
        return found

    def client(self, **options: Any) -> MonitorClient:
        return MonitorClient(self.address, **{"retry": NO_RETRY, "timeout_seconds": 60, **options})


def settings_for(folder: Path, **changes: Any) -> ServeSettings:
    return ServeSettings(
        **{
            "listen": ("127.0.0.1:0",),
            "ops_listen": "127.0.0.1:0",
            "audit": f"sqlite:///{folder / 'audit.db'}",
            "device": "cpu",
            "dtype": "float32",
            "cache_dir": folder / "cache",
            "grace_seconds": 10.0,
            **changes,
        }
    )


@contextmanager
def running(settings: ServeSettings, bundle: Path) -> Iterator[RunningServer]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server")
    thread.start()
    try:

        async def start() -> tuple[MonitorServer, Ready]:
            server = MonitorServer(settings, bundle)
            return server, await server.start()

        server, ready = asyncio.run_coroutine_threadsafe(start(), loop).result(timeout=120)
        try:
            yield RunningServer(server, loop, ready)
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(0.5), loop).result(timeout=60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


class ServeProcess:
    """`sae-monitor serve` as an operator runs it."""

    def __init__(self, bundle: Path, folder: Path, *flags: str, **environment: str) -> None:
        self.audit = f"sqlite:///{folder / 'audit.db'}"
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "monitor", "serve", "--bundle", str(bundle)),
                *("--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"),
                *("--audit", self.audit, *flags),
            ],
            env={**os.environ, **environment},  # noqa: TID251 - the child's, plus what is tested
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ready(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(self.process.communicate()[1])
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str, str]:
        self.process.send_signal(number)
        return self.end()

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


@contextmanager
def serving(*args: Any, **environment: str) -> Iterator[ServeProcess]:
    server = ServeProcess(*args, **environment)
    try:
        yield server
    finally:
        with server.process:  # closes its pipes, and waits for it
            server.process.kill()


@pytest.fixture
def serve_process() -> Callable[..., Any]:
    """`with serve_process(bundle, folder, flags..., VARIABLE=value) as process:`."""
    return serving


@pytest.fixture(scope="session")
def shared_server(
    tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """One server for every test that leaves it as it was."""
    folder = tmp_path_factory.mktemp("server")
    settings = settings_for(folder, listen=("127.0.0.1:0", f"unix:{folder}/m.sock"))
    with running(settings, tiny_bundle) as server:
        yield server


@pytest.fixture
def client(shared_server: RunningServer) -> Iterator[MonitorClient]:
    with shared_server.client() as client:
        yield client


@pytest.fixture
def serve(tiny_bundle: Path, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`with serve(max_streams=1) as server:` a server of the test's own."""

    def start(bundle: Path = tiny_bundle, **changes: Any) -> Any:
        return running(settings_for(tmp_path, **changes), bundle)

    yield start
