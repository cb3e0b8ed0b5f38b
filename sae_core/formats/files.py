"""What checkpoints are made of: JSON, safetensors, npz and torch files, opened without reading.

Errors name the file, the key, what was found and what was expected. Torch files are unpickled
with `weights_only=True` and nothing else: a checkpoint is data.
"""

from __future__ import annotations

import json
import pickle
import struct
import tokenize
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_core.errors import SAEFormatError
from sae_core.stored import DAMAGED_ARCHIVE, InMemory, Mapped, OpenMember, Stored, Streamed

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
DAMAGED_TORCH = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
)
"""What `torch.load` raises for damaged bytes; the second half comes out of its unpickler as is."""
NPY_DTYPES = {"<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16}


class Cfg:
    """A JSON object whose keys are checked as they are asked for."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path, self.values, self._prefix = path, values, prefix

    def error(self, key: str, expected: str) -> SAEFormatError:
        """The error for a key that is not what was expected."""
        found = f"{self.values[key]!r:.200}" if key in self.values else "no such key"
        return SAEFormatError(
            f"{self.path}: {self._prefix}{key}: found {found}, expected {expected}"
        )

    def count(self, key: str) -> int:
        """A whole number from 1."""
        value = self.values.get(key)
        if type(value) is not int or value < 1:
            raise self.error(key, "a whole number from 1")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false; `default` stands for a missing key, None for an error."""
        value = self.values.get(key, default)
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        value = self.values.get(key)
        if type(value) not in (int, float) or not np.isfinite(cast(float, value)):
            raise self.error(key, "a finite number")
        return float(cast(float, value))

    def one_of(self, key: str, expected: Iterable[str]) -> str:
        """One of some strings."""
        value = self.values.get(key)
        if not isinstance(value, str) or value not in expected:
            raise self.error(key, f"one of {', '.join(expected)}")
        return value

    def text(self, key: str) -> str | None:
        """A string, None where the key is missing or null."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def mapping(self, key: str) -> Cfg:
        """A nested object."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return Cfg(self.path, value, f"{self._prefix}{key}.")


def read_cfg(path: Path) -> Cfg:
    """The JSON object in `path`."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SAEFormatError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise SAEFormatError(f"{path}: found {type(values).__name__}, expected a JSON object")
    return Cfg(path, values)


@dataclass(frozen=True, slots=True)
class Tensors:
    """The tensors of one file, by name, unread; asked for by name and checked."""

    path: Path
    by_name: Mapping[str, Stored]

    def __contains__(self, name: str) -> bool:
        return name in self.by_name

    def __getitem__(self, name: str) -> Stored:
        if name not in self.by_name:
            raise SAEFormatError(
                f"{self.path}: tensors: found {_some(self.by_name)}, expected one named {name}"
            )
        return self.by_name[name]

    def shape(self, name: str, n_axes: int) -> tuple[int, ...]:
        """The shape of a tensor that must have `n_axes` axes."""
        shape = self[name].shape
        if len(shape) != n_axes:
            raise SAEFormatError(
                f"{self.path}: {name}: found shape {list(shape)}, expected {n_axes} axes"
            )
        return shape

    def scalar(self, name: str) -> float:
        """The one number of a tensor without axes, or of length 1."""
        stored = self[name]
        if stored.shape not in ((), (1,)):
            raise SAEFormatError(
                f"{self.path}: {name}: found shape {list(stored.shape)}, expected one number"
            )
        return float(stored.read())

    def only(self, expected: Iterable[str], optional: Iterable[str] = ()) -> None:
        """Refuses the file unless it has every expected tensor, and no other but optional ones.

        A tensor that nobody reads would be part of a formula that is not computed.
        """
        wanted = set(expected)
        missing = wanted - self.by_name.keys()
        unknown = self.by_name.keys() - wanted - set(optional)
        if missing or unknown:
            raise SAEFormatError(
                f"{self.path}: tensors: found {_some(self.by_name)}, "
                f"expected {', '.join(sorted(wanted))}"
            )


def open_safetensors(path: Path) -> Tensors:
    """The floating-point tensors of a safetensors file; only its header is read."""
    try:
        with safe_open(path, framework="np") as file:  # checks the header against the file's size
            names = list(file.keys())
        with path.open("rb") as raw:
            n_header = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(n_header))
    except (OSError, SafetensorError, ValueError) as error:
        raise SAEFormatError(f"{path}: cannot be read as safetensors: {error}") from error
    found: dict[str, Stored] = {}
    for name in names:
        entry = header[name]
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise SAEFormatError(f"{path}: {name}: found {entry['dtype']}, expected floating point")
        found[name] = Mapped(
            path=path,
            name=f"{path}: {name}",
            dtype=dtype,
            shape=tuple(entry["shape"]),
            offset=8 + n_header + entry["data_offsets"][0],
        )
    return Tensors(path, found)


def open_npz(path: Path) -> Tensors:
    """The floating-point arrays of an npz file; only headers are read.

    Arrays that were stored are mapped; compressed ones have to be read through.
    """
    found: dict[str, Stored] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename.endswith(".npy"):
                    name = info.filename.removesuffix(".npy")
                    found[name] = _npy(path, archive, info, name)
    except (*DAMAGED_ARCHIVE, SyntaxError, tokenize.TokenError) as error:
        raise SAEFormatError(f"{path}: cannot be read as npz: {error}") from error
    return Tensors(path, found)


def _npy(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Stored:
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise SAEFormatError(
                f"{path}: {name}: found npy version {version}, expected 1.0 or 2.0"
            )
        shape, is_fortran, number = read_header(member)
        n_header = member.tell()
    dtype = NPY_DTYPES.get(number.str)
    if dtype is None:
        raise SAEFormatError(f"{path}: {name}: found {number}, expected floating point")
    title, stored_shape = f"{path}: {name}", shape[::-1] if is_fortran else shape
    stored: Stored
    if info.compress_type == zipfile.ZIP_STORED:
        offset = _data_offset(path, info) + n_header
        stored = Mapped(path=path, name=title, dtype=dtype, shape=stored_shape, offset=offset)
    else:
        opener = _open_member(path, info.filename, n_header)
        stored = Streamed(name=title, dtype=dtype, shape=stored_shape, open=opener)
    return stored.T if is_fortran else stored


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: its local header repeats name and extra field."""
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        lengths = file.read(4)
    n_name, n_extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
    return info.header_offset + 30 + n_name + n_extra


def _open_member(path: Path, member: str, n_header: int) -> OpenMember:
    def opener() -> BufferedIOBase:
        with zipfile.ZipFile(path) as archive:  # an open member keeps the file open
            file = archive.open(member)
        file.read(n_header)
        assert isinstance(file, BufferedIOBase)
        return file

    return opener


def load_torch(path: Path) -> Mapping[str, Any]:
    """The mapping in a `.pt` file, its tensors mapped where the file allows it.

    SAEFormatError where the file holds more than tensors and plain values: that is code.
    """
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):  # files from before torch 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED_TORCH as error:
        reason = " ".join(str(error).split())[:200]
        raise SAEFormatError(
            f"{path}: cannot be read as tensors and plain values only: {reason}"
        ) from error
    if not isinstance(content, dict):
        raise SAEFormatError(f"{path}: found {type(content).__name__}, expected a mapping")
    if other := [key for key in content if not isinstance(key, str)]:
        raise SAEFormatError(f"{path}: found the key {other[0]!r:.200}, expected names")
    return content


def torch_tensors(path: Path, content: Mapping[str, Any]) -> Tensors:
    """The floating-point tensors of a mapping, by name; what is something else is left out."""
    found: dict[str, Stored] = {
        name: InMemory(value, f"{path}: {name}")
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor) and value.is_floating_point()
    }
    return Tensors(path, found)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 12} more" if len(listed) > 12 else ""
    return (", ".join(listed[:12]) or "none") + more
