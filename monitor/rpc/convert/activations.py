"""What callers of ScoreActivations send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from monitor.errors import InvalidRequestError
from monitor.records import (
    ActivationDtype,
    ActivationsChunk,
    ActivationsOpen,
    ActivationTensor,
    Stage,
)
from monitor.rpc.convert import enums
from monitor.rpc.convert.requests import text_to_wire, token_ids_to_wire
from protos.saemonitor.v1 import monitor_pb2 as pb

DTYPES: Mapping[ActivationDtype, pb.ActivationDtype.ValueType] = {
    ActivationDtype.FLOAT32: pb.ACTIVATION_DTYPE_FLOAT32,
    ActivationDtype.BFLOAT16: pb.ACTIVATION_DTYPE_BFLOAT16,
    ActivationDtype.FLOAT16: pb.ACTIVATION_DTYPE_FLOAT16,
}


def activations_open_to_wire(opening: ActivationsOpen) -> pb.ScoreActivationsRequest:
    """The first message; InvalidRequestError for what cannot be written."""
    wire = pb.ActivationsOpen(
        model_digest=text_to_wire("model_digest", opening.model_digest),
        n_tokens=opening.n_tokens,
        tensors=[
            pb.ActivationTensor(
                hook_point=text_to_wire(f"tensors[{index}].hook_point", tensor.hook_point),
                dtype=DTYPES[tensor.dtype],
                width=tensor.width,
            )
            for index, tensor in enumerate(opening.tensors)
        ],
        tokenizer_fingerprint=text_to_wire(
            "tokenizer_fingerprint", opening.tokenizer_fingerprint or ""
        ),
        stage=enums.STAGES[opening.stage],
        stages=[enums.stage_to_wire(stage) for stage in opening.stages],
        policy=text_to_wire("policy", opening.policy),
        want_tokens=opening.want_tokens,
        want_attribution=opening.want_attribution,
        caller=text_to_wire("caller", opening.caller or ""),
    )
    if opening.token_ids is not None:
        wire.token_ids.SetInParent()
        wire.token_ids.ids.extend(token_ids_to_wire("token_ids", opening.token_ids))
    return pb.ScoreActivationsRequest(open=wire)


def activations_open_from_wire(wire: pb.ScoreActivationsRequest) -> ActivationsOpen:
    """Raises InvalidRequestError when the first message is not `open`, or for an unknown enum."""
    kind = wire.WhichOneof("message")
    if kind != "open":
        raise InvalidRequestError("first activations message", kind or "none", "open")
    opening = wire.open
    return ActivationsOpen(
        model_digest=opening.model_digest,
        n_tokens=opening.n_tokens,
        tensors=tuple(
            ActivationTensor(
                hook_point=tensor.hook_point,
                dtype=_dtype(f"tensors[{index}].dtype", tensor.dtype),
                width=tensor.width,
            )
            for index, tensor in enumerate(opening.tensors)
        ),
        token_ids=tuple(opening.token_ids.ids) if opening.HasField("token_ids") else None,
        tokenizer_fingerprint=opening.tokenizer_fingerprint or None,
        stage=enums.requested_stage(opening.stage, Stage.PROMPT),
        stages=_stages(opening.stages),
        policy=opening.policy or "default",
        want_tokens=opening.want_tokens,
        want_attribution=opening.want_attribution,
        caller=opening.caller or None,
    )


def activations_chunk_to_wire(chunk: ActivationsChunk) -> pb.ScoreActivationsRequest:
    """Field by field."""
    return pb.ScoreActivationsRequest(
        chunk=pb.ActivationsChunk(
            tensor=chunk.tensor, start_row=chunk.start_row, rows=chunk.n_rows, data=chunk.data
        )
    )


def activations_chunk_from_wire(wire: pb.ScoreActivationsRequest) -> ActivationsChunk:
    """A message after the first; a second `open` is InvalidRequestError."""
    kind = wire.WhichOneof("message")
    if kind != "chunk":
        raise InvalidRequestError("activations message after the first", kind or "none", "chunk")
    return ActivationsChunk(
        tensor=wire.chunk.tensor,
        start_row=wire.chunk.start_row,
        n_rows=wire.chunk.rows,
        data=wire.chunk.data,
    )


def _dtype(field: str, number: int) -> ActivationDtype:
    for dtype, known in DTYPES.items():
        if known == number:
            return dtype
    names = ", ".join(f"{pb.ActivationDtype.Name(known)} ({known})" for known in DTYPES.values())
    raise InvalidRequestError(field, str(number), f"one of {names}")


def _stages(numbers: Sequence[int]) -> tuple[Stage | None, ...]:
    known: dict[int, Stage | None] = {number: stage for stage, number in enums.STAGES.items()}
    known[pb.STAGE_UNSPECIFIED] = None
    for index, number in enumerate(numbers):
        if number not in known:
            raise InvalidRequestError(
                f"stages[{index}]",
                str(number),
                "STAGE_UNSPECIFIED (0), _PROMPT (1), _COMPLETION (2)",
            )
    return tuple(known[number] for number in numbers)
