"""dictionary_learning runs: `config.json` and `ae.pt`, also a checkpoint of such a run.

Each class has its own names, orientations and input bias. Source: dictionary-learning 0.1.0,
dictionary.py, trainers/ and training.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_core.errors import SAEFormatError
from sae_core.formats.files import Cfg, Tensors, load_torch, read_cfg, torch_tensors
from sae_core.sae import SAE
from sae_core.sae_config import THRESHOLDED, Architecture, SAECard, SAEConfig
from sae_core.sae_weights import SAEStore
from sae_core.stored import InMemory, Stored

CFG = "config.json"
WEIGHTS = "ae.pt"
CHECKPOINT = re.compile(r"ae_\w+\.pt")
NEVER = torch.finfo(torch.float32).max
"""A threshold that no activation exceeds."""

SITES = {
    "resid_pre": ("in", "hook_resid_pre"),
    "resid_post": ("out", "hook_resid_post"),
    "resid_out": ("out", "hook_resid_post"),
    "attn_out": ("out", "hook_attn_out"),
    "mlp_out": ("out", "hook_mlp_out"),
}
"""What submodule_name begins with, the side of the module that carries it, and its hook."""
SUBMODULE = re.compile(rf"({'|'.join(SITES)})_layer_?(\d+)")
MODULE = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*\.\d+(?:\.[A-Za-z_]\w*)*")


class _Kind(NamedTuple):
    architecture: Architecture
    b_dec: str
    """What the class calls it."""
    reads_b_dec: bool = True
    is_linear: bool = True
    """Whether its matrices lie as torch's Linear has them, transposed."""


KINDS: Mapping[str, _Kind] = {
    "AutoEncoder": _Kind("relu", "bias"),
    "AutoEncoderNew": _Kind("relu", "decoder.bias", reads_b_dec=False),
    "GatedAutoEncoder": _Kind("gated", "decoder_bias"),
    "JumpReluAutoEncoder": _Kind("jumprelu", "b_dec", reads_b_dec=False, is_linear=False),
    "AutoEncoderTopK": _Kind("topk", "b_dec"),
    "BatchTopKSAE": _Kind("batchtopk", "b_dec"),
    "MatryoshkaBatchTopKSAE": _Kind("batchtopk", "b_dec", is_linear=False),
}


def is_dictionary_learning(path: Path) -> bool:
    """Whether it is a run's folder, or a checkpoint file of a run that has its config."""
    if path.is_dir():
        return (path / WEIGHTS).is_file()
    is_named = path.name == WEIGHTS or CHECKPOINT.fullmatch(path.name) is not None
    return is_named and path.is_file() and _cfg_path(path).is_file()


def read_dictionary_learning(
    path: Path,
    *,
    fold_decoder_norms: bool | None = None,
    use_threshold: bool | None = None,
    active_groups: int | None = None,
) -> SAE:
    """The dictionary of the run.

    Args:
        fold_decoder_norms: For AutoEncoder: activations times the norms of their decoder rows, as
            the library's own loader gives them; without it, as the stored weights give them.
        use_threshold: For AutoEncoderTopK: the stored threshold decides, not a latent's rank.
        active_groups: For MatryoshkaBatchTopKSAE: only latents of the first groups are on.
    """
    weights_path = path / WEIGHTS if path.is_dir() else path
    cfg = read_cfg(_cfg_path(weights_path))
    trainer = cfg.mapping("trainer")
    name = trainer.one_of("dict_class", KINDS)
    for hint, value, owner in (
        ("fold_decoder_norms", fold_decoder_norms, "AutoEncoder"),
        ("use_threshold", use_threshold, "AutoEncoderTopK"),
        ("active_groups", active_groups, "MatryoshkaBatchTopKSAE"),
    ):
        if value is not None and name != owner:
            raise trainer.error("dict_class", f"{owner}, as the hint {hint} is given")
    kind = KINDS[name]
    if use_threshold:
        kind = kind._replace(architecture="batchtopk")
    content = _state_dict(weights_path)
    tensors = torch_tensors(weights_path, content)
    config = SAEConfig(
        architecture=kind.architecture,
        d_in=trainer.count("activation_dim"),
        d_sae=trainer.count("dict_size"),
        k=_k(trainer, weights_path, content) if kind.architecture == "topk" else None,
        apply_b_dec_to_input=kind.reads_b_dec,
        decoder_norms="acts" if fold_decoder_norms else "unused",
    )
    named = _named_tensors(tensors, kind, name)
    notes: list[str] = []
    if kind.architecture == "batchtopk":
        threshold = tensors.scalar("threshold")
        if threshold < 0:
            notes.append(
                f"Its threshold is {threshold:g}: training ended before one was estimated, so "
                "every positive pre-activation counts, as in a ReLU SAE."
            )
        per_latent = torch.full((config.d_sae,), threshold)
        if active_groups is not None:
            per_latent[_n_active(weights_path, content, active_groups) :] = NEVER
        named["threshold"] = InMemory(per_latent, f"{weights_path}: threshold")
    if name == "AutoEncoder" and fold_decoder_norms is None:
        notes.append(
            "Its latents are in units of the stored weights; the library's own loader multiplies "
            "each by the norm of its decoder row (the hint fold_decoder_norms)."
        )
    hook_point, doubt = _hook_point(cfg, trainer)
    card = SAECard(
        format="dictionary_learning",
        source=str(path),
        hook_point=hook_point,
        model_name=trainer.text("lm_name"),
        facts=dict(cfg.values),
        notes=(*notes, *doubt),
    )
    return SAE(config, SAEStore(config, named), card)


