"""SAELens folders: `cfg.json` and `sae_weights.safetensors`, versions 6, 5 and older.

Published SAEs are read, transcoders too, and training checkpoints with the threshold they store.
What is not a function of the token alone is refused by name: an SAE read by the wrong formula
scores plausible nonsense. Source: sae_lens 6.54.12 and 5.11.0, saes/ and loading/.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from sae_core.errors import SAEFormatError
from sae_core.formats.files import Cfg, Tensors, open_safetensors, read_cfg
from sae_core.sae import SAE
from sae_core.sae_config import Architecture, Normalization, SAECard, SAEConfig
from sae_core.sae_weights import SAEStore
from sae_core.stored import InMemory, Stored

CFG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"
DTYPES = ("float32", "bfloat16", "float16", "float64")
WHOLE = "a latent's activation depends on more than its own token and gate"


class _Kind(NamedTuple):
    architecture: Architecture
    is_transcoder: bool = False
    has_skip: bool = False
    is_training: bool = False


KINDS: Mapping[str, _Kind] = {
    "standard": _Kind("relu"),
    "gated": _Kind("gated"),
    "jumprelu": _Kind("jumprelu"),
    "topk": _Kind("topk"),
    "abstopk": _Kind("abstopk"),
    "transcoder": _Kind("relu", is_transcoder=True),
    "skip_transcoder": _Kind("relu", is_transcoder=True, has_skip=True),
    "jumprelu_transcoder": _Kind("jumprelu", is_transcoder=True),
    "jumprelu_skip_transcoder": _Kind("jumprelu", is_transcoder=True, has_skip=True),
    "batchtopk": _Kind("batchtopk", is_training=True),
    "matryoshka_batchtopk": _Kind("batchtopk", is_training=True),
}
REFUSED_ARCHITECTURES: Mapping[str, str] = {"temporal": WHOLE, "matching_pursuit": WHOLE}
NORMALIZATIONS: Mapping[str, Normalization] = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "unit_norm",
}
OLD_ACTIVATIONS: Mapping[str, Architecture] = {
    "relu": "relu",
    "topk": "topk",
    "tanh-relu": "tanh_relu",
}


def is_saelens(path: Path) -> bool:
    """Whether the folder holds the two files of a SAELens SAE."""
    return (path / CFG).is_file() and (path / WEIGHTS).is_file()


def read_saelens(
    path: Path,
    *,
    norm_scaling_factor: float | None = None,
    normalize_activations: str | None = None,
) -> SAE:
    """The SAE in the folder.

    `norm_scaling_factor` is what inputs were multiplied by in training, which old files that say
    `expected_average_only_in` leave to SAELens' registry; refused where they say anything else.
    `normalize_activations` stands in for what cfg.json says, where the registry corrects it.
    """
    cfg = read_cfg(path / CFG)
    if normalize_activations is not None:
        values = {**cfg.values, "normalize_activations": normalize_activations}
        cfg = Cfg(cfg.path, values)
    tensors = open_safetensors(path / WEIGHTS)
    is_old = "metadata" not in cfg.values
    kind = _kind(cfg, is_old)
    _check_dtype(cfg)
    facts = cfg if is_old else cfg.mapping("metadata")
    d_in, d_sae = cfg.count("d_in"), cfg.count("d_sae")
    normalize, scale = _normalization(cfg, norm_scaling_factor)
    reshape = cfg.values.get("reshape_activations", "none")
    if reshape not in ("none", "hook_z"):
        raise cfg.error("reshape_activations", "none or hook_z")
    config = SAEConfig(
        architecture=kind.architecture,
        d_in=d_in,
        d_sae=d_sae,
        d_out=cfg.count("d_out") if "d_out" in cfg.values else d_in,
        k=_k(cfg, kind, is_old),
        head_index=_head_index(facts),
        normalize=normalize,
        input_scale=scale,
        output_scale=scale,
        apply_b_dec_to_input=_reads_b_dec(cfg, kind, is_old),
        decoder_norms="acts" if _is_rescaled(cfg, kind) else "unused",
        predicts_another_place=kind.is_transcoder,
    )
    named = _named_tensors(cfg, tensors, kind, config)
    hook_point = facts.text("hook_name") or facts.text("hook_point")
    card = SAECard(
        format="SAELens 5" if is_old else "SAELens 6",
        source=str(path),
        hook_point=hook_point,
        hook_point_out=facts.text("hook_name_out"),
        model_name=facts.text("model_name"),
        facts=dict(facts.values),
    )
    return SAE(config, SAEStore(config, named), card)


def _kind(cfg: Cfg, is_old: bool) -> _Kind:
    name = cfg.values.get("architecture", "standard" if is_old else None)
    if name not in KINDS:
        reason = REFUSED_ARCHITECTURES.get(str(name))
        because = f" ({name} is not read: {reason})" if reason else ""
        raise cfg.error("architecture", f"one of {', '.join(KINDS)}{because}")
    kind = KINDS[str(name)]
    if is_old and name == "standard":
        key = "activation_fn_str" if "activation_fn_str" in cfg.values else "activation_fn"
        if cfg.values.get(key) is not None:
            return _Kind(OLD_ACTIVATIONS[cfg.one_of(key, OLD_ACTIVATIONS)])
    return kind


def _check_dtype(cfg: Cfg) -> None:
    dtype = str(cfg.values.get("dtype", "float32")).removeprefix("torch.")
    if dtype not in DTYPES:
        raise cfg.error("dtype", f"one of {', '.join(DTYPES)}")


def _normalization(cfg: Cfg, factor: float | None) -> tuple[Normalization, float]:
    """How inputs are normalised per token, and the factor that all are multiplied by."""
    key = "normalize_activations"
    found = cfg.values.get(key, "none")
    if isinstance(found, bool) or found is None:  # older than SAELens 3
        found = "expected_average_only_in" if found else "none"
    if found == "expected_average_only_in":
        if factor is None:
            raise cfg.error(
                key,
                "none, or the hint norm_scaling_factor (cfg.json does not have the factor that "
                "inputs were multiplied by)",
            )
        return "none", float(factor)
    if factor is not None:
        raise cfg.error(key, "expected_average_only_in with the hint norm_scaling_factor")
    if found == "covariance_whitening":
        raise cfg.error(key, "none (the whitening matrix is not in the folder)")
    if found not in NORMALIZATIONS:
        raise cfg.error(key, f"one of {', '.join(NORMALIZATIONS)}, expected_average_only_in")
    return NORMALIZATIONS[str(found)], 1.0


def _k(cfg: Cfg, kind: _Kind, is_old: bool) -> int | None:
    if kind.architecture not in ("topk", "abstopk"):
        return None
    if is_old and "activation_fn_kwargs" in cfg.values:
        return cfg.mapping("activation_fn_kwargs").count("k")
    return cfg.count("k")


def _head_index(facts: Cfg) -> int | None:
    for key in ("hook_head_index", "hook_point_head_index"):
        value = facts.values.get(key)
        if value is not None:
            if type(value) is not int or value < 0:
                raise facts.error(key, "a whole number from 0, or null")
            return value
    return None


def _reads_b_dec(cfg: Cfg, kind: _Kind, is_old: bool) -> bool:
    key = "apply_b_dec_to_input"
    if kind.is_transcoder:
        if cfg.flag(key, default=False):
            raise cfg.error(key, "false (a transcoder's b_dec belongs to what it predicts)")
        return False
    return cfg.flag(key, default=True if is_old else None)


def _is_rescaled(cfg: Cfg, kind: _Kind) -> bool:
    """Whether activations are multiplied by the norms of their decoder rows."""
    key = "rescale_acts_by_decoder_norm"
    _check_scaler(cfg.path.with_name(SCALER))
    if kind.is_training:  # the key's default differs there, so it must be said
        return cfg.flag(key)
    return kind.architecture in ("topk", "abstopk") and cfg.flag(key, default=False)


def _check_scaler(path: Path) -> None:
    if path.exists():
        scaler = read_cfg(path)
        for key, value in scaler.values.items():
            if value not in (None, 1, 1.0):
                raise scaler.error(key, "null (inputs were scaled in training and not folded)")


def _named_tensors(cfg: Cfg, tensors: Tensors, kind: _Kind, config: SAEConfig) -> dict[str, Stored]:
    names = {"W_enc", "W_dec", "b_dec"}
    names |= {"b_gate", "r_mag", "b_mag"} if config.architecture == "gated" else {"b_enc"}
    if kind.has_skip:
        names.add("W_skip")
    if config.architecture == "jumprelu":
        names.add("log_threshold" if "log_threshold" in tensors else "threshold")
    if config.architecture == "batchtopk":
        names.add("topk_threshold")
    scaling = [n for n in ("scaling_factor", "finetuning_scaling_factor") if n in tensors]
    tensors.only(names, optional=scaling)
    found = {name: tensors[name] for name in names}
    if "W_skip" in found:
        found["W_skip"] = found["W_skip"].T
    if "log_threshold" in found:
        found["threshold"] = found.pop("log_threshold").changed(torch.exp)
    if "topk_threshold" in found:
        del found["topk_threshold"]
        value = tensors.scalar("topk_threshold")
        if not value > 0:
            raise SAEFormatError(
                f"{tensors.path}: topk_threshold: found {value}, expected the positive threshold "
                "that training estimates"
            )
        found["threshold"] = InMemory(torch.full((config.d_sae,), value), "topk_threshold")
    for name in scaling:
        factor = tensors[name]
        if not bool((factor.read() == 1).all()):  # early versions always wrote ones
            if not cfg.flag("finetuning_scaling_factor", default=False):
                raise cfg.error("finetuning_scaling_factor", f"true, as {name} is not all ones")
            found["scaling_factor"] = factor
    return found
