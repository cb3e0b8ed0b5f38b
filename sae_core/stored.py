"""Tensors that may still lie in a file: read whole, or only some latents of them.

A published SAE can be larger than memory while a bundle registers a few hundred of its latents.
What is taken is copied, so that the file may be replaced afterwards. Knows no checkpoint format.
"""

from __future__ import annotations

import lzma
import math
import mmap
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from sae_core.errors import SAEFormatError

WINDOW_BYTES = 2**26
"""Bytes of a file that are mapped at a time: what `take` touches beyond its result."""

NUMPY_DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float64: np.dtype("<f8"),
    torch.float32: np.dtype("<f4"),
    torch.float16: np.dtype("<f2"),
    torch.bfloat16: np.dtype("<u2"),
}
"""How each dtype lies in a file; NumPy has no bfloat16 and moves its bits."""


class Stored(ABC):
    """A floating-point tensor of one or two axes, wherever it lies."""

    name: str
    """What messages call it: the file and the tensor's name in it."""
    shape: tuple[int, ...]

    @property
    def T(self) -> Stored:
        """The same tensor with its axes exchanged; nothing is read."""
        return self if len(self.shape) < 2 else _Transposed(self)

    def read(self) -> Tensor:
        """The whole tensor as float32 in memory of its own; SAEFormatError if it cannot be had."""
        return self._checked(self._read())

    def take(self, ids: Int64[np.ndarray, " n"], axis: int) -> Tensor:
        """The rows or columns `ids`, in that order, as float32; the rest is not read."""
        return self._checked(self._take(ids, axis))

    def changed(self, change: Callable[[Tensor], Tensor]) -> Stored:
        """The same tensor with every number changed by itself, once it is read."""
        return _Changed(self, change)

    @abstractmethod
    def _read(self) -> Tensor: ...

    @abstractmethod
    def _take(self, ids: Int64[np.ndarray, " n"], axis: int) -> Tensor: ...

    def _checked(self, found: Tensor) -> Tensor:
        # A sum is finite only if all numbers are; counting takes twice their memory.
        if bool(torch.isfinite(found.sum(dtype=torch.float64))):
            return found.to(torch.float32)
        n_bad = int((~torch.isfinite(found)).sum())
        if n_bad:
            raise SAEFormatError(f"{self.name}: found {n_bad} numbers not finite, expected none")
        return found.to(torch.float32)


class InMemory(Stored):
    """A tensor that is there already, or that torch has mapped from a file."""

    def __init__(self, tensor: Tensor, name: str = "tensor") -> None:
        self._tensor = tensor.detach()
        self.name = name
        self.shape = tuple(tensor.shape)

    def _read(self) -> Tensor:
        return self._tensor.to(torch.float32, copy=True)

    def _take(self, ids: Int64[np.ndarray, " n"], axis: int) -> Tensor:
        wanted = torch.from_numpy(ids).to(self._tensor.device)
        return self._tensor.index_select(axis, wanted).to(torch.float32)


@dataclass(frozen=True, eq=False)
class Mapped(Stored):
    """A tensor at a known place of a file, row after row, mapped window by window."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    def _read(self) -> Tensor:
        n_rows, width, _ = _windowed(self.shape, NUMPY_DTYPES[self.dtype])
        out = torch.empty((n_rows, width), dtype=torch.float32)
        for start, window in self._windows():
            out[start : start + len(window)] = _as_torch(window.copy(), self.dtype).float()
        return out.reshape(self.shape)

    def _take(self, ids: Int64[np.ndarray, " n"], axis: int) -> Tensor:
        n_rows, width, _ = _windowed(self.shape, NUMPY_DTYPES[self.dtype])
        if axis == 0:
            order = np.argsort(ids, kind="stable")
            rows = torch.empty((len(ids), width), dtype=torch.float32)
            for start, window in self._windows(ids[order]):
                here = order[
                    np.searchsorted(ids[order], start) : np.searchsorted(
                        ids[order], start + len(window)
                    )
                ]
                rows[torch.from_numpy(here)] = _as_torch(
                    window[ids[here] - start], self.dtype
                ).float()
            return rows.reshape(len(ids), *self.shape[1:])
        columns = torch.empty((n_rows, len(ids)), dtype=torch.float32)
        for start, window in self._windows():
            taken = np.take(window, ids, axis=1)
            columns[start : start + len(window)] = _as_torch(taken, self.dtype).float()
        return columns

    def _windows(
        self, wanted: Int64[np.ndarray, " n"] | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Blocks of rows with the number of their first; those without `wanted` rows are left out.

        A block is valid until the next one is asked for.
        """
        number = NUMPY_DTYPES[self.dtype]
        n_rows, width, step = _windowed(self.shape, number)
        try:
            with self.path.open("rb") as file:
                for start in range(0, n_rows, step):
                    stop = min(start + step, n_rows)
                    if wanted is not None and not _any_between(wanted, start, stop):
                        continue
                    yield (
                        start,
                        _mapped(file, self.offset, number, (n_rows, width), start, stop),
                    )
        except (OSError, ValueError) as error:
            raise SAEFormatError(f"{self.name}: cannot be read: {error}") from error


