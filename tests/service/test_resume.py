"""Streams whose connection breaks: they go on as if it had not, here or on another server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from monitor.audit_log.query import query
from monitor.audit_log.verify import verify
from monitor.client import AsyncMonitorClient, MonitorClient, RetryPolicy
from monitor.client import stream_book as book
from monitor.errors import (
    InvalidRequestError,
    NotReadyError,
    StreamBrokenError,
    StreamNotFoundError,
    StreamPositionError,
)
from monitor.records import Decision, StreamOpen, StreamResume, StreamUpdate, Verdict
from monitor.rpc import status
from protos.saemonitor.v1 import monitor_pb2 as pb
from protos.saemonitor.v1 import monitor_pb2_grpc as pb_grpc

RISKY = "what is the weather like today and please tell me about the attack in the north"
PATIENT = RetryPolicy(max_attempts=50, max_backoff_seconds=0.2)


class Relay:
    """A TCP relay in front of a server, as a load balancer is; `cut` breaks what goes through."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, target: str | None = None) -> None:
        self.target = target or self.target
        broken, self._open = self._open, []
        for end in broken:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            host, port = self.target.split(":")
            try:
                far = socket.create_connection((host, int(port)))
            except OSError:
                near.close()
                continue
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with source, contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def relay(shared_server: Any) -> Iterator[Relay]:
    relay = Relay(shared_server.address)
    yield relay
    relay.close()


@pytest.fixture
def through(relay: Relay) -> Iterator[MonitorClient]:
    with MonitorClient(relay.address, timeout_seconds=60, retry=PATIENT) as client:
        yield client


def eventually(claim: Callable[[], bool]) -> bool:
    for _ in range(2000):
        if claim():
            return True
        time.sleep(0.01)
    return False


def reason(call: Any) -> Exception:
    with pytest.raises(grpc.RpcError) as caught:
        for _ in call:
            pass
    return status.from_wire(caught.value)


def value(server: Any, name: str, **labels: str) -> float:
    model = server.server.pipeline.served.provenance.model
    found = server.value(f"saemonitor_{name}", model=model, **labels)
    assert isinstance(found, float)
    return found


def assert_same(streamed: Decision, whole: Decision) -> None:
    assert streamed.verdict is whole.verdict
    assert [t.token_id for t in streamed.tokens] == [t.token_id for t in whole.tokens]
    for ours, theirs in zip(streamed.tokens, whole.tokens, strict=True):
        assert ours.fused == pytest.approx(theirs.fused, rel=1e-4, abs=1e-5, nan_ok=True)
    for mine, other in zip(streamed.clusters, whole.clusters, strict=True):
        assert mine.fused == pytest.approx(other.fused, rel=1e-4)
        assert mine.first_crossing == other.first_crossing
    assert streamed.coverage == whole.coverage


