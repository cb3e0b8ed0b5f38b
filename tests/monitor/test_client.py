from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import pytest

from monitor.client import AsyncMonitorClient, MonitorClient, RetryPolicy
from monitor.client.call_end import CallEnd
from monitor.errors import (
    DeadlineError,
    FingerprintError,
    ForeignActivationsError,
    InvalidRequestError,
    MonitorError,
    NotFoundError,
    NotReadyError,
    QueueFullError,
)
from monitor.records import (
    ActivationDtype,
    ActivationsOpen,
    ActivationTensor,
    Message,
    ScoreRequest,
    Stage,
    StreamOpen,
)
from protos.saemonitor.v1 import monitor_pb2 as pb
from protos.saemonitor.v1 import monitor_pb2_grpc as pb_grpc

AT_ONCE = RetryPolicy(initial_backoff_seconds=0.001, max_backoff_seconds=0.002)


@pytest.fixture
async def client(fake_server: Any) -> AsyncIterator[AsyncMonitorClient]:
    async with AsyncMonitorClient(fake_server.address, retry=AT_ONCE) as client:
        yield client


async def in_thread(address: str, use: Callable[[MonitorClient], Any], **options: Any) -> Any:
    """Runs the blocking client beside the server's event loop."""

    def run() -> Any:
        with MonitorClient(address, retry=AT_ONCE, **options) as client:
            return use(client)

    return await asyncio.to_thread(run)


async def test_every_argument_arrives_and_the_decision_comes_back(
    fake_server: Any, client: AsyncMonitorClient
) -> None:
    arguments: dict[str, Any] = {
        "token_ids": [3, 1, 2],
        "stage": "completion",
        "tokens": True,
        "attribution": True,
        "policy": "strict",
        "tokenizer_fingerprint": "f" * 64,
        "model": "tiny",
    }
    expected = ScoreRequest(
        token_ids=(3, 1, 2),
        stage=Stage.COMPLETION,
        want_tokens=True,
        want_attribution=True,
        policy="strict",
        tokenizer_fingerprint="f" * 64,
        model="tiny",
    )
    assert await client.score(**arguments) == fake_server.pipeline.decision
    assert await in_thread(fake_server.address, lambda c: c.score(**arguments)) == (
        fake_server.pipeline.decision
    )
    assert [request for request, _ in fake_server.pipeline.requests] == [expected, expected]


@pytest.mark.parametrize(
    "messages",
    [
        [("user", "hi"), ("assistant", "hello")],
        [{"role": "user", "content": "hi"}, {"content": "hello", "role": "assistant"}],
        (Message(role="user", content="hi"), Message(role="assistant", content="hello")),
    ],
)
async def test_messages_may_be_pairs_mappings_or_records(
    fake_server: Any, client: AsyncMonitorClient, messages: Any
) -> None:
    await client.score(messages=messages)
    request, _ = fake_server.pipeline.requests[0]
    assert request.messages == (
        Message(role="user", content="hi"),
        Message(role="assistant", content="hello"),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "input: found none"),
        ({"text": "a", "token_ids": [1]}, "input: found text and token_ids"),
        ({"messages": ["hi"]}, r"messages\[0\]: found str, expected"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: found keys role, expected role and"),
        ({"messages": [("user", None)]}, r"messages\[0\]: found \(str, NoneType\), expected"),
        ({"text": "a", "stage": "middle"}, "stage: found 'middle', expected prompt or completion"),
        ({"token_ids": [-5]}, r"token_ids\[0\]: found -5"),
    ],
)
async def test_what_cannot_be_sent_is_refused_before_it_is(
    fake_server: Any, client: AsyncMonitorClient, arguments: Any, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        await client.score(**arguments)
    with pytest.raises(InvalidRequestError, match=message):
        await in_thread(fake_server.address, lambda c: c.score(**arguments))
    assert not fake_server.pipeline.requests


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError("text", "an empty string", "at least one character"),
        NotFoundError("policy: found 'x', expected one of default"),
        FingerprintError("tokenizer_fingerprint: found a, expected b"),
    ],
)
async def test_the_server_s_error_is_raised_by_its_own_class_and_not_retried(
    fake_server: Any, client: AsyncMonitorClient, error: MonitorError
) -> None:
    fake_server.pipeline.errors = [error, error]
    for call in (
        client.score(text="a"),
        in_thread(fake_server.address, lambda c: c.score(text="a")),
    ):
        with pytest.raises(type(error)) as caught:
            await call
        assert str(caught.value) == str(error)
    assert len(fake_server.pipeline.requests) == 2


