"""Which module a name means, on models built in memory; the numbers at every site of every family
are compared in test_model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from sae_core.errors import HookPointError
from sae_core.hook_points import HookPoint, ModulePath, parse_hook_point
from sae_core.language_model.sites import HookSite, canonical, locate, without_gain
from sae_core.testing.models import FAMILIES

TINY = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
IDS = torch.tensor([[3, 1, 4, 1, 5]])


def tiny_model(model_type: str, **overrides: object) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, object] = dict(TINY)
    if model_type not in ("gpt2", "gpt_neox", "opt"):
        sizes |= {"num_key_value_heads": 1, "head_dim": 8}
    if model_type == "opt":
        sizes |= {"ffn_dim": 24, "word_embed_proj_dim": 16}
    config = AutoConfig.for_model(model_type, **sizes, **overrides)
    return AutoModel.from_config(config).eval()


def read(model: nn.Module, site: HookSite) -> Tensor:
    found: list[Tensor] = []
    handle = site.register(found.append)
    with torch.no_grad():
        model(IDS)
    handle.remove()
    assert len(found) == 1
    return found[0]


def test_last_streams_have_two_names() -> None:
    model = tiny_model("gemma3_text")
    pre = read(model, locate(model, HookPoint(2, "resid_pre")))
    assert torch.equal(pre, read(model, locate(model, HookPoint(1, "resid_post"))))
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(hidden[1], read(model, locate(model, HookPoint(1, "resid_pre"))))
    assert not torch.allclose(pre, hidden[2], atol=1e-3)  # hidden_states end after the final norm


def test_embedding_is_the_tokens_alone_or_scaled() -> None:
    for model_type, path in (("gpt2", "wte"), ("opt", "decoder.embed_tokens")):
        model = tiny_model(model_type)
        table = model.get_submodule(path).weight
        assert torch.equal(read(model, locate(model, HookPoint(0, "embed"))), table[IDS])
    model = tiny_model("gemma2")
    expected = model.embed_tokens.weight[IDS] * 4  # sqrt(16)
    assert torch.equal(read(model, locate(model, HookPoint(0, "embed"))), expected)


@pytest.mark.parametrize(
    ("model_type", "text", "expected"),
    [
        ("gpt2", "h.1", "blocks.1.hook_resid_post"),
        ("gpt2", "transformer.h.1.input", "blocks.1.hook_resid_pre"),
        ("gpt2", "h.1.attn", "blocks.1.hook_attn_out"),
        ("gpt2", "h.1.mlp", "blocks.1.hook_mlp_out"),
        ("gpt2", "h.1.mlp.c_proj.input", "blocks.1.mlp.hook_post"),
        ("gpt2", "h.1.ln_2.output", "blocks.1.mlp.hook_in"),
        ("gpt2", "h.1.ln_2.input", "blocks.1.hook_resid_mid"),
        ("gpt2", "wte", "hook_embed"),
        ("gpt_neox", "layers.0.mlp", "blocks.0.hook_mlp_out"),
        ("gpt_neox", "gpt_neox.layers.0.attention.dense.input", "blocks.0.attn.hook_z"),
        ("gpt_neox", "embed_in", "hook_embed"),
        ("llama", "model.layers.1.output", "blocks.1.hook_resid_post"),
        ("llama", "model.layers.1.self_attn", "blocks.1.hook_attn_out"),
        ("llama", "layers.1.mlp.input", "blocks.1.mlp.hook_in"),
        ("llama", "layers.1.post_attention_layernorm", "blocks.1.mlp.hook_in"),
        ("llama", "embed_tokens", "hook_embed"),
        ("gemma3_text", "model.layers.1.self_attn.o_proj.input", "blocks.1.attn.hook_z"),
        (
            "gemma3_text",
            "model.layers.1.post_feedforward_layernorm.output",
            "blocks.1.hook_mlp_out",
        ),
        (
            "gemma3_text",
            "model.layers.1.pre_feedforward_layernorm.output",
            "blocks.1.mlp.hook_in",
        ),
        (
            "gemma2",
            "model.language_model.layers.1.post_attention_layernorm.output",
            "blocks.1.hook_attn_out",
        ),
        ("opt", "decoder.layers.1", "blocks.1.hook_resid_post"),
        ("opt", "model.decoder.layers.1.fc2.input", "blocks.1.mlp.hook_post"),
        ("opt", "decoder.layers.1.fc2", "blocks.1.hook_mlp_out"),
        ("phi", "layers.1.mlp", "blocks.1.hook_mlp_out"),
        ("phi", "layers.1.input_layernorm", "blocks.1.mlp.hook_in"),
    ],
)
def test_module_path_becomes_the_site_that_it_means(
    model_type: str, text: str, expected: str
) -> None:
    model, path = tiny_model(model_type), parse_hook_point(text)
    named = canonical(model, path)
    assert str(named) == expected
    assert canonical(model, named) == named
    assert torch.equal(read(model, locate(model, path)), read(model, locate(model, named)))


@pytest.mark.parametrize(
    ("model_type", "text"),
    [
        ("gemma2", "layers.1.self_attn"),  # before the norm that attn_out comes after
        ("gemma2", "layers.1.mlp"),
        ("llama", "layers.1.mlp.gate_proj"),
        ("llama", "layers.1.self_attn.input"),  # called by keyword
        ("gpt_neox", "layers.1.post_attention_layernorm.input"),  # parallel: no resid_mid
        ("opt", "decoder.layers.1.self_attn_layer_norm"),
    ],
)
def test_path_without_a_name_stays_a_path_and_is_read(model_type: str, text: str) -> None:
    model, path = tiny_model(model_type), parse_hook_point(text)
    assert isinstance(path, ModulePath)
    assert canonical(model, path) is path
    module = model.get_submodule(path.path)
    found: list[Tensor] = []

    def keep(_m: object, args: tuple[Tensor], kwargs: dict[str, Tensor], output: object) -> None:
        value = args[0] if args else kwargs["hidden_states"]
        if path.side == "output":
            value = output[0] if isinstance(output, tuple) else output
        found.append(value)

    module.register_forward_hook(keep, with_kwargs=True)
    assert torch.equal(read(model, locate(model, path)), found[0])


def test_path_of_another_family_is_refused() -> None:
    with pytest.raises(
        HookPointError, match="layers.1.mlp: a gpt2 model has no layers, expected h"
    ):
        locate(tiny_model("gpt2"), ModulePath("layers.1.mlp"))
    with pytest.raises(HookPointError, match="a llama model has no wte, expected embed_tokens"):
        locate(tiny_model("llama"), ModulePath("wte"))
    with pytest.raises(HookPointError, match="a llama block has no attn, it has self_attn, mlp"):
        locate(tiny_model("llama"), ModulePath("layers.1.attn"))
    with pytest.raises(HookPointError, match="what enters it are token ids"):
        locate(tiny_model("llama"), ModulePath("embed_tokens", "input"))


@pytest.mark.parametrize("model_type", ["gpt_neox", "phi"])
def test_parallel_residual_has_no_resid_mid(model_type: str) -> None:
    with pytest.raises(HookPointError, match="attention and MLP in parallel"):
        locate(tiny_model(model_type), HookPoint(0, "resid_mid"))


def test_sequential_neox_has_a_resid_mid() -> None:
    model = tiny_model("gpt_neox", use_parallel_residual=False)
    site = locate(model, HookPoint(0, "resid_mid"))
    assert (site.module, site.io) == (model.layers[0].post_attention_layernorm, "input")


@pytest.mark.parametrize("site", ["resid_mid", "mlp_normalized"])
def test_norm_after_addition_leaves_nothing_between(site: str) -> None:
    model = tiny_model("opt", do_layer_norm_before=False)
    with pytest.raises(HookPointError, match="normalises the stream after each addition"):
        locate(model, HookPoint(0, site))  # type: ignore[arg-type]


def test_experts_have_no_neurons_in_common() -> None:
    model = tiny_model("mixtral")
    with pytest.raises(HookPointError, match="has experts in this block"):
        locate(model, HookPoint(0, "mlp_post"))


def test_layer_beyond_the_model_is_refused() -> None:
    for hook_point in (HookPoint(2, "resid_post"), ModulePath("layers.2")):
        with pytest.raises(HookPointError, match="has 2 layers, so the deepest is blocks.1.hook"):
            locate(tiny_model("llama"), hook_point)


def test_stack_of_another_kind_of_model_is_refused() -> None:
    with pytest.raises(HookPointError, match="has one stack of blocks"):
        locate(tiny_model("llama"), HookPoint(0, "resid_post", "encoder"))


def test_unsupported_model_is_refused_by_type() -> None:
    config = AutoConfig.for_model("codegen", vocab_size=20, n_embd=16, n_layer=1, n_head=4)
    config.rotary_dim = 4
    with pytest.raises(HookPointError, match="found 'codegen', expected one of gpt2, gpt_neox"):
        locate(AutoModel.from_config(config), HookPoint(0, "resid_post"))


@pytest.mark.parametrize("family", FAMILIES)
def test_base_model_is_found_under_its_head(family: str, folder_of: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder_of(family))
    site = locate(model, HookPoint(1, "resid_post"))
    assert site == locate(model.base_model, HookPoint(1, "resid_post"))


def test_text_tower_is_found_beside_a_vision_tower() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = TINY | {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 30}
    config = Gemma3Config(text_config=text, vision_config=vision, image_token_index=29)
    model = Gemma3ForConditionalGeneration(config)
    for hook_point in (HookPoint(1, "resid_post"), ModulePath("model.layers.1", "output")):
        assert locate(model, hook_point).module is model.model.language_model.layers[1]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_gain_of_zero_hides_nothing(model_type: str) -> None:
    model = tiny_model(model_type)
    expected = read(model, locate(model, HookPoint(1, "mlp_normalized")))
    block = (model.h if model_type == "gpt2" else model.layers)[1]
    name = {"gpt2": "ln_2", "gemma2": "pre_feedforward_layernorm"}
    norm = block.get_submodule(name.get(model_type, "post_attention_layernorm"))
    with torch.no_grad():
        norm.weight.fill_(-1.0 if model_type == "gemma2" else 0.0)
    assert not read(model, HookSite(norm, "output")).any()
    assert torch.equal(read(model, locate(model, HookPoint(1, "mlp_normalized"))), expected)
    assert torch.allclose(expected.pow(2).mean(-1), torch.ones(()), atol=0.05)


def test_norm_without_gain_keeps_the_dtype() -> None:
    x = (100 * torch.randn(4, 8)).bfloat16()
    found = without_gain(nn.LayerNorm(8, eps=1e-5))(x)
    wide = x.double()
    expected = (wide - wide.mean(-1, keepdim=True)) / wide.std(-1, keepdim=True, correction=0)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), expected, atol=0.01)  # 8 bits of mantissa


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
