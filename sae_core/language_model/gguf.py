"""A GGUF file -> a model folder: bfloat16 safetensors, config, tokenizer, checksums.

For Gemma 3 text models, the family of the embedded default; other models come as safetensors.
What is written depends on the GGUF alone, not on the versions of any library, so that the folder's
digest is the same on every machine.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_core.errors import ModelLoadError
from sae_core.language_model.checksums import digest_folder, verify_folder, write_checksums
from sae_core.language_model.gguf_file import GGUFFile

__all__ = ["convert_gguf", "digest_folder", "verify_folder"]

Progress = Callable[[str, float], None]
"""What is being done, and the share of the whole conversion that is done, 0 to 1."""

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_CONTROL, _USER_DEFINED = 3, 4
"""Token types of llama.cpp's vocabularies: special tokens, and texts that always match whole."""

_GLOBAL_EVERY = 6
"""Gemma 3 has five sliding-window layers, then one that attends to everything."""
_LOCAL_ROPE_THETA = 10_000.0
_LAYERS_OF_27B = 62
"""The one Gemma 3 whose query scale is d_model / n_heads, not the width of a head; as llama.cpp."""


def convert_gguf(gguf_path: str | Path, out_folder: str | Path, *, progress: Progress) -> None:
    """Writes the model of a GGUF file to `out_folder`, all of it or nothing.

    The folder is put together under another name beside it and renamed when complete; one that
    is already there is replaced then.

    Raises:
        ModelLoadError: The file is missing, damaged, not a Gemma 3 text model, or the disk is full.
    """
    path, out = Path(gguf_path), Path(out_folder)
    if importlib.util.find_spec("gguf") is None:
        raise ModelLoadError(
            "converting a GGUF file needs the gguf package: pip install 'sae-monitor[demo]'"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            folder = work / "new"
            folder.mkdir()
            _convert(path, folder, progress)
            if out.exists():
                out.rename(work / "old")
            folder.rename(out)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise ModelLoadError(f"converting {path} to {out}: {error}") from error
    progress("done", 1.0)


def _convert(path: Path, folder: Path, progress: Progress) -> None:
    progress("reading the header", 0.0)
    with GGUFFile(path) as gguf:
        architecture = gguf.metadata.get("general.architecture")
        if architecture != "gemma3":
            raise ModelLoadError(
                f"{path}: found a GGUF of architecture {architecture!r}, expected gemma3"
            )
        try:
            _write_json(folder / "config.json", _config(gguf))
            progress("building the tokenizer", 0.05)
            _write_tokenizer(gguf, folder)
        except (KeyError, IndexError) as error:
            raise ModelLoadError(f"{path}: the GGUF's metadata lacks {error}") from error
        _write_weights(gguf, folder, progress)
    progress("computing checksums", 0.95)
    write_checksums(folder)


def _config(gguf: GGUFFile) -> dict[str, object]:
    """Hugging Face's config.json for the model."""
    facts = {
        key.removeprefix("gemma3."): value
        for key, value in gguf.metadata.items()
        if key.startswith("gemma3.")
    }
    n_layers, n_heads = facts["block_count"], facts["attention.head_count"]
    d_model, head_dim = facts["embedding_length"], facts["attention.key_length"]
    global_rope: dict[str, object] = {
        "rope_type": "default",
        "rope_theta": facts.get("rope.freq_base", 1_000_000.0),
    }
    if facts.get("rope.scaling.type", "none") != "none":
        global_rope["rope_type"] = facts["rope.scaling.type"]
        global_rope["factor"] = facts["rope.scaling.factor"]
    special = {
        "bos_token_id": "tokenizer.ggml.bos_token_id",
        "eos_token_id": "tokenizer.ggml.eos_token_id",
        "pad_token_id": "tokenizer.ggml.padding_token_id",
    }
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "dtype": "bfloat16",
        "vocab_size": len(gguf.metadata["tokenizer.ggml.tokens"]),
        "hidden_size": d_model,
        "intermediate_size": facts["feed_forward_length"],
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": facts["attention.head_count_kv"],
        "head_dim": head_dim,
        "query_pre_attn_scalar": d_model // n_heads if n_layers == _LAYERS_OF_27B else head_dim,
        "max_position_embeddings": facts["context_length"],
        "sliding_window": facts["attention.sliding_window"],
        "layer_types": [
            "sliding_attention" if (layer + 1) % _GLOBAL_EVERY else "full_attention"
            for layer in range(n_layers)
        ],
        "rope_parameters": {
            "full_attention": global_rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": _LOCAL_ROPE_THETA},
        },
        # float32 in the file; its shortest decimal form is what the model was trained with
        "rms_norm_eps": float(str(np.float32(facts["attention.layer_norm_rms_epsilon"]))),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        **{name: gguf.metadata[key] for name, key in special.items() if key in gguf.metadata},
    }