async def test_a_full_queue_is_tried_again_after_its_pushback(
    fake_server: Any, client: AsyncMonitorClient
) -> None:
    full = [QueueFullError("queue: full", 0.05), QueueFullError("queue: full", 0.05)]
    fake_server.pipeline.errors = [*full, *full]
    started = time.monotonic()
    assert await client.score(text="a") == fake_server.pipeline.decision
    assert time.monotonic() - started >= 0.1
    assert await in_thread(fake_server.address, lambda c: c.score(text="a")) == (
        fake_server.pipeline.decision
    )
    assert len(fake_server.pipeline.requests) == 6


async def test_a_pushback_beyond_the_deadline_is_not_waited_for(
    fake_server: Any, client: AsyncMonitorClient
) -> None:
    fake_server.pipeline.errors = [QueueFullError("queue: full", 30.0)] * 2
    with pytest.raises(QueueFullError) as caught:
        await client.score(text="a", timeout=2.0)
    assert caught.value.retry_seconds == 30.0
    with pytest.raises(QueueFullError):
        await in_thread(fake_server.address, lambda c: c.score(text="a", timeout=2.0))
    assert len(fake_server.pipeline.requests) == 2


async def test_a_server_that_is_not_ready_is_tried_again_a_bounded_number_of_times(
    fake_server: Any, client: AsyncMonitorClient
) -> None:
    fake_server.pipeline.errors = [NotReadyError("server: starting")] * 2
    assert await client.score(text="a") == fake_server.pipeline.decision
    fake_server.pipeline.errors = [NotReadyError("server: starting")] * 99
    with pytest.raises(NotReadyError, match="server: starting"):
        await client.score(text="a")
    assert len(fake_server.pipeline.requests) == 3 + AT_ONCE.max_attempts


async def test_nobody_listening_is_not_ready() -> None:
    async with AsyncMonitorClient("127.0.0.1:1", retry=AT_ONCE) as client:
        with pytest.raises(NotReadyError):
            await client.score(text="a", timeout=5.0)
    with pytest.raises(NotReadyError):
        await in_thread("127.0.0.1:1", lambda c: c.score(text="a", timeout=5.0))


async def test_the_deadline_is_told_to_the_server_and_kept(
    fake_server: Any, client: AsyncMonitorClient
) -> None:
    fake_server.pipeline.hang = True
    with pytest.raises(DeadlineError):
        await client.score(text="a", timeout=0.5)
    with pytest.raises(DeadlineError):
        await in_thread(fake_server.address, lambda c: c.score(text="a", timeout=0.5))
    for _, deadline_seconds in fake_server.pipeline.requests:
        assert 0 <= deadline_seconds < 1


async def test_there_is_a_deadline_where_none_is_given(
    fake_server: Any, client: AsyncMonitorClient
) -> None:
    await client.score(text="a")
    await in_thread(fake_server.address, lambda c: c.score(text="a"), timeout_seconds=3.0)
    (_, by_default), (_, chosen) = fake_server.pipeline.requests
    assert 4 < by_default < 11
    assert 0 < chosen < 4


async def test_a_stream_brings_updates_and_a_decision(
    fake_server: Any, client: AsyncMonitorClient
) -> None:
    async with client.stream(
        session_id="s-1",
        policy="strict",
        context=[("user", "hi")],
        tokens=True,
        tokenizer_fingerprint="f",
    ) as stream:
        assert stream.session_id == "s-1"
        await stream.send(token_ids=[1, 2, 3])
        await stream.send(token_ids=[4])
        await stream.flush()
        await stream.end()
        updates = [update async for update in stream]
        decision = await stream.finish()
    session = fake_server.pipeline.sessions[0]
    assert session.opened == StreamOpen(
        session_id="s-1",
        policy="strict",
        context_messages=(Message(role="user", content="hi"),),
        want_tokens=True,
        tokenizer_fingerprint="f",
    )
    assert session.fed == [(0, (1, 2, 3), None), (3, (4,), None)]
    assert [update.processed_index for update in updates[:2]] == [3, 4]
    assert len(updates) == 3
    assert decision.session_id == "s-1"
    assert not session.cancelled


