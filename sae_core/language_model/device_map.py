"""One model's blocks on several devices, in one process: the stream moves on where a device ends.

Each block, its keys and values, and what is read at its hook points are on its device; what comes
before the first block is on the first. Moves are between blocks only: one token's stream, once a
device. Knows no checkpoint (see `checkpoint`) and no ranks (see `tensor_parallel`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sae_core.errors import ModelLoadError
from sae_core.language_model.families import FAMILIES


class DeviceMap:
    """Which device each part of a base model is on.

    Blocks are cut into as many runs as there are devices, so that the largest run, with what
    comes before the blocks counted to the first, is as small as it can be.

    Args:
        module: the base model, cut after its last needed block.
        devices: one, or one for each run, in order.

    Raises:
        ModelLoadError: there are more devices than blocks.
    """

    def __init__(self, module: nn.Module, model_type: str, devices: Sequence[torch.device]) -> None:
        self._path = FAMILIES[model_type].blocks + "."
        blocks = list(module.get_submodule(FAMILIES[model_type].blocks).children())
        if len(devices) > len(blocks):
            raise ModelLoadError(
                f"devices: found {len(devices)}, expected at most {len(blocks)}, "
                f"as many as blocks are needed of this {model_type} model"
            )
        sizes = [_n_entries(block) for block in blocks]
        before = _n_entries(module) - sum(sizes)
        self.first = devices[0]
        runs = _cut([before + sizes[0], *sizes[1:]], len(devices))
        self.of_block = [device for device, n in zip(devices, runs, strict=True) for _ in range(n)]

    def device(self, name: str) -> torch.device:
        """Where a tensor of the base model is, by its name in the state dict."""
        if not name.startswith(self._path):
            return self.first
        return self.of_block[int(name.removeprefix(self._path).partition(".")[0])]

    def place(self, module: nn.Module) -> None:
        """Moves the computed buffers, which no checkpoint holds, and lets the stream move along."""
        for name, buffer in list(module.named_buffers(remove_duplicate=False)):
            path, _, own = name.rpartition(".")
            setattr(module.get_submodule(path), own, buffer.to(self.device(name)))
        if len(set(self.of_block)) == 1:
            return
        blocks = module.get_submodule(self._path.removesuffix(".")).children()
        for block, device in zip(blocks, self.of_block, strict=True):
            block.register_forward_pre_hook(_mover(device), with_kwargs=True)


def _mover(device: torch.device) -> Any:
    def move(block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        return _moved(args, device), {name: _moved(v, device) for name, v in kwargs.items()}

    return move


def _moved(value: object, device: torch.device) -> object:
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) is tuple:
        return tuple(_moved(item, device) for item in value)
    return value


def _n_entries(module: nn.Module) -> int:
    return sum(t.numel() for t in module.state_dict().values())


def _cut(sizes: Sequence[int], n_runs: int) -> list[int]:
    """Lengths of `n_runs` runs, none empty, whose largest sum is the smallest possible."""
    best: list[dict[int, tuple[int, list[int]]]] = [{0: (0, [])}]
    for runs in range(1, n_runs + 1):
        row: dict[int, tuple[int, list[int]]] = {}
        for stop in range(runs, len(sizes) + 1):
            row[stop] = min(
                (max(largest, sum(sizes[start:stop])), [*lengths, stop - start])
                for start, (largest, lengths) in best[-1].items()
                if start < stop
            )
        best.append(row)
    return best[-1][len(sizes)][1]