def _write_weights(gguf: GGUFFile, folder: Path, progress: Progress) -> None:
    total = sum(np.prod(info.shape) for info in gguf.tensors.values())
    done = 0
    tensors: dict[str, Tensor] = {}
    for name, info in gguf.tensors.items():
        weight = torch.empty(info.shape, dtype=torch.bfloat16)
        rows = weight.view(-1, info.shape[-1])
        for first, block in gguf.blocks(name):
            if name.endswith("norm.weight"):
                block = block - 1  # llama.cpp multiplies by the stored value, Gemma by 1 + weight
            rows[first : first + len(block)] = torch.from_numpy(block)
            done += block.size
            progress("dequantizing weights", 0.15 + 0.7 * done / total)
        tensors[_tensor_name(gguf.path, name)] = weight
    progress("writing weights", 0.85)
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors makes it private to its owner; a cache may be shared


def _tensor_name(path: Path, name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in _IN_BLOCK:
        raise ModelLoadError(f"{path}: tensor {name} is not part of a Gemma 3 text model")
    return f"model.layers.{match[1]}.{_IN_BLOCK[match[2]]}.weight"


def _write_tokenizer(gguf: GGUFFile, folder: Path) -> None:
    """The BPE tokenizer that the file's SentencePiece vocabulary stands for.

    The file has no merges; every way to split a piece into two others is one, in the order of
    the piece's id, which in Gemma's vocabulary is the order in which merges were learned.
    """
    if gguf.metadata.get("tokenizer.ggml.model") != "llama":
        raise ModelLoadError(
            f"{gguf.path}: found a {gguf.metadata.get('tokenizer.ggml.model')!r} vocabulary, "
            "expected 'llama' (SentencePiece)"
        )
    texts: list[str] = gguf.metadata["tokenizer.ggml.tokens"]
    # Runs of spaces are spelled as spaces here, and like all spaces in pieces by the merges.
    pieces = ["\u2581" * len(t) if " " in t and not t.strip() else t for t in texts]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in pieces
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    added = [
        {
            "id": token_id,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for token_id, (text, kind) in enumerate(
            zip(texts, gguf.metadata["tokenizer.ggml.token_type"], strict=True)
        )
        if kind == _CONTROL or (kind == _USER_DEFINED and vocab.get(text) == token_id)
    ]
    names = {
        f"{name}_token": pieces[gguf.metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    bos = {"id": names["bos_token"], "ids": [vocab[names["bos_token"]]]}
    first: list[object] = [{"SpecialToken": {"id": bos["id"], "type_id": 0}}]
    sequence: list[object] = [{"Sequence": {"id": "A", "type_id": 0}}]
    second: list[object] = [
        {"SpecialToken": {"id": bos["id"], "type_id": 1}},
        {"Sequence": {"id": "B", "type_id": 1}},
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": first + sequence,
            "pair": first + sequence + second,
            "special_tokens": {bos["id"]: bos | {"tokens": [bos["id"]]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": names["unk_token"],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    text = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        names | {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True},
    )
    template = gguf.metadata.get("tokenizer.chat_template")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
