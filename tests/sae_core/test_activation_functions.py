from __future__ import annotations

import pytest
import torch

from sae_core.activation_functions import batchtopk, jumprelu, relu, topk


def test_relu_drops_what_is_not_positive() -> None:
    assert relu(torch.tensor([-1.0, 0.0, 2.0])).tolist() == [0, 0, 2]


def test_latent_at_threshold_is_off() -> None:
    acts = jumprelu(torch.tensor([[0.5, 0.6]]), torch.tensor([0.5, 0.5]))
    assert acts.tolist() == [[0.0, pytest.approx(0.6)]]


def test_negative_threshold_lets_no_negative_value_through() -> None:
    acts = jumprelu(torch.tensor([-0.5, 0.25]), torch.tensor([-1.0, -1.0]))
    assert acts.tolist() == [0.0, 0.25]


def test_topk_keeps_the_k_largest_and_only_positive_ones() -> None:
    assert topk(torch.tensor([3.0, 1.0, 2.0, -1.0]), 2).tolist() == [3, 0, 2, 0]
    assert topk(torch.tensor([-3.0, 1.0, -2.0, -1.0]), 3).tolist() == [0, 1, 0, 0]


def test_topk_ties_go_to_the_lowest_ids_in_each_row() -> None:
    rows = torch.tensor([[1.0, 2.0, 1.0, 1.0], [1.0, 1.0, 1.0, 2.0], [4.0, 3.0, 2.0, 1.0]])
    assert topk(rows, 2).tolist() == [[1, 2, 0, 0], [1, 0, 0, 2], [4, 3, 0, 0]]


def test_topk_equals_a_plain_loop_on_tied_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-3, 4, (50, 20), generator=generator).float()
    for k in (1, 5, 20):
        expected = torch.zeros_like(rows)
        for r, row in enumerate(rows.tolist()):
            for j in sorted(range(20), key=lambda j, row=row: (-row[j], j))[:k]:
                expected[r, j] = max(row[j], 0.0)
        assert torch.equal(topk(rows, k), expected)


def test_batchtopk_is_strictly_above_its_one_threshold() -> None:
    acts = batchtopk(torch.tensor([[0.5, 0.75, -2.0]]), 0.5)
    assert acts.tolist() == [[0.0, 0.75, 0.0]]
    assert batchtopk(torch.tensor([[0.5, 0.75]]), torch.tensor(-1.0)).tolist() == [[0.5, 0.75]]
