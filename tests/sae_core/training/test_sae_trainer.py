from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae_core.formats import load_sae
from sae_core.training.activations import ActivationBuffer, TrainingError, token_contexts
from sae_core.training.batch_topk import (
    PARAMETERS,
    BatchTopK,
    InputTransform,
    SAETrainConfig,
    batch_threshold,
)
from sae_core.training.sae_report import measure_sae
from sae_core.training.sae_trainer import train_sae_on, write_trained

D_IN, N_PLANTED = 16, 24
CONFIG = SAETrainConfig(
    hook_point="blocks.0.hook_resid_post",
    n_latents=48,
    k=2,
    total_tokens=80_000,
    batch_tokens=256,
    buffer_tokens=2048,
    forward_tokens=256,
    learning_rate=5e-3,
    dead_after_tokens=5_000,
    aux_k=8,
    context_tokens=33,
    dtype="float32",
    tempering=0.0,
)


class CountingTokenizer:
    """A token for every character, BOS 0."""

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        return ([0] if add_bos else []) + [ord(c) % 251 + 1 for c in text]


class PlantedForward:
    """Each token is the sum of two planted directions, chosen by its position in the run."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        directions = torch.randn(N_PLANTED, D_IN, generator=generator)
        self.directions = directions / directions.norm(dim=1, keepdim=True)
        self.offset = 50 * torch.randn(D_IN, generator=generator)

    def __call__(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        seed = sum(sum(context) for context in contexts)
        generator = torch.Generator().manual_seed(seed)
        n = sum(len(context) - 1 for context in contexts)
        which = torch.stack([torch.randperm(N_PLANTED, generator=generator)[:2] for _ in range(n)])
        sizes = 5 + 5 * torch.rand(n, 2, 1, generator=generator)
        return (self.directions[which] * sizes).sum(1) + self.offset


def _texts(n: int) -> list[str]:
    return [f"{i} " * 60 for i in range(n)]


def test_planted_directions_are_recovered(tmp_path: Path) -> None:
    forward = PlantedForward()
    trained = train_sae_on(CONFIG, _texts(3000), CountingTokenizer(), forward)
    assert trained.n_tokens >= CONFIG.total_tokens
    decoder = trained.W_dec / trained.W_dec.norm(dim=1, keepdim=True)
    best = (forward.directions @ decoder.T).max(dim=1).values
    assert (best > 0.9).float().mean() > 0.8

    held_out = forward([list(range(401))])
    report = write_trained(trained, CONFIG, held_out, tmp_path, model_name="tiny")
    assert report.fvu < 0.25
    assert report.l0 == pytest.approx(CONFIG.k, rel=0.2)
    sae = load_sae(tmp_path)
    assert sae.config.architecture == "jumprelu"
    assert sae.card.hook_point == CONFIG.hook_point
    again = measure_sae(sae, held_out[200:])
    assert again.fvu == pytest.approx(report.fvu, rel=1e-4)
    assert sae.card.facts["held_out"]["l0"] == pytest.approx(report.l0)
    assert sae.card.facts["training"]["tokens_seen"] == trained.n_tokens


def test_gradients_equal_autograd_of_the_loss() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, n_latents=40, k=3, tempering=0.5)
    rows = torch.randn(64, D_IN) * torch.rand(D_IN) * 5 + 3
    trainer = BatchTopK(config, InputTransform.fit(rows, config.tempering))
    trainer.b_enc.data += 0.1 * torch.randn(40)
    trainer.b_dec.data += 0.1 * torch.randn(D_IN)
    trainer.tokens_since_fired[:12] = 10**6
    trainer._apply = lambda: None  # type: ignore[method-assign]
    trainer.step(rows)
    found = {name: getattr(trainer, name).grad.clone() for name in PARAMETERS}

    for name in PARAMETERS:
        getattr(trainer, name).grad = None
    x = trainer.transform(rows)
    pre_acts = (x - trainer.b_dec) @ trainer.W_enc.T + trainer.b_enc
    acts = pre_acts * (pre_acts >= batch_threshold(pre_acts.detach(), 3, 0.0)).detach()
    error = x - acts @ trainer.W_dec - trainer.b_dec
    dead = torch.relu((x - trainer.b_dec.detach()) @ trainer.W_enc[:12].T + trainer.b_enc[:12])
    dead = dead * (dead >= dead.topk(config.aux_k, dim=1).values[:, -1:]).detach()
    left = (error.detach() - dead @ trainer.W_dec[:12]).square().sum(1).mean()
    loss = error.square().sum(1).mean() + config.aux_coefficient * left
    loss.backward()
    for name in PARAMETERS:
        torch.testing.assert_close(found[name], getattr(trainer, name).grad, rtol=1e-4, atol=1e-5)


def test_threshold_keeps_k_a_row_whatever_the_guess() -> None:
    acts = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    for guess in (0.0, 0.5, 5.0):
        assert int((acts >= batch_threshold(acts, 4, guess)).sum()) == 200


def test_tempering_evens_dimensions_out() -> None:
    rows = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    rows = rows * torch.tensor([1.0, 1.0, 1.0, 100.0]) + 7
    for tempering, top_share in ((0.0, 0.999), (0.5, 0.97), (1.0, 0.25)):
        z = InputTransform.fit(rows, tempering)(rows)
        assert float(z.square().sum(1).mean()) == pytest.approx(4.0, rel=1e-3)
        assert float(z.square().mean(0)[3] / 4.0) == pytest.approx(top_share, abs=0.02)


def test_run_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    short = dataclasses.replace(CONFIG, total_tokens=8_192)
    first = train_sae_on(
        short, _texts(400), CountingTokenizer(), PlantedForward(), checkpoint=tmp_path
    )
    longer = dataclasses.replace(CONFIG, total_tokens=12_288)
    second = train_sae_on(
        longer, _texts(400), CountingTokenizer(), PlantedForward(), checkpoint=tmp_path
    )
    assert first.n_tokens == 8_192
    assert second.n_tokens == 12_288
    assert second.n_contexts > first.n_contexts
    assert not torch.equal(first.W_enc, second.W_enc)


def test_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    short = dataclasses.replace(CONFIG, total_tokens=2_048)
    train_sae_on(short, _texts(200), CountingTokenizer(), PlantedForward(), checkpoint=tmp_path)
    with pytest.raises(TrainingError, match="was made with"):
        train_sae_on(
            dataclasses.replace(short, k=3),
            _texts(200),
            CountingTokenizer(),
            PlantedForward(),
            checkpoint=tmp_path,
        )


def test_same_seed_gives_the_same_bits() -> None:
    short = dataclasses.replace(CONFIG, total_tokens=4_096, n_workers=2)
    a, b = (
        train_sae_on(short, _texts(300), CountingTokenizer(), PlantedForward()) for _ in range(2)
    )
    assert torch.equal(a.W_enc, b.W_enc)
    assert a.data_digest == b.data_digest


def test_too_little_text_is_said() -> None:
    with pytest.raises(TrainingError, match="fewer than 256 tokens"):
        train_sae_on(CONFIG, ["hello world"], CountingTokenizer(), PlantedForward())


def test_contexts_begin_with_bos_and_cover_the_text() -> None:
    contexts = list(token_contexts(["a" * 25, "bcd"], CountingTokenizer(), 11))
    assert [len(context) for context in contexts] == [11, 11, 6]
    assert all(context[0] == 0 for context in contexts)


def test_buffer_hands_every_row_out_once() -> None:
    def forward(contexts: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([[float(i)] for context in contexts for i in context[1:]])

    contexts = iter([[0, *range(10 * n, 10 * n + 10)] for n in range(1, 21)])
    buffer = ActivationBuffer(
        contexts,
        forward,
        capacity=60,
        forward_tokens=25,
        generator=torch.Generator().manual_seed(0),
    )
    seen: list[float] = []
    while (rows := buffer.take(20)) is not None:
        seen += rows[:, 0].tolist()
    buffer.close()
    assert sorted(seen) == [float(i) for i in range(10, 210)]
    assert seen != sorted(seen)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"k": 0}, "k is 0"), ({"k": 99}, "k is 99"), ({"dtype": "int8"}, "dtype is 'int8'")],
)
def test_impossible_setting_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        dataclasses.replace(CONFIG, **change)  # type: ignore[arg-type]
