"""A Hugging Face model folder -> LanguageModel, reading only the layers that are needed.

The base model is built without LM head, cut after the deepest hook point, its final norm replaced
by Identity; exactly its tensors are read from the safetensors files (see `checkpoint`). Nothing is
ever initialised at random: a tensor that the checkpoint lacks is an error. Knows nothing of GGUF
(see `gguf`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModel, PretrainedConfig

from sae_core.errors import HookPointError, ModelLoadError
from sae_core.hook_points import HookPoint, ModulePath, n_layers_needed
from sae_core.language_model.checkpoint import fill, one_line
from sae_core.language_model.compiled_rows import (
    Rows,
    choose_rows,
    compile_norms,
    compile_rotations,
)
from sae_core.language_model.device_map import DeviceMap
from sae_core.language_model.families import FAMILIES, SUPPORTED_MODEL_TYPES
from sae_core.language_model.freed_memory import give_back_freed_memory, keep_freed_memory
from sae_core.language_model.mirrored import Peers
from sae_core.language_model.model import LanguageModel, LanguageModelConfig
from sae_core.language_model.packed import register_packed_attention
from sae_core.language_model.products import Products, choose_products, fuse_gates
from sae_core.language_model.sites import locate
from sae_core.language_model.span_attention import Attention
from sae_core.language_model.tensor_parallel import check_whole, split, split_plan

_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that depend on a token's own position only. Others (dynamic, longrope) depend
on the longest sequence of the batch, so that a stream's numbers would change with its company."""


def load_language_model(
    folder: str | Path,
    hook_points: Iterable[HookPoint],
    *,
    device: str | torch.device | Sequence[torch.device] = "cpu",
    dtype: torch.dtype = torch.float32,
    products: Products = "auto",
    attention: Attention = "auto",
    rows: Rows = "auto",
    peers: Peers | None = None,
) -> LanguageModel:
    """Loads what is needed of the model in `folder` to read `hook_points`.

    Args:
        folder: config.json beside model.safetensors, or beside shards and their index.
        hook_points: At least one; they decide how many layers are loaded.
        device: Where weights, keys and values live; several, for the blocks to be spread over
            (see `device_map`).
        dtype: Of weights and activations, whatever the checkpoint's.
        products: The library that multiplies matrices on the CPU; see `products`.
        attention: What attends from several tokens of a stream there; see `span_attention`.
        rows: What norms rows and attends from single tokens there; see `compiled_rows`.
        peers: Where every rank holds a part only (see `ranks`), this one's link to the others.

    Raises:
        ModelLoadError: The folder is missing, damaged, incomplete or of an unsupported family.
        HookPointError: A hook point is deeper than the model, or the family has no such place.
    """
    folder, wanted = Path(folder), tuple(hook_points)
    if not wanted:
        raise HookPointError("hook points: found none, expected at least one")
    config = _read_config(folder)
    n_layers_total = config.num_hidden_layers
    n_layers = max(1, n_layers_needed(wanted))
    if n_layers > n_layers_total:
        deepest = max(wanted, key=lambda h: n_layers_needed([h]))
        raise HookPointError(
            f"hook point {deepest}: the model in {folder} has {n_layers_total} layers"
        )
    try:
        module = _empty_model(config, n_layers)
    except (StrictDataclassError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ModelLoadError(
            f"{folder / 'config.json'}: no such {config.model_type} model can be built "
            f"({one_line(error)})"
        ) from error
    for hook_point in wanted:
        locate(module, hook_point)
    if peers is not None:
        plan = split_plan(module, peers.n_ranks)
        check_whole(module, plan, wanted)
        split(module, plan, peers.join())
    devices = [torch.device(device)] if isinstance(device, str | torch.device) else list(device)
    places = DeviceMap(module, config.model_type, devices)
    fill(module, config.model_type, folder, places=places, dtype=dtype)
    if peers is not None:
        peers.wait_until_loaded()
    library = row_loops = "torch"
    if peers is None and {d.type for d in devices} == {"cpu"}:
        row_loops = choose_rows(module, dtype, rows, products)
        if row_loops == "compiled":
            compile_norms(module)
            compile_rotations(module)
        library = choose_products(module, products)
        # A hook point that is a module's path may be a gate, or its function.
        if library == "onednn" and not any(isinstance(h, ModulePath) for h in wanted):
            fuse_gates(module)
    facts = LanguageModelConfig(
        model_type=config.model_type,
        d_model=config.hidden_size,
        n_layers=n_layers,
        n_layers_total=n_layers_total,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        folder=folder,
        dtype=dtype,
        devices=tuple(devices),
        n_ranks=1 if peers is None else peers.n_ranks,
        products=library,
        rows=row_loops,
    )
    give_back_freed_memory()
    if any(d.type == "cpu" for d in devices):
        keep_freed_memory()
    return LanguageModel(module, facts, wanted, attention=attention if peers is None else "torch")


def _read_config(folder: Path) -> Any:
    """The text tower's config; Any, because its fields are the family's."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelLoadError(f"model folder {folder}: not found, or not a folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ModelLoadError(f"{path}: not JSON ({error})") from error
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if model_type not in (*SUPPORTED_MODEL_TYPES, "gemma3"):
        raise ModelLoadError(
            f"{path}: found model_type {model_type!r}, "
            f"expected one of {', '.join(SUPPORTED_MODEL_TYPES)}, gemma3"
        )
    if raw.get("quantization_config"):
        raise ModelLoadError(f"{path}: found a quantized model, expected plain floating point")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
    except (StrictDataclassError, ValueError, TypeError, KeyError, OSError) as error:
        raise ModelLoadError(f"{path}: {one_line(error)}") from error
    _check_attention(path, config)
    return config


def _check_attention(path: Path, config: Any) -> None:
    if getattr(config, "use_bidirectional_attention", False):
        raise ModelLoadError(f"{path}: found bidirectional attention, expected a causal model")
    rope = getattr(config, "rope_parameters", None) or {}
    flat = [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, Mapping)]
    for parameters in flat:
        rope_type = parameters.get("rope_type", "default")
        if rope_type not in _STATIC_ROPE:
            raise ModelLoadError(
                f"{path}: found rope_type {rope_type!r}, which depends on the length of the "
                f"longest sequence in a batch; expected one of {', '.join(_STATIC_ROPE)}"
            )


def _empty_model(config: PretrainedConfig, n_layers: int) -> nn.Module:
    """The truncated base model with unset weights and computed buffers, final norm taken out."""
    config.num_hidden_layers = n_layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:n_layers]
    config.pad_token_id = None  # there is no padding; keeps transformers from looking for it
    config.use_cache = False
    register = register_packed_attention()
    with _NoRandomInit():
        module: nn.Module = AutoModel.from_config(  # type: ignore[no-untyped-call]
            config, attn_implementation=register, dtype=torch.float32
        )
    family = FAMILIES[config.model_type]
    for path in (family.final_norm, *family.after_norm):
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, nn.Identity())
    return module.eval().requires_grad_(False)


class _NoRandomInit(TorchFunctionMode):
    """While active, in this thread, random initialisation leaves a tensor as it is."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _RANDOM_INITS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


_RANDOM_INITS = frozenset(
    ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_")
    + ("xavier_uniform_", "xavier_normal_", "orthogonal_")
)
