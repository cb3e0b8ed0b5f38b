"""What callers send: the unary request and the messages of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from monitor.errors import InvalidRequestError
from monitor.records import Message, ScoreRequest, Stage, StreamOpen, StreamResume
from monitor.rpc.convert import enums
from protos.saemonitor.v1 import monitor_pb2 as pb

MAX_TOKEN_ID = 2**32 - 1
"""The wire's own bound on a token id; the vocabulary's is the pipeline's to check."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamChunk:
    """New tokens of a stream. Exactly one of `token_ids` and `text` is set."""

    start_index: int
    """Tokens sent before this chunk, or characters where text is sent."""
    token_ids: tuple[int, ...] | None = None
    text: str | None = None


class StreamSign(Enum):
    """A message of a stream that has nothing in it."""

    FLUSH = "flush"
    END = "end"


def score_request_to_wire(request: ScoreRequest) -> pb.ScoreRequest:
    """Raises InvalidRequestError unless exactly one input is set and can be written."""
    inputs = {
        "text": request.text is not None,
        "messages": request.messages is not None,
        "token_ids": request.token_ids is not None,
    }
    given = [name for name, is_set in inputs.items() if is_set]
    if len(given) != 1:
        raise InvalidRequestError(
            "input", " and ".join(given) or "none", "exactly one of text, messages, token_ids"
        )
    wire = pb.ScoreRequest(
        tokenizer_fingerprint=text_to_wire(
            "tokenizer_fingerprint", request.tokenizer_fingerprint or ""
        ),
        stage=enums.STAGES[request.stage],
        policy=text_to_wire("policy", request.policy),
        want_tokens=request.want_tokens,
        want_attribution=request.want_attribution,
        caller=text_to_wire("caller", request.caller or ""),
        model=text_to_wire("model", request.model or ""),
    )
    if request.text is not None:
        wire.text = text_to_wire("text", request.text)
    elif request.messages is not None:
        wire.messages.SetInParent()
        wire.messages.messages.extend(_messages_to_wire("messages", request.messages))
    elif request.token_ids is not None:
        wire.token_ids.SetInParent()
        wire.token_ids.ids.extend(token_ids_to_wire("token_ids", request.token_ids))
    return wire


def score_request_from_wire(wire: pb.ScoreRequest) -> ScoreRequest:
    """Raises InvalidRequestError where no input is set or the stage is unknown."""
    kind = wire.WhichOneof("input")
    if kind is None:
        raise InvalidRequestError("input", "none", "one of text, messages, token_ids")
    return ScoreRequest(
        text=wire.text if kind == "text" else None,
        messages=_messages_from_wire(wire.messages.messages) if kind == "messages" else None,
        token_ids=tuple(wire.token_ids.ids) if kind == "token_ids" else None,
        tokenizer_fingerprint=wire.tokenizer_fingerprint or None,
        stage=enums.requested_stage(wire.stage, Stage.PROMPT),
        policy=wire.policy or "default",
        want_tokens=wire.want_tokens,
        want_attribution=wire.want_attribution,
        caller=wire.caller or None,
        model=wire.model or None,
    )


def stream_open_to_wire(opening: StreamOpen) -> pb.ScoreStreamRequest:
    """The first message of a stream."""
    return pb.ScoreStreamRequest(
        open=pb.StreamOpen(
            session_id=text_to_wire("session_id", opening.session_id),
            stage=enums.STAGES[opening.stage],
            policy=text_to_wire("policy", opening.policy),
            tokenizer_fingerprint=text_to_wire(
                "tokenizer_fingerprint", opening.tokenizer_fingerprint or ""
            ),
            context_messages=_messages_to_wire("context_messages", opening.context_messages),
            want_tokens=opening.want_tokens,
            want_attribution=opening.want_attribution,
            caller=text_to_wire("caller", opening.caller or ""),
            model=text_to_wire("model", opening.model or ""),
            resumable=opening.resumable,
            resume=None if opening.resume is None else _resume_to_wire(opening.resume),
        )
    )


