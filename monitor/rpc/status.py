"""Errors <-> gRPC status, both directions; the only place where a class meets a code.

A `MonitorError` travels as its code, its message and a google.rpc.ErrorInfo that names its class,
so that the client raises the same class. What is INTERNAL travels as an error id and nothing
else; the log holds the rest under that id.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from monitor import errors

DOMAIN = "saemonitor"
"""Domain of our google.rpc.ErrorInfo."""

PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""Trailer that tells clients how long to wait before they try again (gRFC A6)."""

MAX_MESSAGE_BYTES = 1000
"""Longest message sent, in UTF-8; trailers hold 8 KiB by default, and a byte may take three."""

MAX_FIELD_BYTES = 400
"""Longest field, found and expected sent beside the message, each, in UTF-8."""

CODES: Mapping[type[errors.MonitorError], grpc.StatusCode] = {
    errors.MonitorError: grpc.StatusCode.INTERNAL,
    errors.SettingsError: grpc.StatusCode.INTERNAL,
    errors.BundleError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ModelStoreError: grpc.StatusCode.INTERNAL,
    errors.SAEStoreError: grpc.StatusCode.INTERNAL,
    errors.AuditError: grpc.StatusCode.UNAVAILABLE,
    errors.AuditChainError: grpc.StatusCode.DATA_LOSS,
    errors.RequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.PayloadTooLargeError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.StreamPositionError: grpc.StatusCode.OUT_OF_RANGE,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.StreamNotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.FingerprintError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ForeignActivationsError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.ComputeMemoryError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NotReadyError: grpc.StatusCode.UNAVAILABLE,
    errors.StreamBrokenError: grpc.StatusCode.UNAVAILABLE,
    errors.UnfitError: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.ActivationError: grpc.StatusCode.FAILED_PRECONDITION,
}
"""Every class of `monitor.errors` and its code."""

CLASSES_WITHOUT_INFO: Mapping[grpc.StatusCode, type[errors.MonitorError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.RequestError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.RequestError,
    grpc.StatusCode.OUT_OF_RANGE: errors.StreamPositionError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.PayloadTooLargeError,
    grpc.StatusCode.UNAVAILABLE: errors.NotReadyError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineError,
}
"""What a bare code means: one that gRPC itself or a proxy in between sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WireStatus:
    """How one error leaves the server."""

    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]
    is_internal: bool
    """Whether the caller sees nothing but an error id, so that the log must hold the rest."""


def code_of(error: BaseException) -> grpc.StatusCode:
    """The code of an error: its class's, or the nearest base's; INTERNAL for anything else."""
    return CODES[_known_class(error)]


def to_wire(error: Exception, error_id: str) -> WireStatus:
    """The status to end an RPC with; `error_id` is shown only where nothing else is."""
    code = code_of(error)
    is_internal = code is grpc.StatusCode.INTERNAL
    message = _shortened(str(error), MAX_MESSAGE_BYTES)
    info: dict[str, str] = {}
    if is_internal:
        message, info = f"internal error, error_id {error_id}", {"error_id": error_id}
    elif isinstance(error, errors.InvalidRequestError):
        parts = {"field": error.field, "found": error.found, "expected": error.expected}
        info = {name: _shortened(part, MAX_FIELD_BYTES) for name, part in parts.items()}
    elif isinstance(error, errors.StreamNotFoundError):
        info = {"resend_from": "0"}
    reason = "INTERNAL" if is_internal else _reason(_known_class(error))
    packed = [_packed(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=info))]
    trailers: list[tuple[str, str | bytes]] = []
    if isinstance(error, errors.QueueFullError):
        delay = Duration()
        delay.FromMilliseconds(_milliseconds(error.retry_seconds))
        packed.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
        trailers.append((PUSHBACK_KEY, str(_milliseconds(error.retry_seconds))))
    rich = rpc_status.to_status(
        status_pb2.Status(code=code.value[0], message=message, details=packed)
    )
    return WireStatus(
        code=code,
        details=message,
        trailing_metadata=(*rich.trailing_metadata, *trailers),
        is_internal=is_internal,
    )


def from_wire(call: Any) -> errors.MonitorError:
    """The error that a failed call stands for; `call` is a grpc.RpcError of either API."""
    code, details = call.code(), call.details() or ""
    info: error_details_pb2.ErrorInfo | None = None
    retry_seconds: float | None = None
    for detail in _rich_details(call):
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            found = error_details_pb2.ErrorInfo()
            detail.Unpack(found)
            info = found if found.domain == DOMAIN else info
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_seconds = retry.retry_delay.ToMilliseconds() / 1000
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and retry_seconds is not None:
        return errors.QueueFullError(details, retry_seconds)
    if info is not None:
        cls = _CLASSES_BY_REASON.get(info.reason, errors.MonitorError)
        if cls is errors.InvalidRequestError:
            fields = info.metadata
            return cls(fields["field"], fields["found"], fields["expected"])
    else:
        cls = CLASSES_WITHOUT_INFO.get(code, errors.MonitorError)
    return cls(details or f"the call failed with {code.name} and no message")


def _rich_details(call: Any) -> list[AnyMessage]:
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # the rich status contradicts the plain one: a proxy changed it
        return []
    return [] if status is None else list(status.details)


def _known_class(error: BaseException) -> type[errors.MonitorError]:
    known = (base for base in type(error).__mro__ if base in CODES)
    return next(known, errors.MonitorError)


def _reason(cls: type[errors.MonitorError]) -> str:
    words = re.findall(r"[A-Z][a-z]*", cls.__name__.removesuffix("Error"))
    return "_".join(words).upper()


_CLASSES_BY_REASON = {_reason(cls): cls for cls in CODES if cls is not errors.QueueFullError}


def _packed(message: Any) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _shortened(text: str, max_bytes: int) -> str:
    encoded = text.encode("utf-8", "replace")
    if len(encoded) > max_bytes:
        encoded = encoded[: max_bytes - 3] + b"..."
    return encoded.decode("utf-8", "ignore")
