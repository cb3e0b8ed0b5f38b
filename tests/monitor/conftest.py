"""Records filled at random from their type hints; a pipeline and a hub that answer as told."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import random
import struct
import threading
import types
import typing
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import grpc
import pytest
from grpc_health.v1 import health, health_pb2_grpc

from monitor.errors import NotFoundError, StreamPositionError
from monitor.metrics import Metrics
from monitor.records import (
    ActivationsChunk,
    ActivationsOpen,
    ClusterInfo,
    Decision,
    ScoreRequest,
    ServerInfo,
    StreamOpen,
    StreamUpdate,
)
from monitor.rpc import servicers
from monitor.rpc.interceptors import Edge
from monitor.rpc.serving import Serving

Record = TypeVar("Record")


def _value(hint: Any, rng: random.Random) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        present = next(arg for arg in args if arg is not types.NoneType)
        return None if rng.random() < 0.3 else _value(present, rng)
    if origin is tuple:
        return tuple(_value(args[0], rng) for _ in range(rng.randrange(4)))
    if origin is dict:
        return {_value(args[0], rng): _value(args[1], rng) for _ in range(rng.randrange(4))}
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _record(hint, rng)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return rng.choice(list(hint))
    if hint is bool:
        return rng.random() < 0.5
    if hint is int:
        return rng.randrange(2**31)
    if hint is float:
        (as_float32,) = struct.unpack("f", struct.pack("f", rng.uniform(-9, 9)))
        return as_float32
    assert hint is str, f"no rule for {hint}"
    return "".join(rng.choice("aä漢🙂 \n\\") for _ in range(rng.randrange(1, 9)))


def _record(cls: type[Record], rng: random.Random) -> Record:
    hints = typing.get_type_hints(cls)
    made = cls(**{name: _value(hint, rng) for name, hint in hints.items()})
    if isinstance(made, Decision | StreamUpdate):
        width = len(made.clusters)
        knows_ids = rng.random() < 0.7
        rows = tuple(
            dataclasses.replace(
                token,
                token_id=rng.randrange(2**31) if knows_ids else None,
                fused=_row(width, rng),
                dense=_row(width, rng),
                sae=_row(width, rng),
            )
            for token in made.tokens
        )
        return dataclasses.replace(made, tokens=rows)
    return made


def _row(width: int, rng: random.Random) -> tuple[float, ...]:
    return tuple(_value(float, rng) for _ in range(width))


@pytest.fixture
def make_record() -> Callable[[type[Record], int], Record]:
    """`make_record(cls, seed)`: an instance with every field filled, the same for the same seed."""
    return lambda cls, seed: _record(cls, random.Random(seed))


class FakeSession:
    """A stream session that scores every token at once and keeps what it was told."""

    def __init__(self, opened: StreamOpen, decision: Decision, update: StreamUpdate) -> None:
        self.opened = opened
        self.session_id = opened.session_id or "chosen-by-server"
        self.taken_over = asyncio.Event()
        self.n_received = self.next_index = 0
        self.fed: list[tuple[int, tuple[int, ...] | None, str | None]] = []
        self.cancelled = False
        self.ended: BaseException | None = None
        self._decision = decision
        self._update = update
        self._updates: asyncio.Queue[StreamUpdate | None] = asyncio.Queue()
        self._n_sent = 0
        self._finished = False

    async def __aenter__(self) -> FakeSession:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.ended = error
        self.cancelled = not self._finished

    async def feed(
        self, start_index: int, *, token_ids: Sequence[int] | None = None, text: str | None = None
    ) -> None:
        if start_index != self._n_sent:
            raise StreamPositionError(f"start_index: found {start_index}, expected {self._n_sent}")
        self.fed.append((start_index, None if token_ids is None else tuple(token_ids), text))
        start = self._n_sent
        self._n_sent += len(text if text is not None else token_ids or ())
        update = dataclasses.replace(
            self._update, start_index=start, processed_index=self._n_sent, gap=None
        )
        self._updates.put_nowait(update)

    async def flush(self) -> None:
        self._updates.put_nowait(dataclasses.replace(self._update, gap=None))

    async def updates(self) -> AsyncIterator[StreamUpdate]:
        while (update := await self._updates.get()) is not None:
            yield update

    async def finish(self) -> Decision:
        # A cancelled call's input reads as ended just before its cancellation comes. The real
        # session waits for its engine here, and so meets it.
        await asyncio.sleep(0.05)
        self._finished = True
        self._updates.put_nowait(None)
        return dataclasses.replace(self._decision, session_id=self.session_id)


class FakePipeline:
    """A pipeline that answers what it is told to."""

    def __init__(self, decision: Decision, update: StreamUpdate, info: ServerInfo) -> None:
        self.decision = decision
        self.update = update
        self.requests: list[tuple[ScoreRequest, float | None]] = []
        self.activations: list[tuple[ActivationsOpen, list[ActivationsChunk], float | None]] = []
        self.sessions: list[FakeSession] = []
        self.errors: list[Exception] = []
        """Raised one by one by what is called next; then all goes well."""
        self.hang = False
        self._info = info

    def _raise_next(self) -> None:
        if self.errors:
            raise self.errors.pop(0)

    async def score(
        self, request: ScoreRequest, *, deadline_seconds: float | None = None, peer: str = ""
    ) -> Decision:
        self.requests.append((request, deadline_seconds))
        self._raise_next()
        if self.hang:
            await asyncio.Event().wait()
        return self.decision

    async def score_activations(
        self,
        opened: ActivationsOpen,
        chunks: AsyncIterator[ActivationsChunk],
        *,
        deadline_seconds: float | None = None,
        peer: str = "",
    ) -> Decision:
        self.activations.append((opened, [], deadline_seconds))
        self._raise_next()
        async for chunk in chunks:
            self.activations[-1][1].append(chunk)
        return self.decision

    def open_stream(self, opened: StreamOpen, *, peer: str = "") -> FakeSession:
        self._raise_next()
        self.sessions.append(FakeSession(opened, self.decision, self.update))
        return self.sessions[-1]

    def info(self) -> ServerInfo:
        self._raise_next()
        return self._info

    def clusters(self) -> tuple[ClusterInfo, ...]:
        self._raise_next()
        return (_record(ClusterInfo, random.Random(1)), _record(ClusterInfo, random.Random(2)))

    def cluster(self, cluster_id: str) -> ClusterInfo:
        for info in self.clusters():
            if info.cluster == cluster_id:
                return info
        raise NotFoundError(f"cluster: found {cluster_id!r}, expected a registered one")


@pytest.fixture
def fake_pipeline() -> FakePipeline:
    return FakePipeline(
        decision=_record(Decision, random.Random(5)),
        update=_record(StreamUpdate, random.Random(6)),
        info=_record(ServerInfo, random.Random(7)),
    )


@dataclasses.dataclass
class FakeServer:
    """The real RPC layer on a loopback port, over a fake pipeline."""

    address: str
    pipeline: FakePipeline
    serving: Serving
    metrics: Metrics


@pytest.fixture
async def fake_server(fake_pipeline: FakePipeline) -> AsyncIterator[FakeServer]:
    metrics = Metrics("tiny")
    serving = Serving(metrics)
    serving.open(typing.cast(Any, fake_pipeline))
    server = grpc.aio.server(interceptors=[Edge(metrics)])
    servicers.register(server, serving, metrics)
    health_servicer: Any = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield FakeServer(f"127.0.0.1:{port}", fake_pipeline, serving, metrics)
    await server.stop(0)


class FakeHub:
    """As much of the hub's HTTP interface as its client needs to download, on loopback."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        """Repository -> commit -> path -> content."""
        self.branches: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.requests: list[str] = []
        """Method and path of everything that was asked."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            def do_HEAD(self) -> None:
                hub._answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )
        self._thread.start()

    def add(self, repo: str, commit: str, files: Mapping[str, bytes], branch: str = "main") -> None:
        self.repos.setdefault(repo, {})[commit] = dict(files)
        self.branches.setdefault(repo, {})[branch] = commit

    def downloaded(self) -> list[str]:
        return sorted(
            line.removeprefix("GET ")
            for line in self.requests
            if "/resolve/" in line and "GET" in line
        )

    def stop(self) -> None:
        """The second and later calls do nothing."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        self.requests.append(f"{handler.command} {path}")
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        names = parts[2:] if api else parts
        repo, rest = "/".join(names[:2]), names[2:]
        if repo not in self.repos:
            return self._send(handler, 404, {"X-Error-Code": "RepoNotFound"})
        if repo in self.gated:
            return self._send(handler, 403, {"X-Error-Code": "GatedRepo"})
        if rest[0] == "refs":
            branches = [
                {"name": n, "ref": n, "targetCommit": c} for n, c in self.branches[repo].items()
            ]
            return self._send(handler, 200, {}, {"branches": branches, "converts": [], "tags": []})
        commit = self.branches[repo].get(rest[1], rest[1])
        if commit not in self.repos[repo]:
            return self._send(handler, 404, {"X-Error-Code": "RevisionNotFound"})
        files = self.repos[repo][commit]
        below = "/".join(rest[2:])
        if rest[0] == "revision":
            return self._send(handler, 200, {}, {"id": repo, "sha": commit, "siblings": []})
        if rest[0] == "tree":
            deep = "recursive=true" in handler.path.lower()
            entries = _tree(files, below, deep)
            missing = below and not entries
            error = {"X-Error-Code": "EntryNotFound"} if missing else {}
            return self._send(handler, 404 if missing else 200, error, entries)
        if below not in files:
            return self._send(handler, 404, {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(files[below]).hexdigest()}"'}
        return self._send(handler, 200, headers, files[below])

    def _send(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        headers: Mapping[str, str],
        body: object = None,
    ) -> None:
        if status != 200:
            body = {"error": "refused"}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(content)


def _tree(files: Mapping[str, bytes], below: str, deep: bool) -> list[dict[str, Any]]:
    prefix = f"{below}/" if below else ""
    entries: dict[str, dict[str, Any]] = {}
    for name, content in files.items():
        if not name.startswith(prefix):
            continue
        rest = name.removeprefix(prefix)
        if deep or "/" not in rest:
            oid = hashlib.sha1(content).hexdigest()
            entries[name] = {"type": "file", "path": name, "size": len(content), "oid": oid}
        else:
            folder = prefix + rest.partition("/")[0]
            entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40}
    return list(entries.values())


@pytest.fixture
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    yield hub
    hub.stop()


@pytest.fixture
def fill_cache() -> Callable[..., None]:
    """`fill_cache(cache, repo, commit, files, branch)` lays files out as the hub's cache does."""

    def fill(
        cache: Path, repo: str, commit: str, files: Mapping[str, bytes], branch: str | None = "main"
    ) -> None:
        folder = cache / f"models--{repo.replace('/', '--')}"
        for name, content in files.items():
            blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            link = folder / "snapshots" / commit / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(*[".."] * (name.count("/") + 2), "blobs", blob.name))
        if branch is not None:
            (folder / "refs").mkdir(parents=True, exist_ok=True)
            (folder / "refs" / branch).write_text(commit)

    return fill