@pytest.mark.parametrize("as_text", [True, False], ids=["text", "ids"])
def test_a_broken_stream_goes_on_as_if_it_had_not_been(
    client: MonitorClient, shared_server: Any, relay: Relay, through: MonitorClient, as_text: bool
) -> None:
    whole = client.score(text=RISKY, stage="completion", tokens=True)
    ids = [token.token_id for token in whole.tokens]
    pieces: list[dict[str, Any]] = (
        [{"text": word} for word in RISKY.replace(" ", " \n").split("\n")]
        if as_text
        else [{"token_ids": [token_id]} for token_id in ids]
    )
    labels = {"cluster": "danger", "stage": "completion", "severity": "critical"}
    alerts_before = value(shared_server, "alerts_total", **labels)
    updates: list[StreamUpdate] = []
    with through.stream(
        tokenizer_fingerprint=client.info().provenance.tokenizer_fingerprint,
        tokens=True,
        resumable=True,
    ) as stream:
        reader = threading.Thread(target=lambda: updates.extend(stream))
        reader.start()
        for number, piece in enumerate(pieces):
            stream.send(**piece)
            if number in (3, len(pieces) // 2, len(pieces) - 1):
                relay.cut()
        stream.flush()
        stream.end()
        reader.join()
        decision = stream.finish()
        assert stream.n_resumed >= 1
        assert stream.n_restarted == 0
    assert_same(decision, whole)
    assert {update.decision_id for update in updates} == {decision.decision_id}
    assert [a.cluster for update in updates for a in update.new_alerts] == ["danger"]
    assert [alert.cluster for alert in decision.alerts] == ["danger"]
    assert value(shared_server, "alerts_total", **labels) == alerts_before + 1
    positions = {token.position for update in updates for token in update.tokens}
    assert positions == {token.position for token in decision.tokens}


async def test_the_client_for_asyncio_resumes_too(shared_server: Any, relay: Relay) -> None:
    async with AsyncMonitorClient(relay.address, timeout_seconds=60, retry=PATIENT) as client:
        whole = await client.score(text=RISKY, stage="completion", tokens=True)
        alerts = []
        async with client.stream(tokens=True, resumable=True) as stream:
            for number, word in enumerate(RISKY.split()):
                await stream.send(text=word if number == 0 else f" {word}")
                if number in (2, 14):
                    await asyncio.sleep(0.05)
                    relay.cut()
                alerts += [a for update in stream.pending() for a in update.new_alerts]
            await stream.end()
            alerts += [a async for update in stream for a in update.new_alerts]
            decision = await stream.finish()
            assert stream.n_resumed >= 1
    assert_same(decision, whole)
    assert [alert.cluster for alert in alerts] == ["danger"]


@pytest.mark.parametrize("drains", [False, True], ids=["dies", "drains"])
def test_on_another_server_the_stream_is_sent_anew(
    serve: Any, client: MonitorClient, shared_server: Any, drains: bool
) -> None:
    whole = client.score(text=RISKY, stage="completion", tokens=True)
    with serve() as first:
        relay = Relay(first.address)
        through = MonitorClient(relay.address, timeout_seconds=60, retry=PATIENT)
        with through, through.stream(tokens=True, resumable=True) as stream:
            stream.send(text=RISKY[:40])
            stream.flush()
            old = next(iter(stream)).decision_id
            if drains:
                relay.target = shared_server.address
                first.call(first.server.stop(5.0))
            else:
                relay.cut(shared_server.address)
            for letter in RISKY[40:]:
                stream.send(text=letter)
            decision = stream.finish()
            assert (stream.n_resumed, stream.n_restarted) == (0, 1)
        relay.close()
    assert_same(decision, whole)
    assert decision.decision_id != old


def test_what_is_not_held_any_more_cannot_be_sent_anew(
    serve: Any, shared_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(book, "MAX_HELD", 10)
    with serve() as first:
        relay = Relay(first.address)
        through = MonitorClient(relay.address, timeout_seconds=60)
        with through, through.stream(resumable=True) as stream:
            for word in RISKY.split():
                stream.send(text=f"{word} ")
            relay.cut(shared_server.address)
            with pytest.raises(StreamNotFoundError, match="send it from index 0"):
                stream.finish()
        relay.close()


def test_a_stream_that_is_not_resumable_ends_with_its_connection(
    shared_server: Any, relay: Relay, through: MonitorClient
) -> None:
    with through.stream() as stream:
        stream.send(text=RISKY)
        relay.cut()
        with pytest.raises(NotReadyError):
            stream.finish()
    assert eventually(lambda: shared_server.server.pipeline.n_streams == 0)
    assert value(shared_server, "streams_detached") == 0


def broken(server: Any, session_id: str, text: str = RISKY) -> None:
    """A resumable stream whose call breaks off after its text has been received."""
    with grpc.insecure_channel(server.address) as channel:
        call = opened(channel, session_id, text)
        assert next(call).HasField("opened")
        assert next(call).HasField("scores")
        call.cancel()


def opened(channel: grpc.Channel, session_id: str, text: str = "", **fields: Any) -> Any:
    """A call of a resumable stream that stays open until it is cancelled."""
    forever = threading.Event()

    def messages() -> Iterator[pb.ScoreStreamRequest]:
        yield pb.ScoreStreamRequest(
            open=pb.StreamOpen(session_id=session_id, resumable=True, **fields)
        )
        if text:
            yield pb.ScoreStreamRequest(tokens=pb.StreamTokens(text=text))
            yield pb.ScoreStreamRequest(flush=pb.StreamFlush())
        forever.wait(60)

    call = pb_grpc.MonitorServiceStub(channel).ScoreStream(messages())
    call.add_callback(forever.set)
    return call


@pytest.mark.parametrize("says_so", [True, False])
def test_a_resumable_stream_ends_only_when_the_caller_says_so(
    shared_server: Any, says_so: bool
) -> None:
    with grpc.insecure_channel(shared_server.address) as channel:
        stub = pb_grpc.MonitorServiceStub(channel)
        name = f"says {says_so}"
        messages = [
            pb.ScoreStreamRequest(open=pb.StreamOpen(session_id=name, resumable=True)),
            pb.ScoreStreamRequest(tokens=pb.StreamTokens(text=RISKY)),
        ]
        end = pb.ScoreStreamRequest(end=pb.StreamEnd())
        if not says_so:
            assert isinstance(reason(stub.ScoreStream(iter(messages))), StreamBrokenError)
            messages = [
                pb.ScoreStreamRequest(
                    open=pb.StreamOpen(session_id=name, resume=pb.StreamResume())
                ),
            ]
        *_, last = stub.ScoreStream(iter([*messages, end]))
    assert last.summary.verdict == pb.VERDICT_ALERT


def test_another_stream_ends_with_its_messages(shared_server: Any) -> None:
    with grpc.insecure_channel(shared_server.address) as channel:
        messages = [
            pb.ScoreStreamRequest(open=pb.StreamOpen()),
            pb.ScoreStreamRequest(tokens=pb.StreamTokens(text=RISKY)),
        ]
        *_, last = pb_grpc.MonitorServiceStub(channel).ScoreStream(iter(messages))
    assert last.summary.verdict == pb.VERDICT_ALERT


def reopened(server: Any, session_id: str, **fields: Any) -> Any:
    channel = grpc.insecure_channel(server.address)
    return opened(channel, session_id, resume=pb.StreamResume(), **fields)


def test_a_stream_that_nobody_reopens_ends_on_record(serve: Any) -> None:
    with serve(resume_seconds=0.2) as server:
        broken(server, "lost")
        pipeline = server.server.pipeline
        assert eventually(lambda: value(server, "stream_resumes_total", outcome="expired") == 1)
        assert eventually(lambda: pipeline.engine.cache().sessions == 0)
        assert value(server, "streams_detached") == 0
        assert eventually(
            lambda: value(server, "requests_total", stage="completion", outcome="cancelled") == 1
        )
        assert isinstance(reason(reopened(server, "lost")), StreamNotFoundError)
        audit = server.server.settings.audit
    records = [r for r in query(audit) if r.get("session_id") == "lost"]
    assert records[-1]["verdict"] == "alert"
    assert records[-1]["coverage"]["scored"] > 0


def test_only_so_many_wait_and_the_oldest_gives_way(serve: Any) -> None:
    with serve(max_detached_streams=1) as server:
        broken(server, "old")
        assert eventually(lambda: value(server, "streams_detached") == 1)
        broken(server, "young")
        assert eventually(lambda: value(server, "stream_resumes_total", outcome="expired") == 1)
        assert value(server, "streams_detached") == 1
        assert isinstance(reason(reopened(server, "old")), StreamNotFoundError)
        call = reopened(server, "young")
        assert next(call).opened.next_index == len(RISKY)
        update = next(call).scores
        assert update.processed_index > 0
        assert [alert.cluster for alert in update.new_alerts] == ["danger"]
        call.cancel()


def test_a_server_that_stops_puts_waiting_streams_on_record(serve: Any) -> None:
    with serve() as server:
        broken(server, "waiting")
        assert eventually(lambda: value(server, "streams_detached") == 1)
        audit = server.server.settings.audit
    assert verify(audit).records == 4  # start, alert, decision, stop
    (record,) = [r for r in query(audit) if r.get("session_id") == "waiting"]
    assert record["verdict"] == "alert"


def test_reopening_ends_the_call_that_holds_the_stream(serve: Any) -> None:
    with serve() as server, grpc.insecure_channel(server.address) as channel:
        first = opened(channel, "mine", RISKY)
        assert next(first).HasField("opened")
        second = reopened(server, "mine")
        assert next(second).opened.next_index == len(RISKY)
        error = reason(first)
        assert isinstance(error, InvalidRequestError)
        assert error.found == "a stream that another call has reopened"
        assert next(second).HasField("scores")
        assert server.server.pipeline.n_streams == 1
        second.cancel()


@pytest.mark.parametrize("holder_leaves_first", [True, False])
def test_a_stream_whose_new_call_breaks_off_too_goes_on_waiting(
    serve: Any, holder_leaves_first: bool
) -> None:
    with serve() as server:
        pipeline = server.server.pipeline

        async def take_over_in_vain() -> None:
            leave = asyncio.Event()

            async def hold() -> None:
                async with pipeline.open_stream(_resumable("twice")) as session:
                    await session.feed(0, text=RISKY)
                    await leave.wait()
                    raise InvalidRequestError("session_id", "reopened", "one call a stream")

            async def reopen() -> None:
                resume = StreamResume(start_index=0, processed_index=0, n_alerts=0)
                again = dataclasses.replace(_resumable("twice"), resume=resume)
                async with pipeline.open_stream(again):
                    raise AssertionError("it was to be cancelled before")

            holding = asyncio.create_task(hold())
            await asyncio.sleep(0)
            coming = asyncio.create_task(reopen())
            await asyncio.sleep(0)
            if holder_leaves_first:
                leave.set()
                await asyncio.sleep(0)
            coming.cancel()
            await asyncio.wait([coming])
            leave.set()
            with pytest.raises(InvalidRequestError):
                await holding
            assert coming.cancelled()

        server.call(take_over_in_vain())
        assert value(server, "streams_detached") == 1
        audit = server.server.settings.audit
    assert [r["session_id"] for r in query(audit) if r.get("session_id") == "twice"] == ["twice"]


def test_an_idle_stream_is_reopened_with_an_answer_at_once(serve: Any) -> None:
    with serve() as server:
        broken(server, "idle")
        call = reopened(server, "idle")
        stands = pb.StreamResume(start_index=5, processed_index=10**6, n_alerts=1)
        call.cancel()
        with grpc.insecure_channel(server.address) as channel:
            call = opened(channel, "idle", resume=stands)
            assert next(call).HasField("opened")
            update = next(call).scores
            assert update.verdict == pb.VERDICT_ALERT
            assert not update.new_alerts
            call.cancel()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"session_id": "other"}, StreamNotFoundError),
        ({"caller": "somebody else"}, StreamNotFoundError),
        ({"resume": pb.StreamResume(start_index=10**6)}, StreamPositionError),
        ({"resume": None}, InvalidRequestError),
    ],
    ids=["unknown", "another caller", "ahead", "opened twice"],
)
def test_a_stream_that_cannot_be_reopened_so_is_refused(
    serve: Any, fields: dict[str, Any], expected: type[Exception]
) -> None:
    with serve() as server, grpc.insecure_channel(server.address) as channel:
        broken(server, "mine")
        asked = {"session_id": "mine", "resume": pb.StreamResume(), **fields}
        error = reason(opened(channel, **asked))
        assert type(error) is expected
        assert value(server, "streams_detached") == 1