async def test_a_blocking_stream_does_the_same(fake_server: Any) -> None:
    def use(client: MonitorClient) -> Any:
        with client.stream() as stream:
            assert stream.session_id == "chosen-by-server"
            for piece in ("grü", "ße", "!"):
                stream.send(text=piece)
            stream.end()
            updates = list(stream)
            return updates, stream.finish(), list(stream)

    updates, decision, rest = await in_thread(fake_server.address, use)
    assert [update.processed_index for update in updates] == [3, 5, 6]
    assert decision.session_id == "chosen-by-server"
    assert rest == []
    assert fake_server.pipeline.sessions[0].fed == [
        (0, None, "grü"),
        (3, None, "ße"),
        (5, None, "!"),
    ]


async def test_updates_may_be_picked_up_between_two_sends(
    fake_server: Any, client: AsyncMonitorClient
) -> None:
    async def until_two(stream: Any) -> list[int]:
        seen: list[int] = []
        while len(seen) < 2:
            seen += [update.processed_index for update in stream.pending()]
            await asyncio.sleep(0.01)
        return seen

    async with client.stream() as stream:
        assert stream.pending() == []
        await stream.send(text="ab")
        await stream.send(text="c")
        assert await until_two(stream) == [2, 3]
        await stream.finish()
        assert stream.pending() == []

    def use(blocking: MonitorClient) -> list[int]:
        with blocking.stream() as stream:
            stream.send(text="ab")
            stream.send(text="c")
            seen: list[int] = []
            while len(seen) < 2:
                seen += [update.processed_index for update in stream.pending()]
                time.sleep(0.01)
            stream.finish()
            return seen

    assert await in_thread(fake_server.address, use) == [2, 3]


async def test_finish_does_not_need_anyone_to_read(
    fake_server: Any, client: AsyncMonitorClient
) -> None:
    """More updates than are kept for a reader."""
    async with client.stream() as stream:
        for _ in range(300):
            await stream.send(text="x")
        assert (await stream.finish()).session_id == "chosen-by-server"

    def use(blocking: MonitorClient) -> str:
        with blocking.stream() as stream:
            for _ in range(600):
                stream.send(text="x")
            return stream.finish().session_id

    assert await in_thread(fake_server.address, use) == "chosen-by-server"


async def test_leaving_a_stream_early_cancels_it(
    fake_server: Any, client: AsyncMonitorClient
) -> None:
    async with client.stream() as stream:
        await stream.send(text="ab")

    def use(blocking: MonitorClient) -> None:
        with blocking.stream() as stream:
            stream.send(text="ab")

    await in_thread(fake_server.address, use)
    for _ in range(200):
        if all(session.cancelled for session in fake_server.pipeline.sessions):
            break
        await asyncio.sleep(0.01)
    assert [session.cancelled for session in fake_server.pipeline.sessions] == [True, True]


async def test_a_refused_stream_says_why_when_it_is_opened(
    fake_server: Any, client: AsyncMonitorClient
) -> None:
    refusal = NotFoundError("policy: found 'x', expected one of default")
    fake_server.pipeline.errors = [refusal, refusal]
    with pytest.raises(NotFoundError, match="policy: found 'x'"):
        async with client.stream(policy="x"):
            pass

    def use(blocking: MonitorClient) -> None:
        with blocking.stream(policy="x"):
            pass

    with pytest.raises(NotFoundError, match="policy: found 'x'"):
        await in_thread(fake_server.address, use)


async def test_opening_a_stream_is_tried_again(
    fake_server: Any, client: AsyncMonitorClient
) -> None:
    fake_server.pipeline.errors = [QueueFullError("streams: 9 are open", 0.01)] * 4

    def use(blocking: MonitorClient) -> str:
        with blocking.stream() as stream:
            return stream.finish().session_id

    fake_server.pipeline.errors = [QueueFullError("streams: 9 are open", 0.01)] * 2
    async with client.stream() as stream:
        await stream.finish()
    fake_server.pipeline.errors = [QueueFullError("streams: 9 are open", 0.01)] * 2
    assert await in_thread(fake_server.address, use) == "chosen-by-server"


