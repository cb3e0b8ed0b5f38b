"""A GGUF written here by the gguf package, converted and compared with where it came from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sae_core.errors import ModelLoadError
from sae_core.hook_points import HookPoint
from sae_core.language_model.gguf import convert_gguf, digest_folder, verify_folder
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import Segment
from sae_core.language_model.tokenizer import load_tokenizer
from sae_core.testing.models import tiny_model_folder

NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"]
WORDS = ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "abc"]
TOKENS = [
    *SPECIAL,
    "\n\n",
    "  ",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    *WORDS,
]


def write_gguf(
    path: Path,
    source: Path,
    *,
    architecture: str = "gemma3",
    matrix_type: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    without: str = "",
) -> Path:
    """The tiny Gemma 3 in `source` as llama.cpp would store it, norms with one added."""
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(config["sliding_window"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    kinds = [3] * len(SPECIAL) + [4, 4] + [6] * 256 + [1] * len(WORDS)
    if without != "token_type":
        writer.add_token_types(kinds)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    for name, tensor in load_file(source / "model.safetensors").items():
        layer, _, rest = name.removeprefix("model.").removesuffix(".weight").rpartition("layers.")
        index, _, part = rest.partition(".") if rest[:1].isdigit() else ("", "", rest)
        assert layer == ""
        stored = f"blk.{index}.{NAMES[part]}.weight" if index else f"{NAMES[part]}.weight"
        values = tensor.float().numpy()
        if "norm" in stored:
            writer.add_tensor(stored, values + 1)
        elif matrix_type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(stored, values)
        else:
            packed = gguf.quants.quantize(values, matrix_type)
            writer.add_tensor(stored, packed, raw_dtype=matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # one full-attention layer at the end of every six, as the conversion takes for granted
    layers = ["sliding_attention"] * 5 + ["full_attention"]
    return tiny_model_folder(
        tmp_path_factory.mktemp("gemma3") / "model",
        "gemma3",
        num_hidden_layers=6,
        layer_types=layers,
        query_pre_attn_scalar=8,
        vocab_size=len(TOKENS),
    )


def quiet(what: str, share: float) -> None:
    """A progress callback that says nothing."""


def test_converted_model_computes_what_its_source_does(source: Path, tmp_path: Path) -> None:
    steps: list[tuple[str, float]] = []
    convert_gguf(
        write_gguf(tmp_path / "tiny.gguf", source),
        tmp_path / "out",
        progress=lambda what, share: steps.append((what, share)),
    )
    hook_point = HookPoint(5, "resid_post")
    ids = list(range(0, 200, 7))
    found, expected = (
        model.step([Segment(model.open_stream(), ids)])[hook_point]
        for model in (
            load_language_model(folder, [hook_point]) for folder in (tmp_path / "out", source)
        )
    )
    # the source is float32, what is converted bfloat16
    assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).min() > 0.999
    stored = load_file(source / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.allclose(tensor.float(), stored[name].float(), rtol=2**-8, atol=1e-6)
    shares = [share for _, share in steps]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)


@pytest.mark.parametrize("kind", ["Q8_0", "F16", "BF16", "Q4_0"])
def test_quantized_tensors_are_decoded(kind: str, source: Path, tmp_path: Path) -> None:
    matrix_type = gguf.GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "tiny.gguf", source, matrix_type=matrix_type)
    convert_gguf(path, tmp_path / "out", progress=quiet)
    weights = load_file(tmp_path / "out/model.safetensors")
    name = "model.layers.3.mlp.down_proj.weight"
    values = load_file(source / "model.safetensors")[name].numpy()
    packed = gguf.quants.quantize(values, matrix_type)
    expected = torch.from_numpy(np.asarray(gguf.quants.dequantize(packed, matrix_type), "f4"))
    assert torch.equal(weights[name], expected.bfloat16())


def test_converted_tokenizer_merges_in_order_of_ids(source: Path, tmp_path: Path) -> None:
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", source), tmp_path / "out", progress=quiet)
    tokenizer = load_tokenizer(tmp_path / "out")
    ids = tokenizer.encode(" abc  a\n\n<start_of_turn>é")
    pieces = [TOKENS[i] for i in ids]
    assert pieces == ["<bos>", "▁ab", "c", "  ", "a", "\n\n", "<start_of_turn>", "<0xC3>", "<0xA9>"]
    assert "".join(tokenizer.token_texts(ids)) == "<bos> abc  a\n\n<start_of_turn>é"
    assert tokenizer.bos_id == 2
    assert tokenizer.special_ids == set(range(len(SPECIAL)))
    assert tokenizer.render_chat([("user", "ab")]).roles == [None, "user"]


def test_conversion_is_the_same_every_time(source: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", source)
    convert_gguf(path, tmp_path / "a", progress=quiet)
    convert_gguf(path, tmp_path / "b", progress=quiet)
    assert verify_folder(tmp_path / "a") == digest_folder(tmp_path / "b")


def test_failed_conversion_leaves_what_was_there(source: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", source)
    out = tmp_path / "cache" / "out"
    convert_gguf(path, out, progress=quiet)
    before = verify_folder(out)
    size = path.stat().st_size
    os.truncate(path, size - 5000)
    with pytest.raises(ModelLoadError, match="is cut off"):
        convert_gguf(path, out, progress=quiet)
    assert verify_folder(out) == before
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


def test_interrupted_conversion_leaves_nothing(source: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", source)

    def interrupt(what: str, share: float) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_gguf(path, tmp_path / "cache" / "out", progress=interrupt)
    assert list((tmp_path / "cache").iterdir()) == []


def test_conversion_replaces_an_older_folder(source: Path, tmp_path: Path) -> None:
    path, out = write_gguf(tmp_path / "tiny.gguf", source), tmp_path / "cache" / "out"
    out.mkdir(parents=True)
    (out / "leftover").write_text("x")
    convert_gguf(path, out, progress=quiet)
    verify_folder(out)
    assert not (out / "leftover").exists()
    assert [entry.name for entry in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda data: b"", "cannot be read"),
        (lambda data: b"PK\x03\x04" + data[4:], "expected b'GGUF' version 2 or 3"),
        (lambda data: data[:4] + b"\x01" + data[5:], "version 1, expected"),
        (lambda data: data[:700], "damaged GGUF header"),
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "damaged GGUF header"),
    ],
)
def test_damaged_header_is_named(
    spoil: Callable[[bytes], bytes], match: str, source: Path, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", source)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ModelLoadError, match=match) as caught:
        convert_gguf(path, tmp_path / "out", progress=quiet)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="nowhere.gguf: cannot be read"):
        convert_gguf(tmp_path / "nowhere.gguf", tmp_path / "out", progress=quiet)


def test_other_architecture_is_refused(source: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", source, architecture="llama")
    with pytest.raises(ModelLoadError, match="architecture 'llama', expected gemma3"):
        convert_gguf(path, tmp_path / "out", progress=quiet)


def test_missing_metadata_is_named(source: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", source, without="token_type")
    with pytest.raises(ModelLoadError, match="metadata lacks 'tokenizer.ggml.token_type'"):
        convert_gguf(path, tmp_path / "out", progress=quiet)
