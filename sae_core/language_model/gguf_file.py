"""The GGUF container: metadata and tensors of a file, tensors dequantized on demand.

Knows the file format (versions 2 and 3, little endian), not what any key or tensor means. The
blocks of quantized tensors are decoded by the `gguf` package.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_core.errors import ModelLoadError

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
"""GGUF's metadata value types -> struct formats; strings and arrays apart."""

_BLOCK_ELEMENTS = 1 << 22
"""Values dequantized at a time; keeps the temporaries of the largest tensor to tens of MB."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies in the file."""

    shape: tuple[int, ...]
    """In the order of torch and NumPy, the slowest axis first."""
    ggml_type: int
    offset: int
    """From the start of the file."""


class GGUFFile:
    """An open GGUF file; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{path}: cannot be read ({error})") from error
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._read_header()
        except ModelLoadError:
            self._data.close()
            raise
        except (struct.error, ValueError, LookupError, ArithmeticError, MemoryError) as error:
            self._data.close()
            raise ModelLoadError(f"{path}: damaged GGUF header ({error})") from error

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._data.close()

    def blocks(self, name: str) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """A tensor in float32, some rows at a time: the first row's index, and the rows.

        Raises:
            ModelLoadError: The tensor is cut off, or of a type that is not known here.
        """
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        info = self.tensors[name]
        try:
            kind = GGMLQuantizationType(info.ggml_type)
            block_size, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise ModelLoadError(
                f"{self.path}: tensor {name} has GGML type {info.ggml_type}, which is not known"
            ) from error
        width = info.shape[-1]
        n_rows = prod(info.shape[:-1])
        row_bytes = width // block_size * block_bytes
        if width % block_size or info.offset + n_rows * row_bytes > len(self._data):
            raise ModelLoadError(f"{self.path}: tensor {name} is cut off or misshapen")
        step = max(1, _BLOCK_ELEMENTS // width)
        for first in range(0, n_rows, step):
            stop = min(first + step, n_rows)
            start = info.offset + first * row_bytes
            raw = np.frombuffer(self._data[start : start + (stop - first) * row_bytes], np.uint8)
            try:
                rows = dequantize(raw.reshape(stop - first, row_bytes), kind)
            except NotImplementedError as error:
                raise ModelLoadError(
                    f"{self.path}: tensor {name} is {kind.name}, which the gguf package "
                    "cannot dequantize"
                ) from error
            yield first, np.require(rows, np.float32, "W").reshape(stop - first, width)

    def _read_header(self) -> None:
        magic, version, n_tensors, n_keys = struct.unpack_from("<4sIQQ", self._data)
        if magic != b"GGUF" or version not in (2, 3):
            raise ModelLoadError(
                f"{self.path}: found {magic!r} version {version}, expected b'GGUF' version 2 or 3"
            )
        at = 24
        for _ in range(n_keys):
            key, at = self._string(at)
            (kind,) = struct.unpack_from("<I", self._data, at)
            self.metadata[key], at = self._value(kind, at + 4)
        found: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(n_tensors):
            name, at = self._string(at)
            (n_axes,) = struct.unpack_from("<I", self._data, at)
            axes = struct.unpack_from(f"<{n_axes}Q", self._data, at + 4)
            ggml_type, offset = struct.unpack_from("<IQ", self._data, at + 4 + 8 * n_axes)
            at += 16 + 8 * n_axes
            if not axes or 0 in axes:
                raise IndexError(f"tensor {name} has shape {list(axes)}")
            found.append((name, tuple(reversed(axes)), ggml_type, offset))
        alignment = int(self.metadata.get("general.alignment", 32))
        data_start = -(-at // alignment) * alignment
        self.tensors = {
            name: TensorInfo(shape, kind, data_start + offset)
            for name, shape, kind, offset in found
        }

    def _string(self, at: int) -> tuple[str, int]:
        (length,) = struct.unpack_from("<Q", self._data, at)
        stop = at + 8 + length
        if stop > len(self._data):
            raise IndexError(f"a string of {length} bytes at byte {at}")
        return self._data[at + 8 : stop].decode("utf-8"), stop

    def _value(self, kind: int, at: int) -> tuple[Any, int]:
        if kind == _STRING:
            return self._string(at)
        if kind != _ARRAY:
            form = _SCALARS[kind]
            return struct.unpack_from(form, self._data, at)[0], at + struct.calcsize(form)
        element, count = struct.unpack_from("<IQ", self._data, at)
        at += 12
        if element in _SCALARS:
            form = f"<{count}{_SCALARS[element][1]}"
            return list(struct.unpack_from(form, self._data, at)), at + struct.calcsize(form)
        values = []
        for _ in range(count):
            value, at = self._value(element, at)
            values.append(value)
        return values, at
