from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from monitor.activations import ActivationsBuffer
from monitor.errors import ForeignActivationsError, InvalidRequestError, StreamPositionError
from monitor.records import ActivationDtype, ActivationsChunk, ActivationsOpen, ActivationTensor
from sae_core.activation_source import GivenRows
from sae_core.hook_points import parse_hook_point

EARLY, LATE = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
WIDTHS = {parse_hook_point(EARLY): 3, parse_hook_point(LATE): 4}


def tensor(hook_point: str, width: int, dtype: str = "float32") -> ActivationTensor:
    return ActivationTensor(hook_point=hook_point, dtype=ActivationDtype(dtype), width=width)


OPENED = ActivationsOpen(
    model_digest="d", n_tokens=5, tensors=(tensor(LATE, 4), tensor(EARLY, 3, "bfloat16"))
)


def chunk(index: int, start: int, rows: np.ndarray, **changes: Any) -> ActivationsChunk:
    made = ActivationsChunk(
        tensor=index, start_row=start, n_rows=len(rows), data=np.ascontiguousarray(rows).tobytes()
    )
    return replace(made, **changes)


def late() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(5, 4)).astype("<f4")


def early() -> tuple[np.ndarray, torch.Tensor]:
    """Bits of bfloat16, and what they mean."""
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(2)).bfloat16()
    return values.view(torch.uint16).numpy().astype("<u2"), values


def tensors(part: GivenRows) -> Mapping[str, torch.Tensor]:
    devices = dict.fromkeys(part.acts, torch.device("cpu"))
    return {str(place): t for place, t in part.tensors(devices).items()}


def test_tensors_that_take_turns_are_put_together() -> None:
    buffer = ActivationsBuffer(OPENED, WIDTHS)
    bits, values = early()
    for index, start, rows in [
        (0, 0, late()[:2]),
        (1, 0, bits[:4]),
        (0, 2, late()[2:]),
        (1, 4, bits[4:]),
    ]:
        buffer.take(chunk(index, start, rows))
    given = buffer.finish()
    assert given.n_tokens == 5
    assert buffer.dtype == "bfloat16+float32"
    found = tensors(given.part(1, 4))
    assert found[LATE].dtype == torch.float32
    assert found[LATE].tolist() == late()[1:4].tolist()
    assert found[EARLY].dtype == torch.bfloat16
    assert torch.equal(found[EARLY], values[1:4])


def test_float16_is_read_as_float16() -> None:
    opened = replace(OPENED, n_tokens=1, tensors=(tensor(LATE, 4, "float16"),))
    buffer = ActivationsBuffer(opened, {parse_hook_point(LATE): 4})
    rows = np.array([[1.5, -2.0, 6.1035e-05, 65504.0]], "<f2")
    buffer.take(chunk(0, 0, rows))
    found = tensors(buffer.finish().part(0, 1))[LATE]
    assert found.dtype == torch.float16
    assert found.tolist() == rows.tolist()


@pytest.mark.parametrize(
    ("tensors", "cls", "message"),
    [
        (
            (tensor(EARLY, 3),),
            InvalidRequestError,
            f"tensors: found {EARLY}, expected {LATE} too",
        ),
        ((), InvalidRequestError, f"tensors: found none, expected {EARLY}, {LATE} too"),
        (
            (tensor(EARLY, 3), tensor(EARLY, 3)),
            InvalidRequestError,
            rf"tensors\[1\].hook_point: found {EARLY} twice, expected each",
        ),
        (
            (tensor(EARLY, 3), tensor(LATE, 5)),
            InvalidRequestError,
            rf"tensors\[1\].width: found 5 at {LATE}, expected 4",
        ),
        (
            (tensor("layer 3, please", 3),),
            InvalidRequestError,
            r"tensors\[0\].hook_point: found 'layer 3, please', expected one of",
        ),
        (
            (tensor("blocks.0.hook_resid_pre", 3),),
            ForeignActivationsError,
            r"tensors\[0\].hook_point: found blocks.0.hook_resid_pre, .* expected blocks",
        ),
    ],
)
def test_tensors_that_the_bundle_does_not_ask_for_are_refused(
    tensors: tuple[ActivationTensor, ...], cls: type[Exception], message: str
) -> None:
    with pytest.raises(cls, match=message):
        ActivationsBuffer(replace(OPENED, tensors=tensors), WIDTHS)


def poisoned(value: float) -> np.ndarray:
    rows = late()[2:4].copy()
    rows[1, 3] = value
    return rows


@pytest.mark.parametrize(
    ("bad", "cls", "message"),
    [
        (chunk(2, 0, late()), InvalidRequestError, "chunk.tensor: found 2, expected 0 <= tensor"),
        (
            chunk(0, 3, late()[3:]),
            StreamPositionError,
            f"chunk.start_row: found 3 for {LATE}, expected 2",
        ),
        (
            chunk(0, 1, late()[1:]),
            StreamPositionError,
            f"chunk.start_row: found 1 for {LATE}, expected 2",
        ),
        (chunk(0, 2, late()[:0]), InvalidRequestError, "chunk.rows: found 0 .* expected 1 to 3"),
        (chunk(0, 2, late()[:4]), InvalidRequestError, "chunk.rows: found 4 .* expected 1 to 3"),
        (
            chunk(0, 2, late()[2:4], data=late()[2:4].tobytes()[:-1]),
            InvalidRequestError,
            rf"chunk.data: found 31 bytes for {LATE}, expected 32 \(2 rows of 4 float32\)",
        ),
        (
            chunk(1, 0, late()[:2]),
            InvalidRequestError,
            rf"chunk.data: found 32 bytes for {EARLY}, expected 12 \(2 rows of 3 bfloat16\)",
        ),
        (
            chunk(0, 2, poisoned(np.nan)),
            InvalidRequestError,
            f"chunk.data: found NaN or infinity in row 3, column 3 of {LATE}, expected finite",
        ),
        (chunk(0, 2, poisoned(-np.inf)), InvalidRequestError, "row 3, column 3"),
        (
            chunk(1, 0, np.array([[0x7F7F, 0x7F80, 0]], "<u2")),
            InvalidRequestError,
            f"row 0, column 1 of {EARLY}",
        ),
        (
            chunk(1, 0, np.array([[0xFF7F, 0, 0xFFC1]], "<u2")),
            InvalidRequestError,
            f"row 0, column 2 of {EARLY}",
        ),
    ],
)
def test_a_bad_chunk_is_named_and_changes_nothing(
    bad: ActivationsChunk, cls: type[Exception], message: str
) -> None:
    buffer = ActivationsBuffer(OPENED, WIDTHS)
    buffer.take(chunk(0, 0, late()[:2]))
    with pytest.raises(cls, match=message):
        buffer.take(bad)
    buffer.take(chunk(0, 2, late()[2:]))
    buffer.take(chunk(1, 0, early()[0]))
    assert tensors(buffer.finish().part(0, 5))[LATE].tolist() == late().tolist()


def test_rows_that_never_came_are_named() -> None:
    buffer = ActivationsBuffer(OPENED, WIDTHS)
    buffer.take(chunk(0, 0, late()))
    buffer.take(chunk(1, 0, early()[0][:2]))
    with pytest.raises(
        InvalidRequestError, match=rf"tensors\[1\]: found 2 rows of {EARLY}, expected 5"
    ):
        buffer.finish()
