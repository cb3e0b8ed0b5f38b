"""The tensors of a model folder's safetensors files, by the names that the module gives them.

Checkpoints keep some weights under other names and in other pieces than the module that runs (the
experts of a mixture one by one); transformers' own conversion mapping says which. Only what is
asked for is read.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from sae_core.errors import ModelLoadError
from sae_core.language_model.device_map import DeviceMap
from sae_core.language_model.tensor_parallel import Shard, shard_of

_PREFIXES = (
    "",
    "model.",
    "transformer.",
    "gpt_neox.",
    "model.language_model.",
    "language_model.model.",
    "language_model.",
)
"""Where checkpoints keep the base model: alone, under a head, or beside a vision tower."""

_MAPPED_BYTES = 64 * 2**20
"""How much of a file is read before it is let go of."""


def fill(
    module: nn.Module, model_type: str, folder: Path, *, places: DeviceMap, dtype: torch.dtype
) -> None:
    """Sets every parameter and persistent buffer of `module` from the folder's safetensors.

    Of a parameter that is split over ranks only this rank's part is read. Raises ModelLoadError
    where one is missing, misshapen or cannot be read.
    """
    files = _tensor_files(folder)
    wanted = module.state_dict()
    embedding = next(iter(wanted))
    prefix = next((p for p in _PREFIXES if p + embedding in files), None)
    if prefix is None:
        raise ModelLoadError(
            f"model folder {folder}: no tensor {embedding} under any of the known prefixes"
        )
    stored = [name.removeprefix(prefix) for name in files if name.startswith(prefix)]
    sources = _sources(stored, model_type)
    missing = [prefix + name for name in wanted if name not in sources]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelLoadError(f"model folder {folder}: missing tensor {missing[0]}{more}")
    tensors: dict[str, Tensor] = {}
    with _Reader(files) as reader:
        for name, expected in wanted.items():
            source, shard = sources[name], shard_of(expected)
            path = files[prefix + source.names[0]]
            if source.converter is None:
                _check_shape(reader.shape(prefix + source.names[0]), expected, path, prefix + name)
            parts: dict[str, list[Tensor]] = {}
            for pattern, stored_names in source.parts.items():
                read = [
                    reader.read(prefix + stored_name, shard, index, places.device(name), dtype)
                    for index, stored_name in enumerate(stored_names)
                ]
                parts[pattern] = [part for part in read if part is not None]
            try:
                tensor = source.join(parts)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError) as error:
                raise ModelLoadError(
                    f"{path}: the {len(source.names)} parts of {prefix + name} "
                    f"do not fit together ({one_line(error)})"
                ) from error
            part = expected if shard is None else shard.part
            _check_shape(tensor.shape, part, path, prefix + name)
            tensors[name] = tensor if shard is None else shard.whole(tensor)
    module.load_state_dict(tensors, strict=True, assign=True)
    places.place(module)


def _check_shape(found: torch.Size, expected: Tensor, path: Path, name: str) -> None:
    if found != expected.shape:
        raise ModelLoadError(
            f"{path}: {name} has shape {list(found)}, config.json expects {list(expected.shape)}"
        )


class _Source:
    """What one of the module's tensors is made of."""

    def __init__(self, converter: WeightConverter | None) -> None:
        self.converter = converter
        self.parts: dict[str, list[str]] = defaultdict(list)
        """Names in the checkpoint, by the converter's pattern that they match."""

    @property
    def names(self) -> list[str]:
        return [name for names in self.parts.values() for name in names]

    def join(self, parts: dict[str, list[Tensor]]) -> Tensor:
        """The module's tensor from its parts, in the order of `parts`."""
        if self.converter is None:
            ((tensor,),) = parts.values()  # ValueError when two names in the checkpoint are one
            return tensor
        found: Any = parts
        for operation in self.converter.operations:
            found = operation.convert(
                found,
                source_patterns=self.converter.source_patterns,
                target_patterns=self.converter.target_patterns,
            )
        (joined,) = found.values()
        assert isinstance(joined, Tensor)
        return joined


def _sources(stored: list[str], model_type: str) -> dict[str, _Source]:
    """For each of the module's names, the checkpoint's names that make it; experts in order."""
    mapping = get_checkpoint_conversion_mapping(model_type) or []  # type: ignore[no-untyped-call]
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    sources: dict[str, _Source] = {}
    for stored_name in sorted(stored, key=_by_number):
        name, pattern, used = stored_name, None, None
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        for converter in converters:
            name, pattern = converter.rename_source_key(name)
            if pattern is not None:
                used = converter
                break
        source = sources.setdefault(name, _Source(used))
        source.parts[pattern or ""].append(stored_name)
    return sources


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts expert 10 after expert 2."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"\.", name)]


class _Reader:
    """Open safetensors files.

    Each is mapped into memory, and what was read of it stays there: so it is opened anew after
    every `_MAPPED_BYTES`, or the whole checkpoint would lie beside the weights.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._open: dict[Path, Any] = {}
        self._n_read: dict[Path, int] = {}

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def shape(self, name: str) -> torch.Size:
        """Of the whole tensor in the file."""
        return torch.Size(self._file(name).get_slice(name).get_shape())

    def read(
        self, name: str, shard: Shard | None, index: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor | None:
        """The tensor, or what a shard needs of it; `index` is its place among its like."""
        file = self._file(name)
        whole = file.get_tensor(name) if shard is None else None
        tensor = whole if shard is None else shard.read(file.get_slice(name), index)
        # A copy even when nothing changes: the file may be replaced while we run.
        found = None if tensor is None else tensor.to(device=device, dtype=dtype, copy=True)
        path = self._files[name]
        self._n_read[path] = self._n_read.get(path, 0) + (0 if tensor is None else tensor.nbytes)
        if self._n_read[path] > _MAPPED_BYTES:
            del self._open[path], self._n_read[path]
        return found

    def _file(self, name: str) -> Any:
        path = self._files[name]
        if path not in self._open:
            self._open[path] = _open(path)
        return self._open[path]


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Every tensor name of the checkpoint and the file that holds it; reads headers only."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        path = folder / "model.safetensors"
        with _open(path) as file:
            return dict.fromkeys(file.keys(), path)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {folder / Path(shard).name for shard in weight_map.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index}: cannot be read ({one_line(error)})") from error
    files: dict[str, Path] = {}
    for shard in sorted(shards):
        with _open(shard) as file:
            files |= dict.fromkeys(file.keys(), shard)
    return files


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise ModelLoadError(f"{path}: not found") from error
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path}: damaged or unreadable ({one_line(error)})") from error


def one_line(error: BaseException) -> str:
    """The error's text on one line, not too long."""
    return " ".join(str(error).split())[:300]
