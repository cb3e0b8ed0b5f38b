"""T5 and ViT against their own hidden states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from sae_core.errors import HookPointError, ModelLoadError, TokenError
from sae_core.hook_points import HookPoint, Site, Stack, parse_hook_point
from sae_core.language_model.encoders import load_residual_reader
from sae_core.testing.models import tiny_model_folder

IDS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 3, 5, 8, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
DECODER_IDS = torch.tensor([[0, 7, 9], [0, 3, 2]])


def points(stack: Stack, n_layers: int, *sites: Site) -> list[HookPoint]:
    return [HookPoint(layer, site, stack) for layer in range(n_layers) for site in sites]


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    folder = tmp_path_factory.mktemp("t5")
    scaled_up(T5ForConditionalGeneration(config)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=12,
        patch_size=4,
    )
    folder = tmp_path_factory.mktemp("vit")
    scaled_up(ViTForImageClassification(config)).save_pretrained(folder)
    return folder


def scaled_up(model: nn.Module) -> nn.Module:
    """Weights at which every layer changes the stream visibly."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def test_t5_streams_are_the_hidden_states(t5_folder: Path) -> None:
    wanted = points("encoder", 3, "resid_pre", "resid_post")
    wanted += points("decoder", 2, "resid_pre", "resid_post")
    reader = load_residual_reader(t5_folder, wanted)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": DECODER_IDS}
    found = reader.read(**inputs)
    model = T5ForConditionalGeneration.from_pretrained(t5_folder).eval()
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    states = {"encoder": output.encoder_hidden_states, "decoder": output.decoder_hidden_states}
    final_norms = {s: getattr(model, s).final_layer_norm for s in ("encoder", "decoder")}
    assert list(found) == wanted
    for (layer, site, stack), resid in ((key(h), r) for h, r in found.items()):
        after = layer + (site == "resid_post")
        if after + 1 < len(states[stack]):
            assert torch.equal(resid, states[stack][after])
        else:  # the last of the hidden states comes after the final norm
            assert torch.allclose(final_norms[stack](resid), states[stack][after], atol=1e-6)


def key(hook_point: HookPoint) -> tuple[int, Site, Stack]:
    return hook_point.layer, hook_point.site, hook_point.stack


def test_t5_resid_mid_lies_between_attention_and_mlp(t5_folder: Path) -> None:
    wanted = [HookPoint(1, "resid_mid", "encoder"), HookPoint(1, "resid_post", "encoder")]
    mid, post = load_residual_reader(t5_folder, wanted).read(input_ids=IDS).values()
    mlp = T5ForConditionalGeneration.from_pretrained(t5_folder).eval().encoder.block[1].layer[1]
    with torch.no_grad():
        added = mlp.DenseReluDense(mlp.layer_norm(mid))
    assert torch.allclose(mid + added, post, atol=1e-6)
    assert not torch.allclose(mid, post, atol=1e-2)


