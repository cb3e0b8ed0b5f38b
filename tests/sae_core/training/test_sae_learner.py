from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from sae_core.errors import TrainingError
from sae_core.training import latent_entries
from sae_core.training.gates import BatchTopKGate, JumpReLUGate
from sae_core.training.input_transform import InputTransform
from sae_core.training.sae_learner import SAELearner
from sae_core.training.sae_train_config import SAETrainConfig

D_IN, D_SAE, N_DEAD = 16, 40, 12
CONFIG = SAETrainConfig(
    d_sae=D_SAE,
    l0_target=3.0,
    batch_tokens=64,
    total_tokens=10_000,
    aux_k=8,
    dead_after_tokens=5_000,
    tempering=0.5,
    max_grad_norm=1e9,
)
ARCHITECTURES = ("batchtopk", "topk", "jumprelu", "relu")


def _rows(n: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, D_IN, generator=generator) * torch.linspace(0.5, 5, D_IN) + 3


def _learner(**changes: Any) -> SAELearner:
    rows = _rows()
    config = dataclasses.replace(CONFIG, **changes)
    learner = SAELearner(config, InputTransform.fit(rows, config.tempering))
    learner.n_tokens = len(rows)  # the first step would rescale the encoder
    generator = torch.Generator().manual_seed(2)
    for name in ("b_enc", "b_dec"):
        parameter = learner.parameters[name]
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    if isinstance(learner.gate, JumpReLUGate):
        learner.parameters["threshold"] += 0.8
        learner.gate.number = 0.8
    return learner


class _Rectangle(torch.autograd.Function):
    """1 above the threshold, with the straight-through gradient for the threshold alone."""

    @staticmethod
    def forward(ctx: Any, pre: Any, threshold: Any, width: Any) -> Any:
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return (pre > threshold).float()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # type: ignore[override]
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.width / 2) & (pre > 1e-6)
        return None, -(near * grad / ctx.width).sum(0), None