def _cfg_path(weights_path: Path) -> Path:
    folder = weights_path.parent
    return (folder.parent if folder.name == "checkpoints" else folder) / CFG


def _state_dict(path: Path) -> Mapping[str, Any]:
    """The tensors of a finished run, or of one that was interrupted and never scaled its inputs."""
    content = load_torch(path)
    inner = content.get("ae")
    if not isinstance(inner, Mapping):
        return content
    factor = content.get("norm_factor")
    if factor not in (None, 1, 1.0):
        raise SAEFormatError(
            f"{path}: norm_factor: found {factor!r:.40}, expected none: the file is the backup of "
            "an unfinished run whose inputs were divided by it, and it does not say whether its "
            "biases and threshold were multiplied back; finish the run, or save its final ae.pt"
        )
    return inner


def _named_tensors(tensors: Tensors, kind: _Kind, name: str) -> dict[str, Stored]:
    names = {"b_dec": kind.b_dec}
    if kind.is_linear:
        names |= {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias"}
    else:
        names |= {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc"}
    if kind.architecture == "gated":
        del names["b_enc"]
        names |= {"r_mag": "r_mag", "b_gate": "gate_bias", "b_mag": "mag_bias"}
    if kind.architecture in THRESHOLDED:
        names["threshold"] = "threshold"
    tensors.only(names.values(), optional=("threshold",) if name == "AutoEncoderTopK" else ())
    found = {ours: tensors[theirs] for ours, theirs in names.items()}
    if kind.is_linear:
        found |= {matrix: found[matrix].T for matrix in ("W_enc", "W_dec")}
    return found


def _k(trainer: Cfg, path: Path, content: Mapping[str, Any]) -> int:
    """From the config or the file, which must agree where both say it."""
    stored = content.get("k")
    if not isinstance(stored, Tensor):
        return trainer.count("k")
    if "k" in trainer.values and trainer.count("k") != stored.item():
        raise SAEFormatError(
            f"{path}: k: found {stored.item()}, expected {trainer.count('k')} as in {CFG}"
        )
    return int(stored.item())


def _n_active(path: Path, content: Mapping[str, Any], active_groups: int) -> int:
    """Latents in the first `active_groups` groups."""
    sizes = content.get("group_sizes")
    groups = sizes.tolist() if isinstance(sizes, Tensor) else []
    if not 1 <= active_groups <= len(groups):
        raise SAEFormatError(
            f"{path}: group_sizes: found {len(groups)} groups, expected at least the hint "
            f"active_groups, which is {active_groups} and counts from 1"
        )
    return int(sum(groups[:active_groups]))


def _hook_point(cfg: Cfg, trainer: Cfg) -> tuple[str | None, tuple[str, ...]]:
    """Where it reads, and a sentence if the config leaves that open.

    `submodule_name` is free text; what the library's examples and SAEBench write is understood.
    """
    name, layer = trainer.text("submodule_name"), trainer.values.get("layer")
    io = None
    if "buffer" in cfg.values:
        io = cfg.mapping("buffer").text("io")
    match = SUBMODULE.fullmatch(name or "")
    if match:
        side, hook = SITES[match[1]]
        if layer in (None, int(match[2])) and io in (None, side):
            return f"blocks.{int(match[2])}.{hook}", ()
    elif name and MODULE.fullmatch(name) and io in ("in", "out"):
        return f"{name}.{io}put", ()
    return None, (
        f"Its config says layer {layer}, submodule_name {name!r} and io {io!r}, which names no "
        "hook point that is known; give it as hook_point.",
    )
