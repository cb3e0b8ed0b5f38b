"""What the two clients share: arguments to records, and when to try again."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from monitor.errors import InvalidRequestError, MonitorError, NotReadyError, QueueFullError
from monitor.records import (
    Message,
    ScoreRequest,
    Stage,
)
from monitor.rpc.convert import requests
from protos.saemonitor.v1 import monitor_pb2 as pb

Messages = Iterable[Message | tuple[str, str] | Mapping[str, str]]
"""Turns as records, as (role, content) pairs, or as {"role": ..., "content": ...}."""

DEFAULT_TIMEOUT_SECONDS = 10.0
DEFAULT_STREAM_TIMEOUT_SECONDS = 600.0

CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", 256 * 1024 * 1024),  # per-token scores of long requests
    ("grpc.max_send_message_length", -1),  # the server states its limit; let it say so
    ("grpc.enable_retries", 0),  # `RetryPolicy` retries, and knows the deadline
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """When a call is made again: the queue was full, or nobody answered.

    A call is made again within its deadline only. One that was answered and whose answer was lost
    is scored, and recorded, twice.
    """

    max_attempts: int = 5
    initial_backoff_seconds: float = 0.1
    max_backoff_seconds: float = 2.0
    jitter: float = 0.2
    """Share by which a wait is varied at random, so that callers do not come back together."""

    def delay_seconds(self, error: MonitorError, n_attempts: int) -> float | None:
        """How long to wait before the next attempt; None when there should be none."""
        if n_attempts >= self.max_attempts:
            return None
        if isinstance(error, QueueFullError):
            delay = error.retry_seconds
        elif isinstance(error, NotReadyError):
            delay = self.initial_backoff_seconds * 2 ** (n_attempts - 1)
            delay = min(delay, self.max_backoff_seconds)
        else:
            return None
        return delay * (1 + random.uniform(0, self.jitter))


def message_records(messages: Messages) -> tuple[Message, ...]:
    """Messages in any of their forms, as records; InvalidRequestError names one that is none."""
    records = []
    for index, message in enumerate(messages):
        if isinstance(message, Message):
            role, content = message.role, message.content
        elif isinstance(message, Mapping):
            if set(message) != {"role", "content"}:
                keys = ", ".join(sorted(map(str, message)))
                raise InvalidRequestError(f"messages[{index}]", f"keys {keys}", "role and content")
            role, content = message["role"], message["content"]
        elif isinstance(message, tuple) and len(message) == 2:
            role, content = message
        else:
            raise InvalidRequestError(
                f"messages[{index}]", type(message).__name__, "(role, content) or a mapping"
            )
        if not isinstance(role, str) or not isinstance(content, str):
            found = f"({type(role).__name__}, {type(content).__name__})"
            raise InvalidRequestError(f"messages[{index}]", found, "(str, str)")
        records.append(Message(role=role, content=content))
    return tuple(records)


def score_request(
    *,
    text: str | None,
    messages: Messages | None,
    token_ids: Sequence[int] | None,
    stage: Stage | str,
    tokens: bool,
    attribution: bool,
    policy: str,
    tokenizer_fingerprint: str | None,
    caller: str | None,
    model: str | None,
) -> pb.ScoreRequest:
    """The arguments of `score` on the wire; InvalidRequestError for what cannot be sent."""
    return requests.score_request_to_wire(
        ScoreRequest(
            text=text,
            messages=None if messages is None else message_records(messages),
            token_ids=None if token_ids is None else tuple(token_ids),
            tokenizer_fingerprint=tokenizer_fingerprint,
            stage=stage_record(stage),
            policy=policy,
            want_tokens=tokens,
            want_attribution=attribution,
            caller=caller,
            model=model,
        )
    )


def stage_record(stage: Stage | str) -> Stage:
    """The stage by name; InvalidRequestError for another."""
    try:
        return Stage(stage)
    except ValueError:
        raise InvalidRequestError("stage", repr(stage), "prompt or completion") from None
