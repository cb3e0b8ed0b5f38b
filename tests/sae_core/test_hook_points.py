"""Names, and the modules they mean, against transformers' own hidden states."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, Gemma3Config, Gemma3ForConditionalGeneration

from sae_core.errors import HookPointError
from sae_core.hook_points import (
    HookPoint,
    HookSite,
    locate,
    n_layers_needed,
    parse_hook_point,
)

TINY = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
MODEL_TYPES = (
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "gemma2",
    "gemma3_text",
    "qwen2",
    "qwen3",
)


def tiny_model(model_type: str, **overrides: object) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, object] = dict(TINY)
    if model_type not in ("gpt2", "gpt_neox"):
        sizes |= {"num_key_value_heads": 1, "head_dim": 8}
    config = AutoConfig.for_model(model_type, **sizes, **overrides)
    return AutoModel.from_config(config).eval()


def read(model: nn.Module, site: HookSite, token_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    found: list[Tensor] = []
    handle = site.register(found.append)
    with torch.no_grad():
        output = model(token_ids, output_hidden_states=True)
    handle.remove()
    assert len(found) == 1
    return found[0], list(output.hidden_states)


@pytest.mark.parametrize("text", ["blocks.0.hook_resid_pre", "blocks.31.hook_resid_mid"])
def test_name_survives_the_round_trip(text: str) -> None:
    assert str(parse_hook_point(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "blocks.8.hook_mlp_out",
        "blocks.-1.hook_resid_post",
        "blocks.08.hook_resid_post",
        "blocks.8.hook_resid_post ",
        "model.layers.8",
        "Blocks.8.hook_resid_post",
    ],
)
def test_other_names_are_refused_with_the_accepted_forms(text: str) -> None:
    with pytest.raises(HookPointError, match=r"found .*expected blocks\.LAYER\.hook_resid_pre"):
        parse_hook_point(text)


def test_layers_needed_reach_the_deepest_hook_point() -> None:
    assert n_layers_needed([]) == 0
    assert n_layers_needed([HookPoint(0, "resid_pre")]) == 0
    assert n_layers_needed([HookPoint(9, "resid_pre")]) == 9
    assert n_layers_needed([HookPoint(8, "resid_mid"), HookPoint(3, "resid_post")]) == 9


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_sites_equal_the_hidden_states(model_type: str) -> None:
    model, ids = tiny_model(model_type), torch.tensor([[3, 1, 4, 1, 5]])
    for layer, site, index in [(0, "resid_pre", 0), (1, "resid_pre", 1), (0, "resid_post", 1)]:
        resid, hidden = read(model, locate(model, HookPoint(layer, site)), ids)
        assert torch.equal(resid, hidden[index])


@pytest.mark.parametrize("model_type", [t for t in MODEL_TYPES if t != "gpt_neox"])
def test_resid_mid_lies_between_attention_and_mlp(model_type: str) -> None:
    model, ids = tiny_model(model_type), torch.tensor([[3, 1, 4, 1, 5]])
    block = (model.h if model_type == "gpt2" else model.layers)[1]
    mid, hidden = read(model, locate(model, HookPoint(1, "resid_mid")), ids)
    # what the MLP adds to it is all that separates it from resid_post
    norm_after: Callable[[Tensor], Tensor] = nn.Identity()
    if model_type == "gpt2":
        norm_before = block.ln_2
    elif model_type.startswith("gemma"):
        norm_before, norm_after = (
            block.pre_feedforward_layernorm,
            block.post_feedforward_layernorm,
        )
    else:
        norm_before = block.post_attention_layernorm
    with torch.no_grad():
        after = mid + norm_after(block.mlp(norm_before(mid)))
    last, _ = read(model, locate(model, HookPoint(1, "resid_post")), ids)
    assert torch.allclose(after, last, atol=1e-6)
    assert not torch.allclose(mid, hidden[1], atol=1e-4)


def test_parallel_residual_has_no_resid_mid() -> None:
    with pytest.raises(HookPointError, match="attention and MLP in parallel"):
        locate(tiny_model("gpt_neox"), HookPoint(0, "resid_mid"))


def test_sequential_neox_has_a_resid_mid() -> None:
    model = tiny_model("gpt_neox", use_parallel_residual=False)
    site = locate(model, HookPoint(0, "resid_mid"))
    assert (site.module, site.io) == (model.layers[0].post_attention_layernorm, "input")


def test_stream_after_the_last_block_has_two_names() -> None:
    model, ids = tiny_model("gemma3_text"), torch.tensor([[1, 2, 3]])
    post, _ = read(model, locate(model, HookPoint(1, "resid_post")), ids)
    pre, hidden = read(model, locate(model, HookPoint(2, "resid_pre")), ids)
    assert torch.equal(pre, post)
    assert not torch.allclose(pre, hidden[2], atol=1e-3)  # hidden_states end after the final norm


def test_layer_beyond_the_model_is_refused() -> None:
    with pytest.raises(HookPointError, match="has 2 layers, so the deepest is blocks.1.hook_resid"):
        locate(tiny_model("llama"), HookPoint(2, "resid_post"))


def test_unsupported_model_is_refused_by_type() -> None:
    config = AutoConfig.for_model("opt", vocab_size=20, hidden_size=16, num_hidden_layers=1)
    config.num_attention_heads, config.ffn_dim, config.word_embed_proj_dim = 2, 16, 16
    with pytest.raises(HookPointError, match="found 'opt', expected one of gpt2, gpt_neox"):
        locate(AutoModel.from_config(config), HookPoint(0, "resid_post"))


def test_text_tower_is_found_beside_a_vision_tower() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = TINY | {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 30}
    config = Gemma3Config(text_config=text, vision_config=vision, image_token_index=29)
    model = Gemma3ForConditionalGeneration(config)
    site = locate(model, HookPoint(1, "resid_post"))
    assert site.module is model.model.language_model.layers[1]


class TupleBlock(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x + 1, "cache"


class NoTensorBlock(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "nothing"


def test_tuple_output_gives_its_first_tensor_with_the_batch_axis() -> None:
    found: list[Tensor] = []
    block = TupleBlock()
    HookSite(block, "output").register(found.append)
    block(torch.zeros(1, 2, 3))
    assert torch.equal(found[0], torch.ones(1, 2, 3))


def test_output_without_a_tensor_is_an_error() -> None:
    block = NoTensorBlock()
    HookSite(block, "output").register(lambda resid: None)
    with pytest.raises(HookPointError, match="NoTensorBlock: found str"):
        block(torch.zeros(1))