def test_a_server_that_keeps_no_streams_ends_them_at_once(serve: Any) -> None:
    with serve(resume_seconds=0) as server, server.client() as client:
        assert client.info().limits.resume_seconds == 0
        broken(server, "gone")
        assert eventually(lambda: server.server.pipeline.engine.cache().sessions == 0)
        assert isinstance(reason(reopened(server, "gone")), StreamNotFoundError)


def test_a_decision_whose_reply_was_lost_is_given_again(serve: Any) -> None:
    with serve() as server, server.client() as client:
        session = None

        async def hold_reply() -> None:
            nonlocal session
            pipeline = server.server.pipeline
            session = pipeline.open_stream(_resumable("done"))
            with contextlib.suppress(asyncio.CancelledError):
                async with session:
                    await session.feed(0, text=RISKY)
                    await session.finish()
                    raise asyncio.CancelledError

        server.call(hold_reply())
        records = server.server.pipeline.audit_log.statistics().written
        call = reopened(server, "done")
        replies = [reply.WhichOneof("reply") for reply in call]
        assert replies[0] == "opened"
        assert replies[-1] == "summary"
        assert client.score(text="bread").verdict is Verdict.PASS
        assert server.server.pipeline.audit_log.statistics().written <= records + 1


def _resumable(session_id: str) -> StreamOpen:
    return StreamOpen(session_id=session_id, resumable=True)
