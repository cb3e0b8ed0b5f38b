"""What is read of a model folder, and what is said when it cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sae_core.errors import HookPointError, ModelLoadError
from sae_core.hook_points import HookPoint
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import LanguageModel, Segment
from sae_core.testing.models import D_MODEL, FAMILIES, MAX_POSITIONS, N_PIECES

FIRST = HookPoint(0, "resid_post")
MIDDLE = HookPoint(1, "resid_post")
LAST = HookPoint(2, "resid_post")
TEXT = list(range(10, 30))


@pytest.fixture
def copy_of(folder_of: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A folder of the test's own, to be spoilt."""
    return lambda family: shutil.copytree(folder_of(family), tmp_path / "model")


def resid(model: LanguageModel) -> torch.Tensor:
    return model.step([Segment(model.open_stream(), TEXT)])[model.hook_points[-1]]


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_needed_tensors_are_read(family: str, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(family)
    before = resid(load_language_model(folder, [MIDDLE]))
    path = folder / "model.safetensors"
    deeper = (
        ".h.2.",
        ".layers.2.",
        "lm_head",
        "embed_out",
        "ln_f",
        "gpt_neox.final_layer_norm",
        "decoder.final_layer_norm",
        "model.final_layernorm",
        "model.norm",
    )
    tensors = load_file(path)
    needed = {n: t for n, t in tensors.items() if not any(part in n for part in deeper)}
    assert len(needed) < len(tensors)
    save_file(needed, path)
    model = load_language_model(folder, [MIDDLE])
    assert torch.equal(resid(model), before)
    assert (model.config.n_layers, model.config.n_layers_total) == (2, 3)
    with pytest.raises(ModelLoadError, match=r"missing tensor .*\.2\..* and \d+ more"):
        load_language_model(folder, [LAST])


@pytest.mark.parametrize("family", FAMILIES)
def test_module_has_no_head_and_no_final_norm(
    family: str, folder_of: Callable[[str], Path]
) -> None:
    module = load_language_model(folder_of(family), [FIRST])._module
    assert not hasattr(module, "lm_head")
    names = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm", "phi": "final_layernorm"}
    norm = (names | {"opt": "decoder.final_layer_norm"}).get(family, "norm")
    assert isinstance(module.get_submodule(norm), nn.Identity)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_states_the_facts(family: str, folder_of: Callable[[str], Path]) -> None:
    config = load_language_model(folder_of(family), [FIRST, HookPoint(1, "resid_pre")]).config
    assert config.model_type == {"gemma3": "gemma3_text"}.get(family, family)
    assert (config.d_model, config.n_layers, config.n_layers_total) == (D_MODEL, 1, 3)
    assert (config.vocab_size, config.max_positions) == (N_PIECES, MAX_POSITIONS)
    assert (config.dtype, config.device) == (torch.float32, torch.device("cpu"))
    assert config.folder == folder_of(family)


def test_no_random_number_is_drawn(folder_of: Callable[[str], Path]) -> None:
    state = torch.get_rng_state()
    for family in FAMILIES:
        load_language_model(folder_of(family), [LAST])
    assert torch.equal(torch.get_rng_state(), state)


def test_every_weight_is_the_checkpoints(folder_of: Callable[[str], Path]) -> None:
    for family in FAMILIES:
        stored = load_file(folder_of(family) / "model.safetensors")
        loaded = load_language_model(folder_of(family), [LAST])._module.state_dict()
        for name, tensor in loaded.items():
            if ".experts." in name:
                continue  # see below
            if family == "mixtral":
                name = name.replace(".mlp.", ".block_sparse_moe.")
            names = [n for n in stored if n == name or n.endswith("." + name)]
            assert len(names) == 1
            assert torch.equal(stored[names[0]], tensor)


@pytest.mark.parametrize(
    ("family", "path", "gate", "up", "down"),
    [
        ("mixtral", "block_sparse_moe", "w1", "w3", "w2"),
        ("qwen2_moe", "mlp", "gate_proj", "up_proj", "down_proj"),
        ("qwen3_moe", "mlp", "gate_proj", "up_proj", "down_proj"),
    ],
)
def test_experts_are_fused_in_their_order(
    family: str, path: str, gate: str, up: str, down: str, folder_of: Callable[[str], Path]
) -> None:
    stored = load_file(folder_of(family) / "model.safetensors")
    model = load_language_model(folder_of(family), [LAST])
    experts = model._module.layers[2].mlp.experts
    for e in range(12):
        of_expert = f"model.layers.2.{path}.experts.{e}."
        expected = torch.cat([stored[f"{of_expert}{name}.weight"] for name in (gate, up)])
        assert torch.equal(experts.gate_up_proj[e], expected)
        assert torch.equal(experts.down_proj[e], stored[f"{of_expert}{down}.weight"])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_missing_expert_is_an_error(family: str, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of(family)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    first = {n: t for n, t in tensors.items() if ".layers.0." in n and ".experts.7." in n}
    assert len(first) == 3
    for name in first:
        save_file({n: t for n, t in tensors.items() if n != name}, path)
        with pytest.raises(ModelLoadError, match=r"experts\.\w+ (has shape \[11, |do not fit)"):
            load_language_model(folder, [FIRST])
    save_file({n: t for n, t in tensors.items() if n not in first}, path)
    with pytest.raises(ModelLoadError, match=r"gate_up_proj has shape \[11, .* expects \[12, "):
        load_language_model(folder, [FIRST])


def test_resid_before_the_first_block_needs_no_deeper_layer(
    folder_of: Callable[[str], Path],
) -> None:
    model = load_language_model(folder_of("llama"), [HookPoint(0, "resid_pre")])
    embedding = load_file(folder_of("llama") / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(resid(model), embedding[TEXT])


def test_replacing_the_file_does_not_change_a_loaded_model(
    copy_of: Callable[[str], Path],
) -> None:
    folder = copy_of("llama")
    model = load_language_model(folder, [LAST])
    before = resid(model)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    assert torch.equal(resid(model), before)


def test_shards_are_read_through_their_index(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("qwen3")
    before = resid(load_language_model(folder, [LAST]))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for index, name in enumerate(tensors):
        weight_map[name] = f"model-0000{index % 3 + 1}-of-00003.safetensors"
    for shard in sorted(set(weight_map.values())):
        save_file({n: tensors[n] for n, s in weight_map.items() if s == shard}, folder / shard)
    index_path = folder / "model.safetensors.index.json"
    index_path.write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(resid(load_language_model(folder, [LAST])), before)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="model-00002-of-00003.safetensors: not found"):
        load_language_model(folder, [LAST])


@pytest.mark.parametrize("prefix", ["", "model.language_model.", "language_model.model."])
def test_base_model_is_found_under_any_prefix(prefix: str, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("gemma3")
    before = resid(load_language_model(folder, [LAST]))
    tensors = load_file(folder / "model.safetensors")
    renamed = {prefix + n.removeprefix("model."): t for n, t in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    assert torch.equal(resid(load_language_model(folder, [LAST])), before)


def test_multimodal_config_gives_its_text_tower(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("gemma3")
    before = resid(load_language_model(folder, [LAST]))
    text_config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text_config})
    )
    model = load_language_model(folder, [LAST])
    assert torch.equal(resid(model), before)
    assert model.config.model_type == "gemma3_text"


def test_bfloat16_checkpoint_is_widened_exactly(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama")
    path = folder / "model.safetensors"
    rounded = {n: t.bfloat16() for n, t in load_file(path).items()}
    save_file({n: t.float() for n, t in rounded.items()}, path)
    expected = resid(load_language_model(folder, [LAST]))
    save_file(rounded, path)
    assert torch.equal(resid(load_language_model(folder, [LAST])), expected)


def test_hook_point_beyond_the_model_is_refused(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(HookPointError, match=r"blocks.3.hook_resid_post: .* has 3 layers"):
        load_language_model(folder_of("llama"), [FIRST, HookPoint(3, "resid_post")])


def test_parallel_residual_is_refused_before_weights_are_read(
    copy_of: Callable[[str], Path],
) -> None:
    folder = copy_of("gpt_neox")
    (folder / "model.safetensors").unlink()
    with pytest.raises(HookPointError, match="in parallel"):
        load_language_model(folder, [HookPoint(0, "resid_mid")])


def test_no_hook_points_are_refused(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(HookPointError, match="found none, expected at least one"):
        load_language_model(folder_of("llama"), [])


def assert_refused(folder: Path, match: str) -> None:
    with pytest.raises(ModelLoadError, match=match) as caught:
        load_language_model(folder, [FIRST])
    assert "\n" not in str(caught.value)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", "nowhere: not found, or not a folder")


def test_missing_config_is_named(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama")
    (folder / "config.json").unlink()
    assert_refused(folder, r"config.json: cannot be read \(No such file")


@pytest.mark.parametrize("text", ["{", "[1, 2]", "{}", '{"model_type": ["llama"]}'])
def test_malformed_config_is_named(text: str, copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama")
    (folder / "config.json").write_text(text)
    assert_refused(folder, "config.json: ")


def test_impossible_config_is_named(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama")
    edit_config(folder, hidden_size="wide")
    assert_refused(folder, "config.json: .*hidden_size")


def test_contradictory_config_is_named(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("gpt2")
    edit_config(folder, n_head=5)
    assert_refused(folder, "config.json: no such gpt2 model can be built")


def test_unsupported_family_is_named(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama")
    edit_config(folder, model_type="mamba")
    assert_refused(folder, "found model_type 'mamba', expected one of gpt2, gpt_neox, llama")


def test_quantized_checkpoint_is_refused(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama")
    edit_config(folder, quantization_config={"quant_method": "fp8"})
    assert_refused(folder, "found a quantized model")


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_batch_is_refused(
    rope_type: str, copy_of: Callable[[str], Path]
) -> None:
    folder = copy_of("llama")
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
    edit_config(
        folder, rope_parameters=rope | {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    )
    assert_refused(folder, f"found rope_type '{rope_type}'")


def test_missing_weights_are_named(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama")
    (folder / "model.safetensors").unlink()
    assert_refused(folder, "model.safetensors: not found")


def test_damaged_weights_are_named(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    assert_refused(folder, "model.safetensors: damaged or unreadable")


def test_missing_tensor_is_named_and_never_random(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("qwen2")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.self_attn.k_proj.bias"]
    save_file(tensors, path)
    assert_refused(folder, r"missing tensor model.layers.0.self_attn.k_proj.bias$")


def test_weights_of_another_model_are_refused(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama")
    save_file({"conv.weight": torch.zeros(2)}, folder / "model.safetensors")
    assert_refused(folder, "no tensor embed_tokens.weight under any of the known prefixes")


def test_wrong_shape_is_named(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llama")
    edit_config(folder, intermediate_size=48)
    assert_refused(
        folder, r"mlp.gate_proj.weight has shape \[64, 32\], config.json expects \[48, 32\]"
    )


def test_tensor_under_two_names_is_refused(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("mixtral")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    old = "model.layers.0.block_sparse_moe.gate.weight"
    tensors["model.layers.0.mlp.gate.weight"] = tensors[old].clone()
    save_file(tensors, path)
    assert_refused(folder, "the 2 parts of model.layers.0.mlp.gate.weight do not fit together")
