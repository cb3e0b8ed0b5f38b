"""SAELens 6 folders: `cfg.json` and `sae_weights.safetensors`, read and written.

Read are standard, jumprelu and topk, and the training checkpoints batchtopk and
matryoshka_batchtopk with the threshold they store. What is not read is refused by name: an SAE
read by the wrong formula scores plausible nonsense. Where activations are rescaled by decoder
norms, those are folded into the weights in float32, which gives the same activations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae_core.errors import SAEFormatError, ShapeError
from sae_core.sae import SAE, Architecture, SAEConfig, SAEWeights

CFG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"
LAYOUT_VERSION = "6.0.0"
"""Written as `metadata.sae_lens_version`: without it SAELens 6.54 takes a folder for an old one
and drops its metadata (loading/pretrained_sae_loaders.py, line 218)."""

ARCHITECTURES: Mapping[str, Architecture] = {
    "standard": "relu",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk",
}
SIGNED = "its activations are signed"
TRANSCODER = "it reads one place of the model and predicts another"
WHOLE = "a latent's activation depends on more than its own token and gate"
REFUSED_ARCHITECTURES: Mapping[str, str] = {
    "gated": "its gate has tensors of its own (b_gate, b_mag, r_mag)",
    "abstopk": SIGNED,
    "transcoder": TRANSCODER,
    "skip_transcoder": TRANSCODER,
    "jumprelu_transcoder": TRANSCODER,
    "jumprelu_skip_transcoder": TRANSCODER,
    "temporal": WHOLE,
    "matching_pursuit": WHOLE,
}
REFUSED_NORMALIZATIONS: Mapping[str, str] = {
    "layer_norm": "inputs would have to be normalised token by token",
    "constant_norm_rescale": "inputs would have to be rescaled token by token",
    "expected_average_only_in": "the factor that inputs were multiplied by is not in the folder",
    "covariance_whitening": "the whitening matrix is not in the folder",
}
DTYPES = ("float32", "bfloat16", "float16", "float64")


def is_saelens(path: Path) -> bool:
    """Whether the folder holds the two files of a SAELens SAE."""
    return (path / CFG).is_file() and (path / WEIGHTS).is_file()


def read_saelens(path: Path) -> SAE:
    """The SAE in the folder; raises SAEFormatError naming file, key, found and expected."""
    cfg = _Cfg(path / CFG)
    architecture = _check_supported(cfg)
    metadata = cfg.mapping("metadata")
    d_in, d_sae = cfg.count("d_in"), cfg.count("d_sae")
    rescaled = _is_rescaled(cfg, architecture)
    try:
        config = SAEConfig(
            architecture=architecture,
            d_in=d_in,
            d_sae=d_sae,
            k=cfg.count("k") if architecture == "topk" else None,
            apply_b_dec_to_input=cfg.flag("apply_b_dec_to_input"),
            hook_point=_text(metadata.get("hook_name")),
            model_name=_text(metadata.get("model_name")),
            metadata=dict(metadata),
        )
    except ShapeError as error:
        raise SAEFormatError(f"{cfg.path}: {error}") from error
    weights = _read_weights(path / WEIGHTS, config)
    return SAE(config, _fold_decoder_norms(weights) if rescaled else weights)


def save_saelens(
    sae: SAE, path: Path, *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> None:
    """Writes `sae` as a SAELens 6 folder, made if it is not there.

    `dtype` is how the two matrices are stored; biases and threshold, small and sensitive, stay
    float32. A `batchtopk` SAE is written as SAELens publishes one: jumprelu with its threshold
    repeated. Raises SAEFormatError where the config's metadata is not JSON.
    """
    config = sae.config
    metadata: dict[str, Any] = dict(config.metadata)
    metadata.setdefault("sae_lens_version", LAYOUT_VERSION)
    metadata["model_name"] = config.model_name
    metadata["hook_name"] = config.hook_point
    name = {"relu": "standard", "batchtopk": "jumprelu"}.get(config.architecture)
    if config.architecture == "batchtopk":
        metadata.setdefault("training_architecture", "batchtopk")
    cfg: dict[str, Any] = {
        "architecture": name or config.architecture,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": dtype,
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": config.normalize_activations,
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if config.architecture == "topk":
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    try:
        text = json.dumps(cfg, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise SAEFormatError(f"{path / CFG}: metadata is not JSON: {error}") from error
    tensors: dict[str, Tensor] = {}
    for key, tensor in sae.weights._asdict().items():
        if tensor is not None:
            stored = getattr(torch, dtype) if tensor.ndim == 2 else torch.float32
            tensors[key] = tensor.detach().to("cpu", stored).contiguous()
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / (WEIGHTS + ".part"))
    (path / (CFG + ".part")).write_text(text, encoding="utf-8")
    for file in (WEIGHTS, CFG):
        (path / (file + ".part")).replace(path / file)


class _Cfg:
    """A cfg.json whose keys are checked as they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SAEFormatError(f"{path}: cannot be read as JSON: {error}") from error
        if not isinstance(values, dict):
            raise SAEFormatError(f"{path}: found {type(values).__name__}, expected a JSON object")
        self.values = values

    def error(self, key: str, expected: str) -> SAEFormatError:
        found = f"{self.values[key]!r}" if key in self.values else "no such key"
        return SAEFormatError(f"{self.path}: {key}: found {found}, expected {expected}")

    def count(self, key: str) -> int:
        value = self.values.get(key)
        if type(value) is not int or value < 1:
            raise self.error(key, "a whole number from 1")
        return value

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if type(value) is not bool:
            raise self.error(key, "true or false")
        return value

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.error(key, "an object, as SAELens 6 writes it (5 and older are not read)")
        return value