async def test_an_error_inside_a_stream_reaches_send_iteration_and_finish(
    fake_server: Any, client: AsyncMonitorClient
) -> None:
    async def fail_in_feed(*args: Any, **named: Any) -> None:
        raise InvalidRequestError("token_ids[0]", "99", "an id below 64")

    async with client.stream() as stream:
        fake_server.pipeline.sessions[0].feed = fail_in_feed
        await stream.send(token_ids=[99])
        with pytest.raises(InvalidRequestError, match="an id below 64"):
            async for _ in stream:
                pass
        with pytest.raises(InvalidRequestError, match="an id below 64"):
            await stream.send(token_ids=[1])
        with pytest.raises(InvalidRequestError, match="an id below 64"):
            await stream.finish()
    assert isinstance(fake_server.pipeline.sessions[0].ended, InvalidRequestError)

    def use(blocking: MonitorClient) -> None:
        with blocking.stream() as stream:
            fake_server.pipeline.sessions[1].feed = fail_in_feed
            stream.send(token_ids=[99])
            with pytest.raises(InvalidRequestError, match="an id below 64"):
                list(stream)
            with pytest.raises(InvalidRequestError, match="an id below 64"):
                stream.send(token_ids=[1])
            stream.finish()

    with pytest.raises(InvalidRequestError, match="an id below 64"):
        await in_thread(fake_server.address, use)


async def test_one_stream_sends_one_kind(fake_server: Any, client: AsyncMonitorClient) -> None:
    async with client.stream() as stream:
        await stream.send(text="ab")
        with pytest.raises(InvalidRequestError, match="found token_ids after text"):
            await stream.send(token_ids=[1])
        with pytest.raises(InvalidRequestError, match="found none, expected exactly one"):
            await stream.send()
        assert (await stream.finish()).session_id == "chosen-by-server"
        with pytest.raises(InvalidRequestError, match="a stream that has its summary"):
            await stream.send(text="c")


async def test_a_draining_server_still_gives_the_summary(
    fake_server: Any, client: AsyncMonitorClient
) -> None:
    async with client.stream() as stream:
        await stream.send(text="ab")
        fake_server.serving.drain()
        async for _ in stream:
            pass
        with pytest.raises(NotReadyError, match="ended after its summary"):
            await stream.send(text="c")
        decision = await stream.finish()
    assert decision.session_id == "chosen-by-server"
    assert not fake_server.pipeline.sessions[0].cancelled
    with pytest.raises(NotReadyError, match="draining"):
        await client.score(text="a")


async def test_a_draining_server_gives_a_blocking_client_the_summary(fake_server: Any) -> None:
    loop = asyncio.get_running_loop()

    def use(blocking: MonitorClient) -> str:
        with blocking.stream() as stream:
            stream.send(text="ab")
            loop.call_soon_threadsafe(fake_server.serving.drain)
            list(stream)
            with pytest.raises(NotReadyError, match="ended after its summary"):
                stream.send(text="c")
            return stream.finish().session_id

    assert await in_thread(fake_server.address, use) == "chosen-by-server"


async def test_info_clusters_and_health(fake_server: Any, client: AsyncMonitorClient) -> None:
    info = fake_server.pipeline.info()
    clusters = fake_server.pipeline.clusters()
    assert await client.info() == info
    assert await client.clusters() == clusters
    assert await client.cluster(clusters[1].cluster) == clusters[1]
    assert await client.health() is True
    with pytest.raises(NotFoundError, match="cluster: found 'nope'"):
        await client.cluster("nope")
    with pytest.raises(NotFoundError):
        await client.health("no.such.Service")

    def use(blocking: MonitorClient) -> Any:
        return (
            blocking.info(),
            blocking.clusters(),
            blocking.cluster(clusters[0].cluster),
            blocking.health(),
        )

    assert await in_thread(fake_server.address, use) == (info, clusters, clusters[0], True)


