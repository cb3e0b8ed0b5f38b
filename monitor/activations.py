"""The caller's activations, chunk by chunk: checked, and put together for the engine.

Knows bytes and NumPy, no torch and no protobuf. Everything that is wrong with them is said here,
before they cost a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monitor.errors import ForeignActivationsError, InvalidRequestError, StreamPositionError
from monitor.records import ActivationDtype, ActivationsChunk, ActivationsOpen
from sae_core.activation_source import GivenActivations
from sae_core.errors import HookPointError
from sae_core.hook_points import HookPoint, parse_hook_point

WIRE_DTYPES: Mapping[ActivationDtype, np.dtype[np.generic]] = {
    ActivationDtype.FLOAT32: np.dtype("<f4"),
    ActivationDtype.BFLOAT16: np.dtype("<u2"),
    ActivationDtype.FLOAT16: np.dtype("<f2"),
}
"""How each type is read; NumPy has no bfloat16, whose bits are kept."""

BFLOAT16_EXPONENT = 0x7F80
"""Bits of the exponent; all of them set is NaN or infinity."""


class ActivationsBuffer:
    """The tensors of one request, filled in order of row.

    Args:
        widths: how wide the activations are at every hook point that the bundle reads.

    Raises:
        InvalidRequestError: a tensor is missing, given twice, too wide or too narrow, or its hook
            point cannot be parsed.
        ForeignActivationsError: a hook point that the bundle does not read.
    """

    def __init__(self, opened: ActivationsOpen, widths: Mapping[HookPoint, int]) -> None:
        self._n_tokens = opened.n_tokens
        self._tensors = opened.tensors
        self._places = _places(opened, widths)
        # Memory is taken when rows are written, not here.
        self._acts: list[NDArray[Any]] = [
            np.empty((opened.n_tokens, t.width), WIRE_DTYPES[t.dtype].newbyteorder("="))
            for t in opened.tensors
        ]
        self._n_rows = [0] * len(opened.tensors)

    @property
    def dtype(self) -> str:
        """The types of all tensors, as provenance names them."""
        return "+".join(sorted({tensor.dtype.value for tensor in self._tensors}))

    @property
    def is_full(self) -> bool:
        """Whether every row of every tensor is there."""
        return all(n_rows == self._n_tokens for n_rows in self._n_rows)

    def take(self, chunk: ActivationsChunk) -> None:
        """Takes the next rows of one tensor.

        Raises:
            StreamPositionError: a gap, or rows that were sent before.
            InvalidRequestError: no such tensor or row, bytes too many or too few, NaN or infinity.
        """
        if not 0 <= chunk.tensor < len(self._tensors):
            raise InvalidRequestError(
                "chunk.tensor", str(chunk.tensor), f"0 <= tensor < {len(self._tensors)}"
            )
        tensor, place = self._tensors[chunk.tensor], self._places[chunk.tensor]
        start, stop = self._n_rows[chunk.tensor], self._n_rows[chunk.tensor] + chunk.n_rows
        if chunk.start_row != start:
            raise StreamPositionError(
                f"chunk.start_row: found {chunk.start_row} for {place}, expected {start} "
                "(its rows sent so far)"
            )
        if not 1 <= chunk.n_rows <= self._n_tokens - start:
            raise InvalidRequestError(
                "chunk.rows",
                f"{chunk.n_rows} for {place}",
                f"1 to {self._n_tokens - start} (n_tokens, less its rows sent so far)",
            )
        n_bytes = chunk.n_rows * tensor.width * tensor.dtype.n_bytes
        if len(chunk.data) != n_bytes:
            raise InvalidRequestError(
                "chunk.data",
                f"{len(chunk.data)} bytes for {place}",
                f"{n_bytes} ({chunk.n_rows} rows of {tensor.width} {tensor.dtype.value})",
            )
        rows = np.frombuffer(chunk.data, WIRE_DTYPES[tensor.dtype])
        rows = rows.reshape(chunk.n_rows, tensor.width)
        finite = _finite(rows, tensor.dtype)
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            raise InvalidRequestError(
                "chunk.data",
                f"NaN or infinity in row {start + row}, column {column} of {place}",
                "finite numbers",
            )
        self._acts[chunk.tensor][start:stop] = rows
        self._n_rows[chunk.tensor] = stop

    def finish(self) -> GivenActivations:
        """All of it; InvalidRequestError where rows are missing."""
        for index, n_rows in enumerate(self._n_rows):
            if n_rows < self._n_tokens:
                raise InvalidRequestError(
                    f"tensors[{index}]",
                    f"{n_rows} rows of {self._places[index]}",
                    f"{self._n_tokens} (n_tokens)",
                )
        return GivenActivations(self._n_tokens, dict(zip(self._places, self._acts, strict=True)))


def _places(opened: ActivationsOpen, widths: Mapping[HookPoint, int]) -> list[HookPoint]:
    expected = ", ".join(str(place) for place in widths)
    places: list[HookPoint] = []
    for index, tensor in enumerate(opened.tensors):
        field = f"tensors[{index}].hook_point"
        try:
            place = parse_hook_point(tensor.hook_point)
        except HookPointError:
            raise InvalidRequestError(
                field, repr(tensor.hook_point[:80]), f"one of {expected}"
            ) from None
        if place not in widths:
            raise ForeignActivationsError(
                f"{field}: found {place}, which the bundle does not read, expected {expected}"
            )
        if place in places:
            raise InvalidRequestError(field, f"{place} twice", "each hook point once")
        if tensor.width != widths[place]:
            raise InvalidRequestError(
                f"tensors[{index}].width",
                f"{tensor.width} at {place}",
                f"{widths[place]}, the model's",
            )
        places.append(place)
    missing = [str(place) for place in widths if place not in places]
    if missing:
        found = ", ".join(map(str, places)) or "none"
        raise InvalidRequestError("tensors", found, f"{', '.join(missing)} too")
    return places


def _finite(rows: NDArray[Any], dtype: ActivationDtype) -> NDArray[np.bool_]:
    is_bfloat16 = dtype is ActivationDtype.BFLOAT16
    finite: NDArray[np.bool_] = (
        (rows & BFLOAT16_EXPONENT) != BFLOAT16_EXPONENT if is_bfloat16 else np.isfinite(rows)
    )
    return finite
