from __future__ import annotations

import math

import pytest
import torch

from sae_core.activation_functions import (
    batchtopk,
    gated,
    group_largest,
    jumprelu,
    tanh_relu,
)


def test_latent_at_threshold_is_off() -> None:
    acts = jumprelu(torch.tensor([[0.5, 0.6]]), torch.tensor([0.5, 0.5]))
    assert acts.tolist() == [[0.0, pytest.approx(0.6)]]


def test_negative_threshold_lets_no_negative_value_through() -> None:
    acts = jumprelu(torch.tensor([-0.5, 0.25]), torch.tensor([-1.0, -1.0]))
    assert acts.tolist() == [0.0, 0.25]


def test_gated_latent_needs_its_gate_and_a_positive_magnitude() -> None:
    projections = torch.tensor([[1.0, 1.0, -1.0]])
    b_gate, r_mag = torch.tensor([0.5, -1.0, 3.0]), torch.tensor([math.log(2), 0.0, 0.0])
    acts = gated(projections, b_gate, r_mag, torch.tensor([0.25, 0.0, 0.5]))
    assert acts.tolist() == [[pytest.approx(2.25), 0.0, 0.0]]


def test_tanh_relu_saturates_at_one() -> None:
    acts = tanh_relu(torch.tensor([-1.0, 0.0, 0.5, 40.0]))
    assert acts.tolist() == [0.0, 0.0, pytest.approx(math.tanh(0.5)), 1.0]


def test_first_of_equal_latents_wins_its_group() -> None:
    groups = torch.tensor([[[1.0, 2.0, 2.0], [0.0, 0.0, -1.0]]])
    assert group_largest(groups).tolist() == [[[False, True, False], [True, False, False]]]


def test_batchtopk_is_strictly_above_its_one_threshold() -> None:
    acts = batchtopk(torch.tensor([[0.5, 0.75, -2.0]]), 0.5)
    assert acts.tolist() == [[0.0, 0.75, 0.0]]
    assert batchtopk(torch.tensor([[0.5, 0.75]]), -1.0).tolist() == [[0.5, 0.75]]