def stream_open_from_wire(wire: pb.ScoreStreamRequest) -> StreamOpen:
    """Raises InvalidRequestError when the stream's first message is not `open`."""
    kind = wire.WhichOneof("message")
    if kind != "open":
        raise InvalidRequestError("first stream message", kind or "none", "open")
    opening = wire.open
    return StreamOpen(
        session_id=opening.session_id,
        stage=enums.requested_stage(opening.stage, Stage.COMPLETION),
        policy=opening.policy or "default",
        tokenizer_fingerprint=opening.tokenizer_fingerprint or None,
        context_messages=_messages_from_wire(opening.context_messages),
        want_tokens=opening.want_tokens,
        want_attribution=opening.want_attribution,
        caller=opening.caller or None,
        model=opening.model or None,
        resumable=opening.resumable,
        resume=_resume_from_wire(opening.resume) if opening.HasField("resume") else None,
    )


def stream_chunk_to_wire(chunk: StreamChunk) -> pb.ScoreStreamRequest:
    """Raises InvalidRequestError unless exactly one content is set and can be written."""
    if (chunk.token_ids is None) == (chunk.text is None):
        found = "none" if chunk.text is None else "token_ids and text"
        raise InvalidRequestError("tokens.content", found, "exactly one of token_ids, text")
    tokens = pb.StreamTokens(start_index=chunk.start_index)
    if chunk.text is not None:
        tokens.text = text_to_wire("text", chunk.text)
    elif chunk.token_ids is not None:
        tokens.token_ids.SetInParent()
        tokens.token_ids.ids.extend(token_ids_to_wire("token_ids", chunk.token_ids))
    return pb.ScoreStreamRequest(tokens=tokens)


def stream_chunk_from_wire(wire: pb.ScoreStreamRequest) -> StreamChunk | StreamSign:
    """A message after the first. A second `open` is InvalidRequestError."""
    kind = wire.WhichOneof("message")
    if kind == "flush":
        return StreamSign.FLUSH
    if kind == "end":
        return StreamSign.END
    if kind != "tokens":
        raise InvalidRequestError(
            "stream message after the first", kind or "none", "one of tokens, flush, end"
        )
    content = wire.tokens.WhichOneof("content")
    if content is None:
        raise InvalidRequestError("tokens.content", "none", "one of token_ids, text")
    return StreamChunk(
        start_index=wire.tokens.start_index,
        token_ids=tuple(wire.tokens.token_ids.ids) if content == "token_ids" else None,
        text=wire.tokens.text if content == "text" else None,
    )


def _resume_to_wire(resume: StreamResume) -> pb.StreamResume:
    return pb.StreamResume(
        start_index=resume.start_index,
        processed_index=resume.processed_index,
        n_alerts=resume.n_alerts,
    )


def _resume_from_wire(wire: pb.StreamResume) -> StreamResume:
    return StreamResume(
        start_index=wire.start_index,
        processed_index=wire.processed_index,
        n_alerts=wire.n_alerts,
    )


def _messages_to_wire(field: str, messages: Sequence[Message]) -> list[pb.Message]:
    return [
        pb.Message(
            role=text_to_wire(f"{field}[{index}].role", message.role),
            content=text_to_wire(f"{field}[{index}].content", message.content),
        )
        for index, message in enumerate(messages)
    ]


def _messages_from_wire(messages: Sequence[pb.Message]) -> tuple[Message, ...]:
    return tuple(Message(role=message.role, content=message.content) for message in messages)


def text_to_wire(field: str, text: str) -> str:
    """The text; InvalidRequestError where it cannot be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            field,
            f"a lone surrogate at character {error.start}",
            "text that can be written as UTF-8",
        ) from None
    return text


def token_ids_to_wire(field: str, token_ids: Sequence[int]) -> Sequence[int]:
    """The ids; InvalidRequestError where one is beyond the wire's own bound."""
    if len(token_ids) == 0 or (min(token_ids) >= 0 and max(token_ids) <= MAX_TOKEN_ID):
        return token_ids
    index, token_id = next(
        (i, token_id) for i, token_id in enumerate(token_ids) if not 0 <= token_id <= MAX_TOKEN_ID
    )
    raise InvalidRequestError(f"{field}[{index}]", str(token_id), f"an id from 0 to {MAX_TOKEN_ID}")