def test_encoder_alone_needs_no_decoder(t5_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(t5_folder / "model.safetensors")
    encoder = {n: t for n, t in tensors.items() if n.startswith(("encoder", "shared"))}
    assert len(encoder) < len(tensors)
    save_file(encoder, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((t5_folder / "config.json").read_text())
    hook_point = parse_hook_point("encoder.blocks.2.hook_resid_post")
    reader = load_residual_reader(tmp_path, [hook_point])
    assert reader.required == ("input_ids",)
    whole = load_residual_reader(t5_folder, [hook_point])
    assert torch.equal(
        reader.read(input_ids=IDS)[hook_point], whole.read(input_ids=IDS)[hook_point]
    )
    with pytest.raises(ModelLoadError, match=r"missing tensor decoder\..* and \d+ more"):
        load_residual_reader(tmp_path, [HookPoint(0, "resid_post", "decoder")])


def test_vit_streams_are_the_hidden_states(vit_folder: Path) -> None:
    wanted = points("", 3, "resid_pre", "resid_mid", "resid_post")
    pixels = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    reader = load_residual_reader(vit_folder, wanted)
    found = reader.read(pixel_values=pixels)
    model = ViTForImageClassification.from_pretrained(vit_folder).eval()
    with torch.no_grad():
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
        for hook_point, resid in found.items():
            assert resid.shape == (2, 1 + 9, reader.d_model)
            if hook_point.site != "resid_mid":
                after = hook_point.layer + (hook_point.site == "resid_post")
                assert torch.equal(resid, states[after])
                continue
            block = model.vit.layers[hook_point.layer]
            written = block.mlp(block.layernorm_after(resid))
            assert torch.allclose(resid + written, states[hook_point.layer + 1], atol=1e-6)
            assert not torch.allclose(resid, states[hook_point.layer + 1], atol=1e-2)


def test_pass_ends_at_the_deepest_hook_point(vit_folder: Path) -> None:
    reader = load_residual_reader(vit_folder, [HookPoint(1, "resid_pre")])
    ran: list[str] = []
    for name, module in reader._module.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    found = reader.read(pixel_values=torch.zeros(1, 3, 12, 12))
    assert any(name.endswith("0.mlp") for name in ran)
    assert not any("1.attention" in name or name.endswith("layernorm") for name in ran)
    assert not found[HookPoint(1, "resid_pre")].is_inference()


def test_missing_inputs_are_named(t5_folder: Path) -> None:
    reader = load_residual_reader(t5_folder, [HookPoint(0, "resid_post", "decoder")])
    with pytest.raises(TokenError, match="found input_ids, expected input_ids, decoder_input_ids"):
        reader.read(input_ids=IDS)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("blocks.0.hook_resid_post", r"no such stack, .* encoder.blocks.0.hook_resid_post or dec"),
        ("decoder.blocks.0.hook_resid_mid", "decoder only resid_pre, resid_post can be read"),
        ("encoder.blocks.0.attn.hook_z", "encoder only resid_pre, resid_mid, resid_post can"),
        ("encoder.blocks.3.hook_resid_post", "has 3 such layers, so the deepest is encoder.bl"),
        ("decoder.blocks.2.hook_resid_post", "has 2 such layers, so the deepest is decoder.bl"),
    ],
)
def test_place_that_t5_does_not_have_is_refused(text: str, match: str, t5_folder: Path) -> None:
    with pytest.raises(HookPointError, match=match):
        load_residual_reader(t5_folder, [parse_hook_point(text)])


def test_place_that_vit_does_not_have_is_refused(vit_folder: Path) -> None:
    with pytest.raises(HookPointError, match="expected a name such as blocks.0.hook_resid_post"):
        load_residual_reader(vit_folder, [HookPoint(0, "resid_post", "encoder")])
    with pytest.raises(HookPointError, match="found none"):
        load_residual_reader(vit_folder, [])


def test_folder_of_another_kind_is_refused(vit_folder: Path, tmp_path: Path) -> None:
    hook_point = HookPoint(0, "resid_post")
    with pytest.raises(ModelLoadError, match=r"config.json: cannot be read \(\[Errno 2\] No such"):
        load_residual_reader(tmp_path, [hook_point])
    with pytest.raises(ModelLoadError, match="found model_type 'gpt2', expected one of t5, vit"):
        load_residual_reader(tiny_model_folder(tmp_path / "gpt2", "gpt2"), [hook_point])
    (tmp_path / "config.json").write_text((vit_folder / "config.json").read_text())
    with pytest.raises(ModelLoadError, match="model folder"):
        load_residual_reader(tmp_path, [hook_point])
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelLoadError, match="model folder"):
        load_residual_reader(tmp_path, [hook_point])
    wrong = json.loads((vit_folder / "config.json").read_text()) | {"intermediate_size": 48}
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    save_file(load_file(vit_folder / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match="model folder"):
        load_residual_reader(tmp_path, [hook_point])


def test_tensors_are_the_callers(vit_folder: Path) -> None:
    hook_point = HookPoint(0, "resid_post")
    resid: Tensor = load_residual_reader(vit_folder, [hook_point]).read(
        pixel_values=torch.zeros(1, 3, 12, 12)
    )[hook_point]
    weight = torch.ones(16, requires_grad=True)
    (resid @ weight).sum().backward()
    assert torch.allclose(weight.grad, resid.sum((0, 1)))