def _check_supported(cfg: _Cfg) -> Architecture:
    metadata = cfg.mapping("metadata")
    name = cfg.values.get("architecture")
    if name not in ARCHITECTURES:
        reason = REFUSED_ARCHITECTURES.get(str(name))
        because = f" ({name} is not read: {reason})" if reason else ""
        raise cfg.error("architecture", f"one of {', '.join(ARCHITECTURES)}{because}")
    normalization = cfg.values.get("normalize_activations")
    if normalization != "none":
        reason = REFUSED_NORMALIZATIONS.get(str(normalization))
        raise cfg.error("normalize_activations", f"none ({reason})" if reason else "none")
    if cfg.values.get("reshape_activations", "none") != "none":
        raise cfg.error("reshape_activations", "none (SAEs over attention heads are not read)")
    if metadata.get("hook_head_index") is not None:
        found = metadata["hook_head_index"]
        raise SAEFormatError(
            f"{cfg.path}: metadata.hook_head_index: found {found}, expected none (an SAE of one "
            "attention head is not read)"
        )
    dtype = str(cfg.values.get("dtype")).removeprefix("torch.")
    if dtype not in DTYPES:
        raise cfg.error("dtype", f"one of {', '.join(DTYPES)}")
    return ARCHITECTURES[str(name)]


def _is_rescaled(cfg: _Cfg, architecture: Architecture) -> bool:
    """Whether activations are multiplied by the norms of their decoder rows."""
    key = "rescale_acts_by_decoder_norm"
    if architecture == "batchtopk":  # a training checkpoint: the key's default differs there
        _check_scaler(cfg.path.with_name(SCALER))
        return cfg.flag(key)
    return architecture == "topk" and key in cfg.values and cfg.flag(key)


def _check_scaler(path: Path) -> None:
    if path.exists():
        scaler = _Cfg(path)
        for key, value in scaler.values.items():
            if value not in (None, 1, 1.0):
                raise scaler.error(key, "null (inputs were scaled in training and not folded)")


def _read_weights(path: Path, config: SAEConfig) -> SAEWeights:
    d_in, d_sae = config.d_in, config.d_sae
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
    }
    if config.architecture == "jumprelu":
        shapes["threshold"] = (d_sae,)
    elif config.architecture == "batchtopk":
        shapes["topk_threshold"] = ()
    tensors = _read_tensors(path, shapes)
    threshold = tensors.get("threshold")
    if config.architecture == "batchtopk":
        value = float(tensors["topk_threshold"])
        if not value > 0:
            raise SAEFormatError(
                f"{path}: topk_threshold: found {value}, expected the positive threshold that "
                "training estimates"
            )
        threshold = torch.full((d_sae,), value)
    return SAEWeights(
        tensors["W_enc"], tensors["b_enc"], tensors["W_dec"], tensors["b_dec"], threshold
    )


def _read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Exactly the tensors of `shapes`, copied to float32: the file may be replaced while we run."""
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            if names != sorted(shapes):
                found, expected = ", ".join(names), ", ".join(sorted(shapes))
                raise SAEFormatError(f"{path}: tensors: found {found}, expected {expected}")
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise SAEFormatError(f"{path}: cannot be read as safetensors: {error}") from error
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            found = f"shape {list(tensor.shape)}"
            raise SAEFormatError(f"{path}: {name}: found {found}, expected {list(shapes[name])}")
        if not tensor.is_floating_point():
            raise SAEFormatError(f"{path}: {name}: found {tensor.dtype}, expected floating point")
        n_bad = int((~torch.isfinite(tensor)).sum())
        if n_bad:
            raise SAEFormatError(f"{path}: {name}: found {n_bad} numbers not finite, expected none")
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}


def _fold_decoder_norms(weights: SAEWeights) -> SAEWeights:
    """Pre-activations scaled by decoder norms, decoder rows scaled back; a zero row stays zero."""
    norms = weights.W_dec.norm(dim=-1)
    inverse = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    return weights._replace(
        W_enc=weights.W_enc * norms,
        b_enc=weights.b_enc * norms,
        W_dec=weights.W_dec * inverse[:, None],
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