async def test_the_caller_is_named_in_every_request(fake_server: Any) -> None:
    async with AsyncMonitorClient(fake_server.address, caller="team-a") as client:
        await client.score(text="a")
        async with client.stream() as stream:
            await stream.finish()
    assert fake_server.pipeline.requests[0][0].caller == "team-a"
    assert fake_server.pipeline.sessions[0].opened.caller == "team-a"


def acts(n: int = 700, width: int = 640, dtype: Any = np.float32) -> np.ndarray:
    return np.arange(n * width, dtype=np.uint16).reshape(n, width).astype(dtype)


async def test_arrays_arrive_in_chunks_below_the_limit_and_the_decision_comes_back(
    fake_server: Any, client: AsyncMonitorClient
) -> None:
    arrays = {"blocks.0.hook_resid_post": acts(), "blocks.1.hook_resid_post": acts(700, 8, "<f2")}
    arguments: dict[str, Any] = {
        "model_digest": "d" * 64,
        "token_ids": range(700),
        "tokenizer_fingerprint": "f" * 64,
        "stage": "completion",
        "stages": [None] + ["prompt"] * 699,
        "tokens": True,
        "attribution": True,
        "policy": "strict",
    }
    decision = fake_server.pipeline.decision
    assert await client.score_activations(arrays, **arguments) == decision
    assert decision == await in_thread(
        fake_server.address, lambda c: c.score_activations(arrays, **arguments)
    )
    expected = ActivationsOpen(
        model_digest="d" * 64,
        n_tokens=700,
        tensors=(
            ActivationTensor(
                hook_point="blocks.0.hook_resid_post", dtype=ActivationDtype.FLOAT32, width=640
            ),
            ActivationTensor(
                hook_point="blocks.1.hook_resid_post", dtype=ActivationDtype.FLOAT16, width=8
            ),
        ),
        token_ids=tuple(range(700)),
        tokenizer_fingerprint="f" * 64,
        stage=Stage.COMPLETION,
        stages=(None, *[Stage.PROMPT] * 699),
        want_tokens=True,
        want_attribution=True,
        policy="strict",
    )
    for opened, chunks, deadline_seconds in fake_server.pipeline.activations:
        assert opened == expected
        assert deadline_seconds is not None
        assert max(len(chunk.data) for chunk in chunks) <= 1024 * 1024
        assert [(c.tensor, c.start_row, c.n_rows) for c in chunks] == [
            (0, 0, 409),
            (0, 409, 291),
            (1, 0, 700),
        ]
        sent = b"".join(chunk.data for chunk in chunks if chunk.tensor == 0)
        assert sent == arrays["blocks.0.hook_resid_post"].tobytes()


@pytest.mark.parametrize(
    ("array", "dtype", "data"),
    [
        (np.array([[1.0, -2.0]], ">f4"), "float32", b"\0\0\x80\x3f\0\0\0\xc0"),
        (np.array([[0x3F80, 0xC000]], np.uint16), "bfloat16", b"\x80\x3f\x00\xc0"),
        (np.array([[1.0, 0.0], [-2.0, 0.0]], np.float16).T[:1], "float16", b"\0\x3c\0\xc0"),
    ],
)
async def test_numbers_are_sent_little_endian_in_their_type(
    fake_server: Any, client: AsyncMonitorClient, array: np.ndarray, dtype: str, data: bytes
) -> None:
    await client.score_activations({"x": array}, model_digest="d")
    opened, (chunk,), _ = fake_server.pipeline.activations[0]
    assert (opened.tensors[0].dtype, opened.tensors[0].width) == (dtype, 2)
    assert chunk.data == data


