"""Blocks spread over devices against the same model on one.

There is one real device here. "cpu:1" is the CPU under another name, so that numbers can be
compared; "meta" has no numbers, but what is on it cannot be mixed with what is not.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import nn

from sae_core.errors import ModelLoadError
from sae_core.hook_points import HookPoint
from sae_core.language_model.device_map import DeviceMap
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import LanguageModel, Segment
from sae_core.testing.models import FAMILIES

CPU, CPU_1, META = torch.device("cpu"), torch.device("cpu", 1), torch.device("meta")
ENDS = [HookPoint(layer, "resid_post") for layer in range(3)]
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")


def steps(model: LanguageModel) -> list[torch.Tensor]:
    first, second = model.open_stream(), model.open_stream()
    batches = [
        [Segment(first, range(5, 25)), Segment(second, range(40, 43))],
        [Segment(second, [7]), Segment(first, range(30, 32))],
    ]
    return [acts for batch in batches for acts in model.step(batch).values()]


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_are_those_of_one_device(family: str, folder_of: Callable[[str], Path]) -> None:
    spread = load_language_model(folder_of(family), ENDS, device=[CPU, CPU_1])
    alone = load_language_model(folder_of(family), ENDS)
    for found, expected in zip(steps(spread), steps(alone), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in MIXTURES])
def test_a_block_its_keys_and_its_activations_are_on_its_device(
    family: str, folder_of: Callable[[str], Path]
) -> None:
    model = load_language_model(folder_of(family), ENDS, device=[CPU, META, META])
    assert [model.devices[end] for end in ENDS] == [CPU, META, META]
    assert model.config.device == CPU
    stream = model.open_stream()
    resid = model.step([Segment(stream, range(5, 15))])
    assert [resid[end].device for end in ENDS] == [CPU, META, META]
    layers = stream.copy_rows(5, 10).layers
    assert [pair[0].device for pair in layers if pair is not None] == [CPU, META, META]


def a_model(before: int, blocks: list[int]) -> nn.Module:
    model = nn.Module()
    model.embed_tokens = nn.Embedding(before, 1)
    model.layers = nn.ModuleList(nn.Linear(n, 1, bias=False) for n in blocks)
    return model


@pytest.mark.parametrize("n_devices", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("before", "blocks"), [(1, [5, 5, 5, 5]), (30, [5, 5, 5, 5, 5]), (2, [9, 1, 1, 1, 7, 3])]
)
def test_the_fullest_device_holds_as_little_as_it_can(
    before: int, blocks: list[int], n_devices: int
) -> None:
    devices = [torch.device("cuda", index) for index in range(n_devices)]
    places = DeviceMap(a_model(before, blocks), "llama", devices)
    assert places.device("embed_tokens.weight") == devices[0]
    assert [places.device(f"layers.{i}.weight") for i in range(len(blocks))] == places.of_block
    assert places.of_block == sorted(places.of_block, key=devices.index)
    assert set(places.of_block) == set(devices)
    held = dict.fromkeys(devices, 0) | {devices[0]: before}
    for device, size in zip(places.of_block, blocks, strict=True):
        held[device] += size

    def fullest(cuts: tuple[int, ...]) -> int:
        ends = [0, *cuts, len(blocks)]
        runs = [sum(blocks[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
        return max(runs[0] + before, *runs[1:], 0)

    ways = combinations(range(1, len(blocks)), n_devices - 1)
    assert max(held.values()) == min(map(fullest, ways))


def test_more_devices_than_blocks_are_refused(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(ModelLoadError, match="devices: found 3, expected at most 2"):
        load_language_model(folder_of("llama"), ENDS[:2], device=[CPU, CPU_1, META])
