"""What cannot be split is refused, before any process is started."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_core.errors import HookPointError, ModelLoadError
from sae_core.hook_points import HookPoint, parse_hook_point
from sae_core.language_model.ranks import load_tensor_parallel
from sae_core.testing.models import tiny_model_folder

END = HookPoint(1, "resid_post")


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_family_without_a_plan_is_refused(family: str, folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(ModelLoadError, match=f"found a {family} model, .* has no plan; expected"):
        load_tensor_parallel(folder_of(family), [END], n_ranks=2)


@pytest.mark.parametrize(
    ("family", "overrides", "n_ranks", "what"),
    [
        ("llama", {"num_key_value_heads": 1}, 2, "1 key-value heads"),
        ("gpt_neox", {}, 3, "4 attention heads"),
        ("mixtral", {"intermediate_size": 33}, 2, "33 neurons of an expert"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(
    tmp_path: Path, family: str, overrides: dict[str, object], n_ranks: int, what: str
) -> None:
    folder = tiny_model_folder(tmp_path, family, **overrides)
    expected = f"found {what} of the {family} model, expected a multiple of the {n_ranks} ranks"
    with pytest.raises(ModelLoadError, match=expected):
        load_tensor_parallel(folder, [END], n_ranks=n_ranks)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "blocks.1.attn.hook_z"),
        ("llama", "blocks.1.mlp.hook_post"),
        ("gemma3", "layers.1.self_attn.q_norm.output"),
        ("llama", "layers.1.mlp.act_fn.output"),
        ("llama", "layers.1.self_attn.k_proj.output"),
        ("mixtral", "layers.1.mlp.experts.act_fn.output"),
    ],
)
def test_a_place_that_no_rank_sees_whole_is_refused(
    family: str, name: str, folder_of: Callable[[str], Path]
) -> None:
    expected = "split over the ranks .* such as blocks.1.hook_resid_post"
    with pytest.raises(HookPointError, match=expected):
        load_tensor_parallel(folder_of(family), [parse_hook_point(name)], n_ranks=2)


def test_one_rank_is_refused(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(ModelLoadError, match="found 1 ranks, expected at least 2"):
        load_tensor_parallel(folder_of("llama"), [END], n_ranks=1)


def test_a_refusal_leaves_no_process(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(ModelLoadError):
        load_tensor_parallel(folder_of("gpt2"), [END], n_ranks=2)
    assert not multiprocessing.active_children()