DAMAGED_ARCHIVE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    lzma.LZMAError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What reading a damaged archive, or one of an unknown compression, raises."""

OpenMember = Callable[[], BufferedIOBase]
"""Opens a compressed tensor's bytes from the first number on."""


@dataclass(frozen=True, eq=False)
class Streamed(Stored):
    """A compressed tensor, which can only be read from its beginning, block by block."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    open: OpenMember

    def _read(self) -> Tensor:
        n_rows, width, _ = _windowed(self.shape, NUMPY_DTYPES[self.dtype])
        out = torch.empty((n_rows, width), dtype=torch.float32)
        for start, block in self._blocks():
            out[start : start + len(block)] = _as_torch(block, self.dtype).float()
        return out.reshape(self.shape)

    def _take(self, ids: Int64[np.ndarray, " n"], axis: int) -> Tensor:
        n_rows, width, _ = _windowed(self.shape, NUMPY_DTYPES[self.dtype])
        if axis == 0:
            rows = torch.empty((len(ids), width), dtype=torch.float32)
            for start, block in self._blocks():
                here = np.flatnonzero((ids >= start) & (ids < start + len(block)))
                taken = _as_torch(block[ids[here] - start], self.dtype)
                rows[torch.from_numpy(here)] = taken.float()
            return rows.reshape(len(ids), *self.shape[1:])
        columns = torch.empty((n_rows, len(ids)), dtype=torch.float32)
        for start, block in self._blocks():
            taken = _as_torch(block[:, ids], self.dtype)
            columns[start : start + len(block)] = taken.float()
        return columns

    def _blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        number = NUMPY_DTYPES[self.dtype]
        n_rows, width, step = _windowed(self.shape, number)
        try:
            with self.open() as file:
                for start in range(0, n_rows, step):
                    stop = min(start + step, n_rows)
                    wanted = (stop - start) * width * number.itemsize
                    data = file.read(wanted)
                    if len(data) != wanted:
                        raise SAEFormatError(
                            f"{self.name}: ends early, expected shape {self.shape}"
                        )
                    numbers = np.frombuffer(bytearray(data), number)
                    yield start, numbers.reshape(stop - start, width)
        except DAMAGED_ARCHIVE as error:
            raise SAEFormatError(f"{self.name}: cannot be read: {error}") from error


class _Transposed(Stored):
    def __init__(self, inner: Stored) -> None:
        self.inner, self.name = inner, inner.name
        self.shape = inner.shape[::-1]

    @property
    def T(self) -> Stored:
        return self.inner

    def _read(self) -> Tensor:
        return self.inner._read().T.contiguous()

    def _take(self, ids: Int64[np.ndarray, " n"], axis: int) -> Tensor:
        return self.inner._take(ids, 1 - axis).T.contiguous()


class _Changed(Stored):
    """Checked after the change only: the logarithm of 0 is a number that exp brings back."""

    def __init__(self, inner: Stored, change: Callable[[Tensor], Tensor]) -> None:
        self._inner, self._change, self.name = inner, change, inner.name
        self.shape = inner.shape

    def _read(self) -> Tensor:
        return self._change(self._inner._read())

    def _take(self, ids: Int64[np.ndarray, " n"], axis: int) -> Tensor:
        return self._change(self._inner._take(ids, axis))


def _windowed(shape: tuple[int, ...], number: np.dtype[Any]) -> tuple[int, int, int]:
    """Rows, numbers in a row, and rows that fit one window."""
    n_rows, width = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    return n_rows, width, max(1, WINDOW_BYTES // max(1, width * number.itemsize))


def _any_between(sorted_ids: Int64[np.ndarray, " n"], start: int, stop: int) -> bool:
    return bool(np.searchsorted(sorted_ids, start) < np.searchsorted(sorted_ids, stop))


def _mapped(
    file: BinaryIO,
    offset: int,
    number: np.dtype[Any],
    shape: tuple[int, int],
    start: int,
    stop: int,
) -> np.ndarray:
    """Rows `start` to `stop` of a tensor; the mapping goes when the array does."""
    width = shape[1]
    first = offset + start * width * number.itemsize
    aligned = first - first % mmap.ALLOCATIONGRANULARITY
    n_bytes = first - aligned + (stop - start) * width * number.itemsize
    if n_bytes == first - aligned:
        return np.empty((stop - start, width), number)
    memory = mmap.mmap(file.fileno(), n_bytes, prot=mmap.PROT_READ, offset=aligned)
    flat = np.frombuffer(memory, number, count=(stop - start) * width, offset=first - aligned)
    return flat.reshape(stop - start, width)


def _as_torch(numbers: np.ndarray, dtype: torch.dtype) -> Tensor:
    numbers = np.ascontiguousarray(numbers)
    if dtype == torch.bfloat16:
        return torch.from_numpy(numbers.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(numbers)
