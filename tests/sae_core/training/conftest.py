from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sae_core.training.sae_train_config import SAETrainConfig

HOOK_POINTS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")


class CountingTokenizer:
    """A token for every character, BOS 0."""

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        return ([0] if add_bos else []) + [ord(c) % 251 + 1 for c in text]


class PlantedForward:
    """Each token is the sum of two planted directions of its hook point, chosen by its context."""

    def __init__(self, n_hook_points: int = 1, d_in: int = 16, n_planted: int = 24) -> None:
        generator = torch.Generator().manual_seed(3)
        self.widths = dict.fromkeys(HOOK_POINTS[:n_hook_points], d_in)
        self.directions, self.offsets = {}, {}
        for name in self.widths:
            directions = torch.randn(n_planted, d_in, generator=generator)
            self.directions[name] = directions / directions.norm(dim=1, keepdim=True)
            self.offsets[name] = 50 * torch.randn(d_in, generator=generator)

    def __call__(self, contexts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        return {name: torch.cat([self._rows(name, c) for c in contexts]) for name in self.widths}

    def _rows(self, name: str, context: Sequence[int]) -> Tensor:
        seed = sum((place + 1) * token for place, token in enumerate(context))
        generator = torch.Generator().manual_seed(seed)
        n, directions = len(context) - 1, self.directions[name]
        which = torch.rand(n, len(directions), generator=generator).topk(2).indices
        sizes = 5 + 5 * torch.rand(n, 2, 1, generator=generator)
        return (directions[which] * sizes).sum(1) + self.offsets[name]


@pytest.fixture
def planted_config() -> SAETrainConfig:
    return SAETrainConfig(
        d_sae=48,
        l0_target=2.0,
        total_tokens=80_000,
        batch_tokens=256,
        buffer_tokens=2048,
        forward_tokens=256,
        learning_rate=5e-3,
        dead_after_tokens=5_000,
        aux_k=8,
        context_tokens=33,
        tempering=0.0,
    )


@pytest.fixture
def short_config(planted_config: SAETrainConfig) -> SAETrainConfig:
    return dataclasses.replace(planted_config, total_tokens=6_144)


@pytest.fixture
def planted_texts() -> list[str]:
    return [f"{i} " * 60 for i in range(1500)]


@pytest.fixture
def tokenizer() -> CountingTokenizer:
    return CountingTokenizer()


@pytest.fixture
def planted_forward() -> PlantedForward:
    return PlantedForward()


@pytest.fixture
def forward_of_two() -> PlantedForward:
    return PlantedForward(2)
