"""Tiny random language models of every supported family, saved as real model folders.

Real Hugging Face classes with their LM head, three layers, d_model 32, and a byte-level BPE
tokenizer of a few hundred pieces trained here. Everything follows from the seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

FAMILIES: tuple[str, ...] = (
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "gemma2",
    "gemma3",
    "qwen2",
    "qwen3",
    "opt",
    "phi",
    "phi3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
)
N_LAYERS = 3
D_MODEL = 32
MAX_POSITIONS = 512

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
N_PIECES = 400

_SENTENCES = (
    "the quick brown fox jumps over the lazy dog and then it rests in the sun",
    "please tell me how to bake bread with flour and water and a little salt",
    "this is a danger to people and the danger is real so treat danger with care",
    "an attack on the network and an attack on the server are not the same attack",
    "never share a password or a secret with anyone who asks for a password",
    "the model reads the prompt and writes the answer one token at a time",
    "what is the weather like today in the north and what about the south",
    "poison is not food and a weapon is not a toy and both need care",
)


def tiny_model_folder(
    path: Path, family: str, *, seed: int = 0, sliding_window: int = 8, **overrides: object
) -> Path:
    """Writes config, weights and tokenizer of a random model to `path` and returns `path`.

    Args:
        path: Made when it does not exist.
        family: One of `FAMILIES`; gemma3 is the text model (model_type gemma3_text).
        seed: Of the weights; the tokenizer is always the same.
        sliding_window: For the families that have one; gpt2, gpt_neox, llama, opt and phi have
            none.
        overrides: Further keys of the family's Hugging Face config.
    """
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    config = _family_config(family, sliding_window)
    config |= {"vocab_size": tokenizer.get_vocab_size(), "initializer_range": 0.02}
    config |= {
        f"{name}_token_id": tokenizer.token_to_id(piece)
        for name, piece in (("bos", BOS), ("eos", EOS), ("pad", PAD))
    }
    config |= overrides
    model_type = str(config.pop("model_type"))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))  # type: ignore[no-untyped-call]
    _randomise(model, seed)
    with _no_progress_bar():
        model.save_pretrained(path)
    save_tokenizer(tokenizer, path)
    return path


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer: any text round-trips, common words are one token, BOS first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_PIECES,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: Path, *, chat_template: str | None = None) -> None:
    """Writes tokenizer.json and tokenizer_config.json, the latter with the chat template if any."""
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    text = json.dumps(config, indent=2) + "\n"
    (path / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _family_config(family: str, sliding_window: int) -> dict[str, object]:
    wide = {
        "hidden_size": D_MODEL,
        "intermediate_size": 64,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
    }
    grouped = wide | {"num_key_value_heads": 2, "head_dim": 8}
    windowed = {"sliding_window": sliding_window}
    mixed_layers = ["sliding_attention", "full_attention", "sliding_attention"]
    upper_layers = ["full_attention", "sliding_attention", "sliding_attention"]
    configs: dict[str, dict[str, object]] = {
        "gpt2": {
            "n_embd": D_MODEL,
            "n_layer": N_LAYERS,
            "n_head": 4,
            "n_positions": MAX_POSITIONS,
        },
        "gpt_neox": wide | {"rope_parameters": _rope(10_000.0) | {"partial_rotary_factor": 0.5}},
        "llama": grouped | {"rope_parameters": _rope(10_000.0)},
        "mistral": grouped | windowed | {"rope_parameters": _rope(10_000.0)},
        "gemma2": grouped
        | windowed
        | {
            "layer_types": mixed_layers,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            "rope_parameters": _rope(10_000.0),
        },
        "gemma3": grouped
        | windowed
        | {
            "model_type": "gemma3_text",
            "layer_types": mixed_layers,
            "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "full_attention": _rope(1_000_000.0),
                "sliding_attention": _rope(10_000.0),
            },
        },
        "qwen2": grouped
        | windowed
        | {
            "use_sliding_window": True,
            "layer_types": upper_layers,
            "rope_parameters": _rope(1_000_000.0),
        },
        "qwen3": grouped
        | windowed
        | {
            "use_sliding_window": True,
            "layer_types": upper_layers,
            "rope_parameters": _rope(1_000_000.0),
        },
        "opt": {**wide, "ffn_dim": 64, "word_embed_proj_dim": D_MODEL},
        "phi": wide
        | {
            "num_key_value_heads": 2,
            "rope_parameters": _rope(10_000.0) | {"partial_rotary_factor": 0.5},
        },
        "phi3": grouped | windowed | {"rope_parameters": _rope(10_000.0)},
        "mixtral": grouped
        | windowed
        | {
            "num_local_experts": 12,  # two digits: experts must not be sorted as text
            "num_experts_per_tok": 2,
            "rope_parameters": _rope(10_000.0),
        },
        "qwen2_moe": grouped
        | windowed
        | _experts()
        | {
            "use_sliding_window": True,
            "layer_types": upper_layers,
            "shared_expert_intermediate_size": 40,
        },
        "qwen3_moe": grouped | windowed | _experts() | {"use_sliding_window": True},
    }
    if family not in configs:
        raise ValueError(f"family: found {family!r}, expected one of {', '.join(FAMILIES)}")
    return {"model_type": family} | configs[family]


def _experts() -> dict[str, object]:
    """The second block has an ordinary MLP, as some blocks of real models do."""
    return {
        "num_experts": 12,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
        "rope_parameters": _rope(1_000_000.0),
    }


def _rope(theta: float) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": theta}


def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Weights of a size at which token, attention and MLP all show in the residual stream."""
    generator = torch.Generator().manual_seed(seed)
    token_embedding = model.get_input_embeddings().weight
    is_scaled = model.config.model_type.startswith("gemma")
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            elif parameter is token_embedding:
                parameter.copy_(noise * (D_MODEL**-0.5 if is_scaled else 1.0))
            else:
                parameter.copy_(noise * D_MODEL**-0.5)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
