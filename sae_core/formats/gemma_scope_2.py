"""Gemma Scope 2 (Gemma 3): `params.safetensors`, with a `config.json` in most folders.

JumpReLU without any normalisation, names in lower case, matrices as we have them, the affine
connection too. Not trained on BOS. Source: the release's config.json and sae_lens 6.54.12,
loading/pretrained_sae_loaders.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from sae_core.errors import SAEFormatError
from sae_core.formats.files import Cfg, Tensors, open_safetensors, read_cfg
from sae_core.sae import SAE
from sae_core.sae_config import SAECard, SAEConfig
from sae_core.sae_weights import SAEStore

CFG = "config.json"
WEIGHTS = "params.safetensors"
SKIP = "affine_skip_connection"
NAMES = {"W_enc": "w_enc", "W_dec": "w_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
NAMES["threshold"] = "threshold"
REPO = re.compile(r"gemma-scope-2-(\w+)-(pt|it)\b")
INNER = re.compile(r"/(resid_post|mlp_out|attn_out|transcoder|crosscoder|clt)\w*/layer_(\d+)_\w+$")
"""The last two folders: site, and layer, width and how sparse."""
AFTER_MLP = "model.layers.{}.post_feedforward_layernorm.output"
SITES = {
    "resid_post": ("model.layers.{}.output", None),
    "attn_out": ("model.layers.{}.self_attn.o_proj.input", None),
    "mlp_out": (AFTER_MLP, None),
    "transcoder": ("model.layers.{}.pre_feedforward_layernorm.output", AFTER_MLP),
}
KINDS = ("sae", "transcoder")
REASONS = {
    "crosscoder": "it reads several layers at once",
    "clt": "its latents write to several layers",
}


class _Origin(NamedTuple):
    """What the config says, or the path where there is no config."""

    is_transcoder: bool
    hook_point: str | None
    hook_point_out: str | None
    model_name: str | None


def is_gemma_scope_2(path: Path) -> bool:
    """Whether the folder holds params.safetensors, or it is that file or a CLT's layer."""
    if path.is_dir():
        return (path / WEIGHTS).is_file()
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    return path.name == WEIGHTS or path.parent.name.startswith(("clt", "crosscoder"))


def read_gemma_scope_2(path: Path) -> SAE:
    """The SAE or transcoder in the folder or file."""
    folder = path if path.is_dir() else path.parent
    cfg = read_cfg(folder / CFG) if (folder / CFG).is_file() else None
    tensors = open_safetensors(path / WEIGHTS if path.is_dir() else path)
    origin = _origin_by_path(path, tensors) if cfg is None else _origin(cfg, tensors)
    tensors.only(NAMES.values(), optional=(SKIP,))
    d_in, d_sae = tensors.shape("w_enc", 2)
    if cfg is not None and "width" in cfg.values and cfg.count("width") != d_sae:
        raise cfg.error("width", f"{d_sae}, the width of w_enc")
    config = SAEConfig(
        architecture="jumprelu",
        d_in=d_in,
        d_sae=d_sae,
        d_out=tensors.shape("w_dec", 2)[1],
        predicts_another_place=origin.is_transcoder,
    )
    named = {ours: tensors[theirs] for ours, theirs in NAMES.items()}
    if SKIP in tensors:
        named["W_skip"] = tensors[SKIP]
    card = SAECard(
        format="Gemma Scope 2",
        source=str(path),
        hook_point=origin.hook_point,
        hook_point_out=origin.hook_point_out,
        model_name=origin.model_name,
        facts={} if cfg is None else dict(cfg.values),
    )
    return SAE(config, SAEStore(config, named), card)


def _origin(cfg: Cfg, tensors: Tensors) -> _Origin:
    kind = str(cfg.values.get("type", "sae"))
    if kind not in KINDS:
        why = next((f" ({reason})" for name, reason in REASONS.items() if name in kind), "")
        raise cfg.error("type", f"one of {', '.join(KINDS)}{why}")
    cfg.one_of("architecture", ("jump_relu",))
    if cfg.flag("affine_connection", default=False) != (SKIP in tensors):
        found = "has" if SKIP in tensors else "has no"
        raise cfg.error("affine_connection", f"to fit {tensors.path.name}, which {found} {SKIP}")
    is_transcoder = kind == "transcoder"
    return _Origin(
        is_transcoder=is_transcoder,
        hook_point=cfg.text("hf_hook_point_in"),
        hook_point_out=cfg.text("hf_hook_point_out") if is_transcoder else None,
        model_name=_hub_name(cfg.text("model_name")),
    )


def _origin_by_path(path: Path, tensors: Tensors) -> _Origin:
    text = path.absolute().as_posix().removesuffix(f"/{WEIGHTS}").removesuffix(".safetensors")
    repos, inner = list(REPO.finditer(text)), INNER.search(text)
    model_name = f"gemma-3-{repos[-1][1]}-{repos[-1][2]}" if repos else None
    site = inner[1] if inner else None
    if site in REASONS:
        raise SAEFormatError(
            f"{path}: found a {site}, expected one of {', '.join(KINDS)} ({REASONS[site]})"
        )
    reads, predicts = SITES[site] if site else (None, None)
    layer = inner[2] if inner else ""
    return _Origin(
        is_transcoder=predicts is not None or SKIP in tensors,
        hook_point=reads and reads.format(layer),
        hook_point_out=predicts and predicts.format(layer),
        model_name=_hub_name(model_name),
    )


def _hub_name(name: str | None) -> str | None:
    """The model as the hub has it: some configs write gemma-v3 or leave out its owner."""
    if not name:
        return None
    name = name.replace("gemma-v3-", "gemma-3-")
    if "270m" in name:  # the one size whose base model has no suffix
        name = name.removesuffix("-pt")
    return name if "/" in name else f"google/{name}"