def _loss(learner: SAELearner, p: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """The whole loss in plain dense torch."""
    config = learner.config
    x = learner.transform(rows)
    pre = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    penalty = torch.zeros(())
    if config.architecture == "batchtopk":
        lowest = pre.detach().flatten().topk(len(x) * config.k).values.min()
        acts = pre * (pre >= lowest)
    elif config.architecture == "topk":
        lowest = pre.detach().topk(config.k, dim=1).values[:, -1:]
        acts = torch.relu(pre) * (pre >= lowest)
    elif config.architecture == "relu":
        acts = torch.relu(pre)
        penalty = learner.gate.number * acts.sum(1).mean()
    else:
        on = _Rectangle.apply(pre, p["threshold"], config.bandwidth)
        jump = p["threshold"].detach() * (on - on.detach())  # zero, but for its gradient
        acts = torch.relu(pre) * on.detach() + jump
        excess = on.sum() / len(x) / config.l0_target - 1
        penalty = config.l0_coefficient * D_IN * excess.square()
    error = x - p["b_dec"] - acts @ p["W_dec"]
    dead = (x - p["b_dec"].detach()) @ p["W_enc"][:N_DEAD].T + p["b_enc"][:N_DEAD]
    dead = torch.relu(dead)
    dead = dead * (dead >= dead.detach().topk(config.aux_k, dim=1).values[:, -1:])
    left = (error.detach() - dead @ p["W_dec"][:N_DEAD]).square().sum(1).mean()
    return error.square().sum(1).mean() + penalty + config.aux_coefficient * left


@pytest.mark.parametrize("products", ["sparse", "dense"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_equal_autograd_of_the_loss(
    architecture: str, products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_entries, "DENSE_SHARE", 2.0 if products == "sparse" else -1.0)
    learner = _learner(architecture=architecture)
    learner.tokens_since_fired[:N_DEAD] = 10**6
    learner._apply = lambda: None  # type: ignore[method-assign]
    leaves = {n: p.detach().clone().requires_grad_() for n, p in learner.parameters.items()}
    _loss(learner, leaves, _rows()).backward()
    learner.step(_rows())
    for name, leaf in leaves.items():
        found = learner.parameters[name].grad
        torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoder_rows_keep_norm_one(architecture: str) -> None:
    learner = _learner(architecture=architecture, learning_rate=0.05)
    before = learner.parameters["W_dec"].clone()
    for _ in range(3):
        learner.step(_rows())
    after = learner.parameters["W_dec"]
    assert not torch.equal(after, before)
    torch.testing.assert_close(after.norm(dim=1), torch.ones(D_SAE))


def test_long_gradients_are_clipped() -> None:
    learner = _learner(max_grad_norm=0.5)
    learner.step(_rows())
    grads = [p.grad for p in learner.parameters.values() if p.grad is not None]
    assert float(torch.nn.utils.get_total_norm(grads)) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_state_goes_on_with_the_same_bits(architecture: str) -> None:
    learner = _learner(architecture=architecture)
    learner.step(_rows())
    state = {name: tensor.clone() for name, tensor in learner.state().items()}
    again = SAELearner.from_state(learner.config, state)
    for one in (learner, again):
        one.step(_rows() + 1)
        one.step(_rows() - 1)
    for name, tensor in learner.state().items():
        assert torch.equal(tensor, again.state()[name]), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_first_reconstruction_does_not_overshoot(architecture: str) -> None:
    config = dataclasses.replace(CONFIG, architecture=architecture, l0_target=12.0)
    learner = SAELearner(config, InputTransform.fit(_rows(), config.tempering))
    assert learner.step(_rows()).fvu < 1.0


def test_state_of_another_width_is_refused() -> None:
    state = _learner().state()
    with pytest.raises(TrainingError, match=r"W_enc: found \[40, 16\], expected \[48, 16\]"):
        SAELearner.from_state(dataclasses.replace(CONFIG, d_sae=48), state)


def test_batch_keeps_k_a_row_whatever_the_running_threshold() -> None:
    acts = torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    for number in (0.0, 0.5, 5.0):
        gate = BatchTopKGate(dataclasses.replace(CONFIG, l0_target=4.0))
        gate.number = number
        assert len(gate.entries(acts)) == 200


def test_folded_weights_read_raw_activations() -> None:
    learner = _learner(architecture="relu")
    raw, weights = _rows(), learner.raw_weights()
    assert weights.W_dec is not None and weights.b_enc is not None
    acts = torch.relu((raw - weights.b_dec) @ weights.W_enc + weights.b_enc)
    p, x = learner.parameters, learner.transform(raw)
    expected = torch.relu((x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"])
    torch.testing.assert_close(acts, expected, rtol=1e-4, atol=1e-4)
    recons = acts @ weights.W_dec + weights.b_dec
    torch.testing.assert_close(
        learner.transform(recons), expected @ p["W_dec"] + p["b_dec"], rtol=1e-3, atol=1e-3
    )


def test_tempering_evens_dimensions_out() -> None:
    rows = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    rows = rows * torch.tensor([1.0, 1.0, 1.0, 100.0]) + 7
    for tempering, top_share in ((0.0, 0.999), (0.5, 0.97), (1.0, 0.25)):
        z = InputTransform.fit(rows, tempering)(rows)
        assert float(z.square().sum(1).mean()) == pytest.approx(4.0, rel=1e-3)
        assert float(z.square().mean(0)[3] / 4.0) == pytest.approx(top_share, abs=0.02)


def test_constant_activations_are_refused() -> None:
    with pytest.raises(TrainingError, match="do not vary"):
        InputTransform.fit(torch.ones(10, 4), 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l0_target": 0}, "l0_target: found 0.0, expected above 0"),
        ({"l0_target": 99}, "l0_target: found 99.0, expected above 0 and below d_sae"),
        ({"l0_target": 2.5}, "l0_target: found 2.5, expected a whole number k"),
        ({"dtype": "int8"}, "dtype: found 'int8', expected one of float32, bfloat16"),
        ({"architecture": "gated"}, "architecture: found 'gated'"),
        ({"d_sae": "many"}, "d_sae: found 'many', expected a whole number"),
        ({"buffer_tokens": 100}, "buffer_tokens: found 100, expected at least twice batch_tokens"),
        ({"learning_rate": float("nan")}, "learning_rate: found nan, expected a number"),
        ({"warmup_share": 1.5}, "warmup_share: found 1.5, expected 0 to 1"),
    ],
)
def test_impossible_setting_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        SAETrainConfig.of(dataclasses.asdict(CONFIG) | change)


def test_rate_rises_stays_and_falls() -> None:
    config = dataclasses.replace(CONFIG, learning_rate=1.0, warmup_share=0.1, decay_share=0.5)
    rates = [config.rate_at(n) for n in (0, 500, 2_000, 7_500, 10_000)]
    assert rates == pytest.approx([0.01, 0.51, 1.0, 0.5, 0.0])
