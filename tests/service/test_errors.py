"""Every way to be refused: its code, a sentence with field, found and expected, and on it goes."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from safetensors.numpy import load_file, save_file

from monitor.client import MonitorClient
from monitor.errors import (
    ActivationError,
    DeadlineError,
    FingerprintError,
    InvalidRequestError,
    MonitorError,
    NotFoundError,
    NotReadyError,
    PayloadTooLargeError,
    QueueFullError,
)
from monitor.records import Stage, UnscoredReason, Verdict
from protos.saemonitor.v1 import monitor_pb2 as pb
from protos.saemonitor.v1 import monitor_pb2_grpc as pb_grpc

FINGERPRINT = "0" * 64
OPEN = pb.ScoreStreamRequest(open=pb.StreamOpen())


@pytest.fixture
def fingerprint(client: MonitorClient) -> str:
    return client.info().provenance.tokenizer_fingerprint


def failed(address: str, messages: Iterable[pb.ScoreStreamRequest]) -> grpc.RpcError:
    """Sends raw stream messages, as a client with bugs would; gives the error."""
    with grpc.insecure_channel(address) as channel:
        stub = pb_grpc.MonitorServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.ScoreStream(iter(messages), timeout=60))
        return caught.value


def chunk(start_index: int, *ids: int, text: str | None = None) -> pb.ScoreStreamRequest:
    tokens = pb.StreamTokens(start_index=start_index)
    if text is None:
        tokens.token_ids.ids.extend(ids)
    else:
        tokens.text = text
    return pb.ScoreStreamRequest(tokens=tokens)


def still_serves(client: MonitorClient) -> bool:
    return client.score(text="please bake bread").verdict is Verdict.PASS


def explains(error: BaseException) -> bool:
    return bool(re.search(r"^\S.*: found .+, expected .+", str(error)))


@pytest.mark.parametrize(
    ("arguments", "cls", "field"),
    [
        ({"text": ""}, InvalidRequestError, "text"),
        ({"messages": []}, InvalidRequestError, "messages"),
        ({"messages": [("narrator", "hi")]}, InvalidRequestError, "messages"),
        ({"token_ids": []}, InvalidRequestError, "token_ids"),
        ({"text": "a", "policy": "x"}, NotFoundError, "policy"),
        ({"text": "a", "model": "gpt-9"}, NotFoundError, "model"),
    ],
)
def test_a_bad_request_is_refused_with_field_found_and_expected(
    client: MonitorClient, arguments: Any, cls: type[MonitorError], field: str
) -> None:
    if "token_ids" in arguments:
        arguments = {
            **arguments,
            "tokenizer_fingerprint": client.info().provenance.tokenizer_fingerprint,
        }
    with pytest.raises(cls) as caught:
        client.score(**arguments)
    assert type(caught.value) is cls
    assert str(caught.value).startswith(field)
    assert explains(caught.value)
    assert still_serves(client)


def test_an_id_outside_the_vocabulary_is_refused_and_its_tokens_are_unscored(
    client: MonitorClient, fingerprint: str, shared_server: Any
) -> None:
    info = client.info()
    labels = {"model": info.provenance.model, "stage": "prompt", "reason": "invalid"}
    before = shared_server.value("saemonitor_tokens_unscored_total", **labels)
    with pytest.raises(InvalidRequestError) as caught:
        client.score(token_ids=[1, 2, info.vocab_size], tokenizer_fingerprint=fingerprint)
    assert caught.value.field == "token_ids[2]"
    assert str(info.vocab_size) in caught.value.found
    after = shared_server.value("saemonitor_tokens_unscored_total", **labels)
    assert after - before == 3
    assert still_serves(client)


@pytest.mark.parametrize("fingerprint", [FINGERPRINT, None])
def test_ids_of_another_tokenizer_are_refused(
    client: MonitorClient, fingerprint: str | None
) -> None:
    with pytest.raises((FingerprintError, InvalidRequestError)) as caught:
        client.score(token_ids=[1, 2], tokenizer_fingerprint=fingerprint)
    assert explains(caught.value)
    assert "tokenizer_fingerprint" in str(caught.value)
    if fingerprint is not None:
        assert isinstance(caught.value, FingerprintError)


def test_a_request_without_input_is_refused(shared_server: Any, client: MonitorClient) -> None:
    with grpc.insecure_channel(shared_server.address) as channel:
        stub = pb_grpc.MonitorServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Score(pb.ScoreRequest(), timeout=60)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "input: found none, expected one of text, messages, token_ids"
    assert still_serves(client)


@pytest.mark.parametrize(
    ("messages", "code", "details"),
    [
        ([], "INVALID_ARGUMENT", "first stream message: found none, expected open"),
        (
            [chunk(0, text="a")],
            "INVALID_ARGUMENT",
            "first stream message: found tokens, expected open",
        ),
        (
            [OPEN, OPEN],
            "INVALID_ARGUMENT",
            "stream message after the first: found open, expected one of tokens, flush, end",
        ),
        (
            [OPEN, pb.ScoreStreamRequest(tokens=pb.StreamTokens())],
            "INVALID_ARGUMENT",
            "tokens.content: found none, expected one of token_ids, text",
        ),
        ([OPEN, chunk(0, text="ab"), chunk(3, text="c")], "OUT_OF_RANGE", "start_index: found 3"),
        ([OPEN, chunk(0, text="ab"), chunk(1, text="c")], "OUT_OF_RANGE", "start_index: found 1"),
        ([OPEN, chunk(5, text="ab")], "OUT_OF_RANGE", "start_index: found 5, expected 0"),
        (
            [pb.ScoreStreamRequest(open=pb.StreamOpen(policy="x"))],
            "NOT_FOUND",
            "policy: found 'x', expected one of",
        ),
        (
            [
                pb.ScoreStreamRequest(open=pb.StreamOpen(tokenizer_fingerprint=FINGERPRINT)),
                chunk(0, 1, 2),
            ],
            "FAILED_PRECONDITION",
            "tokenizer_fingerprint: found",
        ),
    ],
)
def test_a_broken_stream_ends_with_its_code(
    shared_server: Any, client: MonitorClient, messages: Any, code: str, details: str
) -> None:
    error: Any = failed(shared_server.address, messages)
    assert error.code() is grpc.StatusCode[code]
    assert error.details().startswith(details)
    assert still_serves(client)


def test_tokens_of_a_broken_stream_are_unscored_or_scored_and_none_is_lost(
    shared_server: Any, client: MonitorClient, fingerprint: str
) -> None:
    model = {"model": client.info().provenance.model, "stage": "completion"}

    def counts() -> tuple[float, float]:
        unscored = sum(
            shared_server.value("saemonitor_tokens_unscored_total", **model, reason=reason)
            for reason in UnscoredReason
        )
        scored = shared_server.value("saemonitor_tokens_scored_total", **model)
        return shared_server.value("saemonitor_tokens_received_total", **model), scored + unscored

    received, accounted = counts()
    opening = pb.ScoreStreamRequest(open=pb.StreamOpen(tokenizer_fingerprint=fingerprint))
    failed(shared_server.address, [opening, chunk(0, 5, 6, 7, 8, 9), chunk(99, 5)])
    now_received, now_accounted = counts()
    assert now_received - received >= 5
    assert now_received - received == now_accounted - accounted


def test_a_10_mb_message_is_refused_and_the_server_goes_on(client: MonitorClient) -> None:
    with pytest.raises(PayloadTooLargeError, match=r"larger than max \(\d+ vs\. 4194304\)"):
        client.score(text="bread " * 1_750_000)
    assert still_serves(client)
    with client.stream() as stream:
        stream.send(text="bread ")
        stream.send(text="bread " * 1_750_000)
        with pytest.raises(PayloadTooLargeError, match="larger than max"):
            stream.finish()
    assert still_serves(client)


def test_more_tokens_than_the_limit_are_refused(serve: Any) -> None:
    with serve(max_request_tokens=8) as server, server.client() as client:
        with pytest.raises(PayloadTooLargeError) as caught:
            client.score(text="please tell me how to bake bread with the weather in the north")
        assert explains(caught.value)
        assert "8" in str(caught.value)
        with client.stream() as stream, pytest.raises(PayloadTooLargeError):
            for _ in range(20):
                stream.send(text="bread bread ")
            stream.finish()
        assert still_serves(client)
        reasons = {"model": client.info().provenance.model, "reason": "payload"}
        assert server.value("saemonitor_rejections_total", **reasons) >= 1


def test_bytes_that_are_no_message_are_refused(shared_server: Any, client: MonitorClient) -> None:
    with grpc.insecure_channel(shared_server.address) as channel:
        score = channel.unary_unary("/saemonitor.v1.MonitorService/Score")
        with pytest.raises(grpc.RpcError) as caught:
            score(b"\xff\xff\xff\xff not a message", timeout=60)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == (
        "message: found bytes that cannot be decoded, expected saemonitor.v1.ScoreRequest"
    )
    with grpc.insecure_channel(shared_server.address) as channel:
        stream = channel.stream_stream("/saemonitor.v1.MonitorService/ScoreStream")
        with pytest.raises(grpc.RpcError) as caught:
            list(stream(iter([OPEN.SerializeToString(), b"\xff\xff\xff"]), timeout=60))
    error = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "bytes that cannot be decoded" in error.details()
    assert still_serves(client)


def test_a_full_queue_says_when_to_come_back(serve: Any) -> None:
    with serve(max_queue_tokens=40, max_request_tokens=40) as server, server.client() as client:

        async def full(*args: Any, **named: Any) -> None:
            raise QueueFullError("queue: 40 tokens wait, expected at most 40", 1.5)

        server.server.pipeline.engine.score = full
        with grpc.insecure_channel(server.address) as channel:
            stub = pb_grpc.MonitorServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                stub.Score(pb.ScoreRequest(text="a"), timeout=60)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers = dict(error.trailing_metadata())
        assert trailers["grpc-retry-pushback-ms"] == "1500"
        rich = rpc_status.from_call(error)
        assert rich is not None
        assert any(d.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for d in rich.details)
        labels = {"model": client.info().provenance.model}
        full_queue = server.value("saemonitor_rejections_total", **labels, reason="queue_full")
        assert full_queue == 1
        unscored = server.value(
            "saemonitor_tokens_unscored_total", **labels, stage="prompt", reason="overload"
        )
        assert unscored >= 1


def test_more_streams_than_the_limit_are_refused_until_one_ends(serve: Any) -> None:
    with serve(max_streams=1) as server, server.client() as client:
        with client.stream() as first:
            refused = client.stream()
            with pytest.raises(QueueFullError, match="streams: 1 are open"), refused:
                pass
            first.finish()
        with client.stream() as second:
            second.send(text="bread")
            assert second.finish().verdict is Verdict.PASS


def test_past_the_caller_s_deadline_the_tokens_are_unscored(serve: Any) -> None:
    with serve() as server, server.client() as client:
        labels = {"model": client.info().provenance.model}

        async def never(*args: Any, **named: Any) -> None:
            await asyncio.Event().wait()

        server.server.pipeline.engine.score = never
        with pytest.raises(DeadlineError):
            client.score(text="please bake bread", timeout=0.3)

        async def counted() -> bool:
            for _ in range(500):
                unscored = sum(
                    server.value(
                        "saemonitor_tokens_unscored_total", **labels, stage="prompt", reason=reason
                    )
                    for reason in ("deadline", "cancelled")
                )
                if unscored:
                    return True
                await asyncio.sleep(0.01)
            return False

        assert server.call(counted())
        assert server.server.pipeline.n_requests == 0


def test_an_unexpected_error_shows_an_id_and_the_log_has_the_rest(
    serve: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    with serve() as server, server.client() as client:

        async def broken(*args: Any, **named: Any) -> None:
            raise RuntimeError("index 7 is out of bounds")

        server.server.pipeline.engine.score = broken
        with pytest.raises(MonitorError) as caught:
            client.score(text="the secret words")
        assert type(caught.value) is MonitorError
        assert "bounds" not in str(caught.value)
        error_id = re.fullmatch(r"internal error, error_id (\w{32})", str(caught.value))
        assert error_id is not None
        logged = "".join(capfd.readouterr())
        assert error_id[1] in logged
        assert "index 7 is out of bounds" in logged
        assert "secret words" not in logged


def test_activations_that_are_no_numbers_are_refused_by_position(
    serve: Any, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    model = tmp_path / "model"
    shutil.copytree(tiny_bundle, bundle)
    shutil.copytree(tiny_bundle.parent / "model", model)
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    name = next(n for n in tensors if n.endswith("layers.0.mlp.down_proj.weight"))
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, weights, metadata={"format": "pt"})
    # The gate would not let such a model become ready.
    with serve(bundle, model=model, fidelity="off") as server, server.client() as client:
        with pytest.raises(ActivationError, match="position"):
            client.score(text="please bake bread")
        with client.stream() as stream:
            stream.send(text="please bake bread")
            stream.flush()
            with pytest.raises(ActivationError, match="position"):
                next(iter(stream))
        for stage in Stage:
            unscored = server.value(
                "saemonitor_tokens_unscored_total",
                model=client.info().provenance.model,
                stage=stage,
                reason="error",
            )
            assert unscored > 0, stage
        assert client.info().ready


def test_a_draining_server_refuses_new_work(serve: Any) -> None:
    with serve() as server, server.client() as client:
        server.run(server.server._serving.drain)
        with pytest.raises(NotReadyError, match="server: draining, expected"):
            client.score(text="bread")
        refused = client.stream()
        with pytest.raises(NotReadyError, match="server: draining, expected"), refused:
            pass
