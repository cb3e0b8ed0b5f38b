"""Arrays as the messages of ScoreActivations. Knows NumPy, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monitor.client.calls import stage_record
from monitor.errors import InvalidRequestError
from monitor.records import (
    ActivationDtype,
    ActivationsChunk,
    ActivationsOpen,
    ActivationTensor,
    Stage,
)
from monitor.rpc.convert import activations as convert
from protos.saemonitor.v1 import monitor_pb2 as pb

CHUNK_BYTES = 1024 * 1024
"""Bytes of rows in one message: a quarter of the server's default limit."""

DTYPES: Mapping[str, ActivationDtype] = {
    "float32": ActivationDtype.FLOAT32,
    "float16": ActivationDtype.FLOAT16,
    "uint16": ActivationDtype.BFLOAT16,  # its bits
    "bfloat16": ActivationDtype.BFLOAT16,  # of ml_dtypes
}
"""By the names of NumPy's types."""


class Upload:
    """The messages of one call, made anew for every attempt.

    Args:
        activations: by hook point, [n_tokens, width]; see `MonitorClient.score_activations`.

    Raises:
        InvalidRequestError: arrays, ids or stages that cannot be sent.
    """

    def __init__(
        self,
        activations: Mapping[str, NDArray[Any]],
        *,
        model_digest: str,
        token_ids: Sequence[int] | None,
        tokenizer_fingerprint: str | None,
        stage: Stage | str,
        stages: Sequence[Stage | str | None],
        tokens: bool,
        attribution: bool,
        policy: str,
        caller: str | None,
    ) -> None:
        tensors = [_tensor(place, acts) for place, acts in activations.items()]
        lengths = {place: len(acts) for place, acts in activations.items()}
        if len(set(lengths.values())) != 1:
            found = ", ".join(f"{n} rows at {place}" for place, n in lengths.items())
            raise InvalidRequestError("activations", found or "none", "as many rows everywhere")
        self._rows = list(zip(tensors, map(_little_endian, activations.values()), strict=True))
        self._opening = convert.activations_open_to_wire(
            ActivationsOpen(
                model_digest=model_digest,
                n_tokens=next(iter(lengths.values())),
                tensors=tuple(tensors),
                token_ids=None if token_ids is None else tuple(token_ids),
                tokenizer_fingerprint=tokenizer_fingerprint,
                stage=stage_record(stage),
                stages=tuple(None if s is None else stage_record(s) for s in stages),
                policy=policy,
                want_tokens=tokens,
                want_attribution=attribution,
                caller=caller,
            )
        )

    def messages(self) -> Iterator[pb.ScoreActivationsRequest]:
        """The opening, then tensor after tensor."""
        yield self._opening
        for index, (tensor, acts) in enumerate(self._rows):
            n_rows = max(1, CHUNK_BYTES // max(1, tensor.width * tensor.dtype.n_bytes))
            for start in range(0, len(acts), n_rows):
                rows = acts[start : start + n_rows]
                yield convert.activations_chunk_to_wire(
                    ActivationsChunk(
                        tensor=index, start_row=start, n_rows=len(rows), data=rows.tobytes()
                    )
                )


def _tensor(hook_point: str, acts: NDArray[Any]) -> ActivationTensor:
    field = f"activations[{hook_point!r}]"
    if not isinstance(acts, np.ndarray) or acts.ndim != 2:
        shape = list(acts.shape) if isinstance(acts, np.ndarray) else type(acts).__name__
        raise InvalidRequestError(field, str(shape), "a NumPy array [n_tokens, width]")
    if acts.dtype.name not in DTYPES:
        raise InvalidRequestError(
            field, acts.dtype.name, "float32, float16, or uint16 with the bits of bfloat16"
        )
    return ActivationTensor(
        hook_point=hook_point, dtype=DTYPES[acts.dtype.name], width=acts.shape[1]
    )


def _little_endian(acts: NDArray[Any]) -> NDArray[Any]:
    if acts.dtype.name == "bfloat16":
        acts = acts.view(np.uint16)
    return acts.astype(acts.dtype.newbyteorder("<"), copy=False)
