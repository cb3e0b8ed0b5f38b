"""Records filled at random from their type hints, and a pipeline that answers what it is told."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import struct
import types
import typing
from collections.abc import AsyncIterator, Callable, Sequence
from enum import StrEnum
from typing import Any, TypeVar

import grpc
import pytest
from grpc_health.v1 import health, health_pb2_grpc

from monitor.errors import NotFoundError, StreamPositionError
from monitor.metrics import Metrics
from monitor.records import (
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
        rows = tuple(
            dataclasses.replace(
                token,
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
        self.first_position = 0
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
        self.sessions: list[FakeSession] = []
        self.errors: list[Exception] = []
        """Raised one by one by what is called next; then all goes well."""
        self.hang = False
        self._info = info

    def _raise_next(self) -> None:
        if self.errors:
            raise self.errors.pop(0)

    async def score(
        self, request: ScoreRequest, *, deadline_seconds: float | None = None
    ) -> Decision:
        self.requests.append((request, deadline_seconds))
        self._raise_next()
        if self.hang:
            await asyncio.Event().wait()
        return self.decision

    def open_stream(self, opened: StreamOpen) -> FakeSession:
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