@pytest.mark.parametrize(
    ("arrays", "arguments", "message"),
    [
        ({}, {}, "activations: found none, expected as many rows everywhere"),
        ({"x": acts(2, 3), "y": acts(3, 3)}, {}, "found 2 rows at x, 3 rows at y, expected"),
        ({"x": acts(2, 3, float)}, {}, r"activations\['x'\]: found float64, expected float32"),
        ({"x": acts(2, 3)[0]}, {}, r"found \[3\], expected a NumPy array \[n_tokens, width\]"),
        ({"x": [[1.0]]}, {}, "found list, expected a NumPy array"),
        ({"x": acts(1, 3)}, {"stages": ["middle"]}, "stage: found 'middle'"),
        ({"x": acts(1, 3)}, {"token_ids": [-5]}, r"token_ids\[0\]: found -5"),
    ],
)
async def test_arrays_that_cannot_be_sent_are_refused_before_they_are(
    fake_server: Any, client: AsyncMonitorClient, arrays: Any, arguments: Any, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        await client.score_activations(arrays, model_digest="d", **arguments)
    with pytest.raises(InvalidRequestError, match=message):
        await in_thread(
            fake_server.address,
            lambda c: c.score_activations(arrays, model_digest="d", **arguments),
        )
    assert not fake_server.pipeline.activations


async def test_activations_are_sent_again_whole_after_a_full_queue(
    fake_server: Any, client: AsyncMonitorClient
) -> None:
    fake_server.pipeline.errors = [QueueFullError("queue: full", 0.01)] * 2
    await client.score_activations({"x": acts()}, model_digest="d")
    fake_server.pipeline.errors = [QueueFullError("queue: full", 0.01)] * 2
    await in_thread(
        fake_server.address, lambda c: c.score_activations({"x": acts()}, model_digest="d")
    )
    received = [
        sum(chunk.n_rows for chunk in chunks) for _, chunks, _ in fake_server.pipeline.activations
    ]
    assert len(received) == 6
    assert received[2] == received[5] == 700


async def test_activations_that_are_refused_at_once_say_why(
    fake_server: Any, client: AsyncMonitorClient
) -> None:
    refusal = ForeignActivationsError("model_digest: found a, expected b")
    fake_server.pipeline.errors = [refusal, refusal]
    large = {"x": acts(8000)}
    with pytest.raises(ForeignActivationsError, match="model_digest: found a, expected b"):
        await client.score_activations(large, model_digest="a")
    with pytest.raises(ForeignActivationsError, match="model_digest: found a, expected b"):
        await in_thread(fake_server.address, lambda c: c.score_activations(large, model_digest="a"))


class RefusingAtOnce(pb_grpc.MonitorServiceServicer):
    """Reads one message and refuses the call; runs beside the test's event loop."""

    def ScoreActivations(self, messages: Any, context: Any) -> None:
        self.ScoreStream(messages, context)

    def ScoreStream(self, messages: Any, context: Any) -> None:
        next(messages)
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the server's own words")


@pytest.fixture
def refusing() -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    pb_grpc.add_MonitorServiceServicer_to_server(RefusingAtOnce(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.mark.parametrize("method", ["ScoreActivations", "ScoreStream"])
async def test_a_write_after_the_end_does_not_hide_what_the_server_said(
    refusing: str, method: str
) -> None:
    async with grpc.aio.insecure_channel(refusing) as channel:
        call = getattr(pb_grpc.MonitorServiceStub(channel), method)()
        end = CallEnd(call)
        message = getattr(pb, f"{method}Request")()
        await call.write(message)
        await asyncio.sleep(0)
        time.sleep(0.2)  # the loop must not see the end before it writes again
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            await call.write(message)
        assert str(await end.error()) == "the server's own words"


def test_waits_grow_to_a_bound_and_end() -> None:
    policy = RetryPolicy(
        max_attempts=4, initial_backoff_seconds=1.0, max_backoff_seconds=3.0, jitter=0.0
    )
    error = NotReadyError("starting")
    assert [policy.delay_seconds(error, n) for n in (1, 2, 3, 4)] == [1.0, 2.0, 3.0, None]
    assert policy.delay_seconds(QueueFullError("full", 7.0), 1) == 7.0
    assert policy.delay_seconds(DeadlineError("late"), 1) is None


def test_the_client_imports_neither_torch_nor_the_service() -> None:
    program = (
        "import sys, monitor.client; "
        "heavy = {'torch', 'transformers', 'sqlalchemy', 'starlette', 'monitor.pipeline'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


async def test_an_unknown_method_is_unimplemented_and_makes_no_series(fake_server: Any) -> None:
    async with grpc.aio.insecure_channel(fake_server.address) as channel:
        call = channel.unary_unary("/saemonitor.v1.MonitorService/Invented")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert b"Invented" not in fake_server.metrics.render().body
