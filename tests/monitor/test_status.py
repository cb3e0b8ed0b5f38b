from __future__ import annotations

import inspect

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from monitor import errors
from monitor.rpc import status

ALL = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, errors.MonitorError)
]


class FailedCall:
    """A failed call as a client sees it."""

    def __init__(
        self,
        code: grpc.StatusCode,
        details: str | None,
        trailing_metadata: tuple[tuple[str, str | bytes], ...] = (),
    ) -> None:
        self._code, self._details, self._trailers = code, details, trailing_metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self._trailers


def sent(error: Exception) -> FailedCall:
    wire = status.to_wire(error, "e-1")
    return FailedCall(wire.code, wire.details, wire.trailing_metadata)


def instance(cls: type[errors.MonitorError]) -> errors.MonitorError:
    if cls is errors.InvalidRequestError:
        return errors.InvalidRequestError("text", "an empty string", "at least one character")
    if cls is errors.QueueFullError:
        return errors.QueueFullError("the queue holds 900 tokens, its limit is 800", 0.25)
    return cls("blocks.8 has 15 entries, expected 16")


def test_every_error_class_has_a_code() -> None:
    assert set(status.CODES) == set(ALL)


@pytest.mark.parametrize("cls", ALL)
def test_the_client_raises_what_the_server_raised(cls: type[errors.MonitorError]) -> None:
    error = instance(cls)
    received = status.from_wire(sent(error))
    if status.CODES[cls] is grpc.StatusCode.INTERNAL:
        assert type(received) is errors.MonitorError
        assert str(received) == "internal error, error_id e-1"
    else:
        assert type(received) is cls
        assert str(received) == str(error)


def test_fields_of_errors_survive() -> None:
    received = status.from_wire(sent(instance(errors.InvalidRequestError)))
    assert isinstance(received, errors.InvalidRequestError)
    assert (received.field, received.found) == ("text", "an empty string")
    assert received.expected == "at least one character"
    full = status.from_wire(sent(instance(errors.QueueFullError)))
    assert isinstance(full, errors.QueueFullError)
    assert full.retry_seconds == 0.25


def test_a_full_queue_carries_retry_info_and_pushback() -> None:
    wire = status.to_wire(errors.QueueFullError("full", 0.25), "e-1")
    assert wire.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(wire.trailing_metadata)["grpc-retry-pushback-ms"] == "250"
    rich = rpc_status.from_call(sent(errors.QueueFullError("full", 0.25)))
    assert rich is not None
    retry = next(d for d in rich.details if d.Is(error_details_pb2.RetryInfo.DESCRIPTOR))
    info = error_details_pb2.RetryInfo()
    retry.Unpack(info)
    assert info.retry_delay == Duration(nanos=250_000_000)


@pytest.mark.parametrize("cls", [c for c in ALL if c is not errors.QueueFullError])
def test_nothing_else_asks_for_a_retry(cls: type[errors.MonitorError]) -> None:
    assert "grpc-retry-pushback-ms" not in dict(sent(instance(cls)).trailing_metadata())


def test_an_unexpected_error_shows_its_id_and_nothing_else() -> None:
    wire = status.to_wire(RuntimeError("secret prompt"), "e-77")
    assert wire.is_internal
    assert wire.code is grpc.StatusCode.INTERNAL
    assert "e-77" in wire.details
    assert "secret" not in wire.details
    assert not any(b"secret" in _bytes(value) for _, value in wire.trailing_metadata)


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def test_a_class_of_tomorrow_gets_its_base_s_code() -> None:
    class StageError(errors.InvalidRequestError):
        pass

    received = status.from_wire(sent(StageError("stage", "7", "1 or 2")))
    assert type(received) is errors.InvalidRequestError


@pytest.mark.parametrize("text", ["漢" * 5000, "x" * 50_000, "🙂" * 3000])
def test_long_messages_fit_into_the_trailers(text: str) -> None:
    wire = status.to_wire(errors.InvalidRequestError(text, text, text), "e-1")
    encoded = len(wire.details.encode()) * 3  # percent-encoding
    metadata = sum(len(key) + len(_bytes(value)) * 4 / 3 for key, value in wire.trailing_metadata)
    assert encoded + metadata < 8192


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.NotReadyError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.PayloadTooLargeError),
        (grpc.StatusCode.UNIMPLEMENTED, errors.MonitorError),
    ],
)
def test_a_bare_code_from_grpc_itself_has_a_class(
    code: grpc.StatusCode, cls: type[errors.MonitorError]
) -> None:
    received = status.from_wire(FailedCall(code, "said by the transport"))
    assert type(received) is cls
    assert str(received) == "said by the transport"
    assert "no message" in str(status.from_wire(FailedCall(code, None)))


def test_rich_details_of_someone_else_are_ignored() -> None:
    info = error_details_pb2.ErrorInfo(reason="NOT_FOUND", domain="other.example")
    rich = status_pb2.Status(code=14, message="down")
    rich.details.add().Pack(info)
    wire = rpc_status.to_status(rich)
    call = FailedCall(grpc.StatusCode.UNAVAILABLE, "down", tuple(wire.trailing_metadata))
    assert type(status.from_wire(call)) is errors.NotReadyError
    contradicting = FailedCall(grpc.StatusCode.NOT_FOUND, "gone", tuple(wire.trailing_metadata))
    assert type(status.from_wire(contradicting)) is errors.NotFoundError
