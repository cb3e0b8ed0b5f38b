"""Requests from JSON lines, and from any other table whose rows have the same keys.

A row has exactly one of `text`, `messages` (objects with `role` and `content`) and `token_ids`
(with `tokenizer_fingerprint`), and may have `id`, `kind` (`completion`, else the row is a prompt)
and `policy`. Other keys are let through and not read. A row that cannot be read becomes one that
says why.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from monitor.errors import InvalidRequestError, MonitorError
from monitor.records import Message, ScoreRequest, Stage

INPUT_KEYS = ("text", "messages", "token_ids")
ROW_KEYS = (*INPUT_KEYS, "tokenizer_fingerprint", "id", "kind", "policy")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRow:
    """One row of an input."""

    id: str | int
    """The row's own, else its number."""
    number: int
    """Of the line or row in its file, from 1."""
    request: ScoreRequest | MonitorError
    """What to score, or why the row cannot be."""


def read_lines(
    lines: Iterable[str | bytes], *, policy: str, want_tokens: bool = False, first: int = 1
) -> Iterator[RequestRow]:
    """The rows of JSON lines; empty lines are none.

    Args:
        policy: judges the rows that name none.
        first: number of the first line.
    """
    for number, line in enumerate(lines, start=first):
        if line.strip():
            yield _line(number, line, policy, want_tokens)


def row_of(
    content: Mapping[str, Any], number: int, *, policy: str, want_tokens: bool = False
) -> RequestRow:
    """The row of a mapping, as one line of JSON holds it."""
    row_id = content.get("id")
    row_id = number if row_id is None else row_id
    try:
        request: ScoreRequest | MonitorError = _request(content, number, policy, want_tokens)
    except InvalidRequestError as error:
        request = error
    return RequestRow(id=row_id, number=number, request=request)


def _line(number: int, line: str | bytes, policy: str, want_tokens: bool) -> RequestRow:
    def refused(found: str) -> RequestRow:
        error = InvalidRequestError(f"line {number}", found, "a JSON object")
        return RequestRow(id=number, number=number, request=error)

    try:
        content = json.loads(line)
    except ValueError as error:
        return refused(str(error))
    if not isinstance(content, dict):
        return refused(type(content).__name__)
    return row_of(content, number, policy=policy, want_tokens=want_tokens)


def _request(
    content: Mapping[str, Any], number: int, policy: str, want_tokens: bool
) -> ScoreRequest:
    own = content.get("policy")
    if own is not None and not isinstance(own, str):
        raise InvalidRequestError(f"row {number}, policy", repr(own)[:40], "the name of a policy")
    text, messages, ids = (content.get(key) for key in INPUT_KEYS)
    stage = Stage.COMPLETION if content.get("kind") == "completion" else Stage.PROMPT
    if isinstance(text, str):
        return ScoreRequest(text=text, stage=stage, policy=own or policy, want_tokens=want_tokens)
    if isinstance(messages, list) and all(_is_message(m) for m in messages):
        turns = tuple(Message(role=m["role"], content=m["content"]) for m in messages)
        return ScoreRequest(messages=turns, policy=own or policy, want_tokens=want_tokens)
    if isinstance(ids, list) and all(type(i) is int for i in ids):
        return ScoreRequest(
            token_ids=tuple(ids),
            tokenizer_fingerprint=content.get("tokenizer_fingerprint"),
            stage=stage,
            policy=own or policy,
            want_tokens=want_tokens,
        )
    raise InvalidRequestError(
        f"row {number}",
        f"keys {', '.join(sorted(content))}" if content else "no keys",
        "`text` (a string), `messages` (objects with role and content) or `token_ids` (integers)",
    )


def _is_message(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )
