"""Checkpoints on disk -> SAE: one module per format, and the one door to them all.

attention_sae        NAME.pt + NAME_cfg.json: attention outputs of GPT-2 small
circuit_tracer       layer_N.safetensors, config.yaml beside: transcoders, one a layer
dictionary_learning  config.json + ae.pt: saprmarks/dictionary_learning, seven classes
gemma_scope          params.npz: Gemma Scope, for Gemma 2
gemma_scope_2        params.safetensors, config.json in most folders: Gemma Scope 2, for Gemma 3
goodfire             *.pt, *.pth with encoder_linear.*: Goodfire, qresearch
llama_scope          hyperparams.json + checkpoints/final.safetensors: lm-saes 1.0
llama_scope_r1       config.json + sae_weights.safetensors with encoder.*: lm-saes 2.0 beta
llamascopium         config.json + sae_weights.safetensors or .pt with W_E
openai               *.pt with pre_bias and latent_bias: GPT-2 small
qwen_scope           layer<N>.sae.pt
saelens              cfg.json + sae_weights.safetensors: SAELens 6, 5 and older; also written
sparsify             cfg.json + sae.safetensors: EleutherAI's, SAEs and transcoders

A format is told by the names of its files and of what is in them, never by the shapes of its
tensors. To add one: its module, and its row in `FORMATS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

from sae_core.errors import SAEFormatError, ShapeError
from sae_core.formats.attention_sae import is_attention_sae, read_attention_sae
from sae_core.formats.circuit_tracer import is_circuit_tracer, read_circuit_tracer
from sae_core.formats.dictionary_learning import is_dictionary_learning, read_dictionary_learning
from sae_core.formats.gemma_scope import is_gemma_scope, read_gemma_scope
from sae_core.formats.gemma_scope_2 import is_gemma_scope_2, read_gemma_scope_2
from sae_core.formats.goodfire import is_goodfire, read_goodfire
from sae_core.formats.llama_scope import is_llama_scope, read_llama_scope
from sae_core.formats.llama_scope_r1 import is_llama_scope_r1, read_llama_scope_r1
from sae_core.formats.llamascopium import is_llamascopium, read_llamascopium
from sae_core.formats.openai import is_openai, read_openai
from sae_core.formats.qwen_scope import is_qwen_scope, read_qwen_scope
from sae_core.formats.saelens import is_saelens, read_saelens
from sae_core.formats.sparsify import is_sparsify, read_sparsify
from sae_core.sae import SAE


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One way in which SAEs are published."""

    name: str
    """What the hint `format` calls it."""
    looks_like: str
    """Its files, for the message that says what would have been read."""
    recognises: Callable[[Path], bool]
    """By names alone: of files, of the keys of a config, of tensors."""
    read: Callable[..., SAE]
    """Takes the path and, by name, any of `hints`."""
    hints: Mapping[str, type] = field(default_factory=dict)
    """Facts that its files may lack and the caller may give, each with its type."""


FORMATS: tuple[Format, ...] = (
    Format(
        name="attention_sae",
        looks_like="NAME.pt beside NAME_cfg.json",
        recognises=is_attention_sae,
        read=read_attention_sae,
    ),
    Format(
        name="circuit_tracer",
        looks_like="layer_N.safetensors",
        recognises=is_circuit_tracer,
        read=read_circuit_tracer,
    ),
    Format(
        name="dictionary_learning",
        looks_like="a folder with config.json and ae.pt",
        recognises=is_dictionary_learning,
        read=read_dictionary_learning,
        hints={"active_groups": int, "fold_decoder_norms": bool, "use_threshold": bool},
    ),
    Format(
        name="gemma_scope",
        looks_like="params.npz",
        recognises=is_gemma_scope,
        read=read_gemma_scope,
        hints={"embedding_scale": float},
    ),
    Format(
        name="gemma_scope_2",
        looks_like="a folder with params.safetensors",
        recognises=is_gemma_scope_2,
        read=read_gemma_scope_2,
    ),
    Format(
        name="goodfire",
        looks_like="a .pt or .pth file with encoder_linear.weight, or encoder.* and decoder.* only",
        recognises=is_goodfire,
        read=read_goodfire,
        hints={"k": int},
    ),
    Format(
        name="llama_scope",
        looks_like="a folder with hyperparams.json and checkpoints/final.safetensors",
        recognises=is_llama_scope,
        read=read_llama_scope,
        hints={"training_scale": bool},
    ),
    Format(
        name="llama_scope_r1",
        looks_like="a folder with config.json and sae_weights.safetensors with encoder.weight",
        recognises=is_llama_scope_r1,
        read=read_llama_scope_r1,
    ),
    Format(
        name="llamascopium",
        looks_like="a folder with config.json and sae_weights.safetensors or .pt with W_E",
        recognises=is_llamascopium,
        read=read_llamascopium,
    ),
    Format(
        name="openai",
        looks_like="a .pt file with pre_bias and latent_bias",
        recognises=is_openai,
        read=read_openai,
    ),
    Format(
        name="qwen_scope",
        looks_like="a file layer<N>.sae.pt with W_enc and W_dec",
        recognises=is_qwen_scope,
        read=read_qwen_scope,
        hints={"k": int},
    ),
    Format(
        name="saelens",
        looks_like="a folder with cfg.json and sae_weights.safetensors",
        recognises=is_saelens,
        read=read_saelens,
        hints={"norm_scaling_factor": float, "normalize_activations": str},
    ),
    Format(
        name="sparsify",
        looks_like="a folder with cfg.json and sae.safetensors",
        recognises=is_sparsify,
        read=read_sparsify,
        hints={"transcode": bool},
    ),
)

TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
LISTED_FILES = 12
"""Names of found files in a message; more would bury the sentence."""
RELEASE_DEPTH = 3
"""How deep releases nest their SAEs: Gemma Scope has layer, width and sparsity."""


def load_sae(
    path: str | Path,
    *,
    subfolder: str | None = None,
    weights_file: str | None = None,
    format: str | None = None,
    hook_point: str | None = None,
    model_name: str | None = None,
    center: bool | None = None,
    processing: str | None = None,
    **hints: object,
) -> SAE:
    """The SAE at `path`, a folder or a file of any format in `FORMATS`.

    Only headers are read: `SAE.slice` reads the latents that it is asked for.

    Args:
        subfolder: A folder below `path`, for releases that hold many SAEs.
        weights_file: A file in that folder, for releases of one file per SAE.
        format: The name of the format, where the files alone leave it open.
        hook_point: Where it reads, over what its files say.
        model_name: The model that it was trained on, over what its files say.
        center: Whether it reads x - mean(x), as SAEs of centred models do.
        processing: `default` for one trained on a model that TransformerLens had processed, `none`
            otherwise; the scorer converts activations, or refuses.
        hints: Facts that a format leaves out of its files, such as `k`; one that the format does
            not know is refused.

    Raises:
        SAEFormatError: names file, key, what was found and what was expected.
    """
    _check_types(path, subfolder=subfolder, weights_file=weights_file, format=format)
    _check_types(path, hook_point=hook_point, model_name=model_name)
    if processing not in (None, "none", "default"):
        raise SAEFormatError(
            f"{path}: hint processing: found {processing!r}, expected none or default"
        )
    if center is not None and type(center) is not bool:
        raise SAEFormatError(f"{path}: hint center: found {center!r}, expected true or false")
    place = Path(path)
    for name, part in (("subfolder", subfolder), ("weights_file", weights_file)):
        if part is None:
            continue
        if Path(part).is_absolute() or ".." in Path(part).parts:
            raise SAEFormatError(f"{path}: hint {name}: found {part!r}, expected a place inside it")
        place = place / part
    if not place.exists():
        raise SAEFormatError(f"{place}: does not exist, expected an SAE checkpoint")
    known = _format_of(place, format)
    for hint, value in sorted(hints.items()):
        if hint not in known.hints:
            accepted = ", ".join(sorted(known.hints)) or "none"
            raise SAEFormatError(
                f"{place}: {known.name} has no hint {hint!r}, accepted hints: {accepted}"
            )
        expected = known.hints[hint]
        is_number = expected is float and type(value) is int
        if type(value) is not expected and not is_number:
            raise SAEFormatError(
                f"{place}: hint {hint}: found {value!r}, expected {TYPE_NAMES[expected]}"
            )
    try:
        sae = known.read(place, **hints)
    except ShapeError as error:
        raise SAEFormatError(f"{place}: {error}") from error
    card = sae.card
    if hook_point is not None:
        card = replace(card, hook_point=hook_point)
    if model_name is not None:
        card = replace(card, model_name=model_name)
    if processing is not None:
        card = replace(card, processing=cast('Literal["none", "default"]', processing))
    config = sae.config if center is None else replace(sae.config, center_input=center)
    return sae.replaced(config=config, card=card)


def _check_types(path: str | Path, **texts: object) -> None:
    for name, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise SAEFormatError(f"{path}: hint {name}: found {value!r}, expected text")


def _format_of(path: Path, name: str | None) -> Format:
    if name is not None:
        for known in FORMATS:
            if known.name == name:
                return known
        names = ", ".join(known.name for known in FORMATS)
        raise SAEFormatError(f"{path}: format is {name!r}, expected one of {names}")
    fitting = [known for known in FORMATS if known.recognises(path)]
    if not fitting:
        for folder in path.parents[:2]:
            whole = [known.name for known in FORMATS if known.recognises(folder)]
            if whole:
                raise SAEFormatError(
                    f"{path}: found a part of a {whole[0]} folder, expected its folder, {folder}"
                )
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(known.name for known in fitting)
        raise SAEFormatError(
            f"{path}: found {_found(path)}, which reads as {names}; expected the hint `format` "
            "to say which"
        )
    if inside := _saes_below(path):
        listed = ", ".join(inside[:LISTED_FILES])
        more = f" and {len(inside) - LISTED_FILES} more" if len(inside) > LISTED_FILES else ""
        raise SAEFormatError(
            f"{path}: found folders that each hold an SAE: {listed}{more}; expected one SAE, or "
            "the hint `subfolder` to say which"
        )
    expected = "; ".join(f"{known.name} ({known.looks_like})" for known in FORMATS)
    raise SAEFormatError(f"{path}: not a known SAE format: found {_found(path)}; known: {expected}")


def _saes_below(path: Path, depth: int = RELEASE_DEPTH) -> list[str]:
    """Folders of a release that hold an SAE each, relative to it."""
    found: list[str] = []
    for folder in sorted(path.iterdir()) if path.is_dir() and depth else ():
        if folder.name.startswith(".") or not os.access(folder, os.R_OK | os.X_OK):
            continue
        if not folder.is_dir():
            continue
        if any(known.recognises(folder) for known in FORMATS):
            found.append(folder.name)
        else:
            found.extend(f"{folder.name}/{name}" for name in _saes_below(folder, depth - 1))
    return found


def _found(path: Path) -> str:
    if not path.is_dir():
        return f"the file {path.name}"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    if not names:
        return "an empty folder"
    more = len(names) - LISTED_FILES
    return ", ".join(names[:LISTED_FILES]) + (f" and {more} more" if more > 0 else "")
