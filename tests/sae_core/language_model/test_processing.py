"""Shifts against models whose weights are processed here by hand, in TransformerLens's order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sae_core.errors import HookPointError
from sae_core.hook_points import HookPoint, ModulePath
from sae_core.language_model.families import SUPPORTED_MODEL_TYPES, uses_layer_norm
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import Segment
from sae_core.language_model.processing import (
    DEFAULT_PROCESSING,
    ProcessedShift,
    Processing,
    processed_shift,
)
from sae_core.language_model.sites import locate
from sae_core.testing.models import N_LAYERS, tiny_model_folder

TOLERANCE = 1e-5
"""Of values around 1; two models with different weights round differently, by up to 2e-6 here."""
IDS = torch.tensor([[5, 17, 90, 200, 33, 8]])

NAMES = {  # attention norm, its readers, o; MLP norm, its readers, what writes
    "gpt2": ("ln_1", ["attn.c_attn"], "attn.c_proj", "ln_2", ["mlp.c_fc"], "mlp.c_proj"),
    "gpt_neox": (
        "input_layernorm",
        ["attention.query_key_value"],
        "attention.dense",
        "post_attention_layernorm",
        ["mlp.dense_h_to_4h"],
        "mlp.dense_4h_to_h",
    ),
    "opt": (
        "self_attn_layer_norm",
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "self_attn.out_proj",
        "final_layer_norm",
        ["fc1"],
        "fc2",
    ),
    "phi": (  # one norm for both
        "input_layernorm",
        ["mlp.fc1", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "self_attn.dense",
        "input_layernorm",
        [],
        "mlp.fc2",
    ),
    "qwen2": (
        "input_layernorm",
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "self_attn.o_proj",
        "post_attention_layernorm",
        ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down_proj",
    ),
}
LAYER_NORM = ("gpt2", "gpt_neox", "opt", "phi")


class ByHand:
    """Rewrites a model's weights in place; `d_out d_in` throughout, GPT-2's turned for it."""

    def __init__(self, model: nn.Module, family: str) -> None:
        self.base, self.family = model.base_model, family
        path = {"gpt2": "h", "opt": "decoder.layers"}.get(family, "layers")
        self.blocks = self.base.get_submodule(path)

    def weight(self, linear: nn.Module) -> Tensor:
        return linear.weight.T if self.family == "gpt2" else linear.weight  # a view

    def fold_ln(self) -> None:
        attn_norm, attn_in, _, mlp_norm, mlp_in, _ = NAMES[self.family]
        for block in self.blocks:
            for norm_name, readers in ((attn_norm, attn_in), (mlp_norm, mlp_in)):
                norm = block.get_submodule(norm_name)
                for linear in map(block.get_submodule, readers):
                    if getattr(norm, "bias", None) is not None:
                        linear.bias += self.weight(linear) @ norm.bias
                    self.weight(linear).mul_(norm.weight)
                if getattr(norm, "bias", None) is not None:
                    norm.bias.zero_()
                norm.weight.fill_(1)

    def center_writing_weights(self) -> None:
        names = {"gpt2": ["wte", "wpe"], "gpt_neox": ["embed_in"], "phi": ["embed_tokens"]}
        opt = ["decoder.embed_tokens", "decoder.embed_positions"]
        for name in names.get(self.family, opt):
            table = self.base.get_submodule(name).weight
            table -= table.mean(dim=1, keepdim=True)
        _, _, o, _, _, mlp_out = NAMES[self.family]
        for block in self.blocks:
            for linear in map(block.get_submodule, (o, mlp_out)):
                weight = self.weight(linear)
                weight -= weight.mean(dim=0, keepdim=True)
                linear.bias -= linear.bias.mean()

    def fold_value_biases(self) -> None:
        _, readers, o, *_ = NAMES[self.family]
        for block in self.blocks:
            bias, out = block.get_submodule(readers[-1]).bias, block.get_submodule(o)
            if self.family == "gpt2":
                values = bias[64:]
            elif self.family == "gpt_neox":
                values = bias.view(4, 3, 8)[:, 2]  # a view: four heads of q, k, v
            else:
                values = bias
            of_heads = values.reshape(-1)
            if self.family in ("phi", "qwen2"):  # two key-value heads for four query heads
                of_heads = values.view(2, 8).repeat_interleave(2, dim=0).reshape(-1)
            if out.bias is None:
                out.bias = nn.Parameter(torch.zeros(32))
            out.bias += self.weight(out) @ of_heads
            values.zero_()


def read(model: nn.Module, hook_points: list[HookPoint]) -> tuple[dict[HookPoint, Tensor], Tensor]:
    found: dict[HookPoint, Tensor] = {}

    def keep(hook_point: HookPoint) -> Callable[[Tensor], None]:
        return lambda acts: found.update({hook_point: acts.reshape(IDS.shape[1], -1).clone()})

    handles = [locate(model, h).register(keep(h)) for h in hook_points]
    logits = model(IDS).logits
    for handle in handles:
        handle.remove()
    return found, logits


@pytest.mark.parametrize(
    ("family", "processing"),
    [
        *((f, DEFAULT_PROCESSING) for f in LAYER_NORM),
        *((f, Processing(center_writing_weights=True)) for f in LAYER_NORM),
        *((f, Processing(fold_value_biases=True)) for f in NAMES),
        *((f, Processing(fold_ln=True)) for f in NAMES),
        *((f, Processing(fold_ln=True, fold_value_biases=True)) for f in NAMES),
    ],
)
@torch.no_grad()
def test_shifted_activations_are_the_processed_models(
    family: str,
    processing: Processing,
    folder_of: Callable[[str], Path],
    all_hook_points: Callable[[str], list[HookPoint]],
) -> None:
    hook_points = [
        h for h in all_hook_points(family) if not (processing.fold_ln and h.site == "mlp_in")
    ]
    model = AutoModelForCausalLM.from_pretrained(folder_of(family)).eval()
    processed = AutoModelForCausalLM.from_pretrained(folder_of(family)).eval()
    by_hand = ByHand(processed, family)
    head = processed.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.clone())  # tied or not, it must stay as it was
    if processing.fold_ln:
        by_hand.fold_ln()
    if processing.center_writing_weights:
        by_hand.center_writing_weights()
    if processing.fold_value_biases:
        by_hand.fold_value_biases()

    plain, logits = read(model, hook_points)
    expected, processed_logits = read(processed, hook_points)
    assert torch.allclose(logits, processed_logits, atol=20 * TOLERANCE)  # logits are around 10
    moved = set()
    for hook_point in hook_points:
        shift = processed_shift(model, hook_point, processing)
        scale = max(1.0, float(plain[hook_point].abs().max()))
        assert torch.allclose(
            shift(plain[hook_point]), expected[hook_point], atol=TOLERANCE * scale
        ), str(hook_point)
        if (plain[hook_point] - expected[hook_point]).abs().max() > 1e-3:
            moved.add(hook_point.site)
            assert shift.is_centred or shift.shift is not None
    written = {"embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"}
    if family in ("gpt_neox", "phi"):
        written.remove("resid_mid")
    assert moved == (written if processing.center_writing_weights else set()) | (
        {"z"} if processing.fold_value_biases else set()
    )


def test_nothing_is_done_where_nothing_was_processed(folder_of: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder_of("gpt2"))
    for hook_point in (HookPoint(1, "z"), HookPoint(1, "resid_post"), ModulePath("h.1.mlp.c_fc")):
        assert processed_shift(model, hook_point, Processing()) == ProcessedShift(False, None)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "qwen3", "phi3"])
def test_family_of_rms_norm_without_value_bias_is_never_moved(
    family: str, folder_of: Callable[[str], Path], all_hook_points: Callable[[str], list[HookPoint]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder_of(family))
    for hook_point in all_hook_points(family):
        if hook_point.site != "mlp_in":
            shift = processed_shift(model, hook_point, DEFAULT_PROCESSING)
            assert shift == ProcessedShift(False, None)


def test_layer_norm_families_are_those_that_subtract_the_mean() -> None:
    found = {t for t in SUPPORTED_MODEL_TYPES if uses_layer_norm(t)}
    assert found == set(LAYER_NORM)


def test_module_path_with_a_name_is_shifted_as_its_site(folder_of: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder_of("gpt2"))
    by_path = processed_shift(model, ModulePath("h.1.attn.c_proj", "input"), DEFAULT_PROCESSING)
    by_name = processed_shift(model, HookPoint(1, "z"), DEFAULT_PROCESSING)
    assert by_path.shift is not None
    assert torch.equal(by_path.shift, by_name.shift)


def test_places_that_cannot_be_said_exactly_are_refused(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder_of("gpt2"))
    with pytest.raises(HookPointError, match="expected blocks.1.ln2.hook_normalized"):
        processed_shift(model, HookPoint(1, "mlp_in"), DEFAULT_PROCESSING)
    with pytest.raises(HookPointError, match="a place without a TransformerLens name"):
        processed_shift(model, ModulePath("h.1.mlp.c_fc"), DEFAULT_PROCESSING)
    with pytest.raises(HookPointError, match="has 3 layers"):
        processed_shift(model, HookPoint(3, "z"), DEFAULT_PROCESSING)
    folder = tiny_model_folder(tmp_path, "opt", do_layer_norm_before=False)
    post_norm = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(HookPointError, match="normalises the stream itself"):
        processed_shift(post_norm, HookPoint(1, "resid_post"), DEFAULT_PROCESSING)


def test_loaded_model_gives_the_same_shift(folder_of: Callable[[str], Path]) -> None:
    hook_points = [HookPoint(N_LAYERS - 1, "z"), HookPoint(1, "resid_mid")]
    model = load_language_model(folder_of("gpt2"), hook_points)
    whole = AutoModelForCausalLM.from_pretrained(folder_of("gpt2"))
    acts = model.step([Segment(model.open_stream(), IDS[0].tolist())])
    for hook_point in hook_points:
        mine = model.processed_shift(hook_point, DEFAULT_PROCESSING)(acts[hook_point])
        theirs = processed_shift(whole, hook_point, DEFAULT_PROCESSING)(acts[hook_point])
        assert torch.equal(mine, theirs)
        assert not torch.allclose(mine, acts[hook_point], atol=1e-3)
