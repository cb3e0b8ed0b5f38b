"""EleutherAI sparsify folders: `cfg.json` and `sae.safetensors`, named after the module they read.

The encoder lies as torch's Linear has it, `W_dec` as we have it, `W_skip` transposed. The decoder
may be absent. Source: eai-sparsify 1.3.3, config.py and sparse_coder.py.
"""

from __future__ import annotations

import re
from pathlib import Path

from sae_core.errors import SAEFormatError
from sae_core.formats.files import Cfg, open_safetensors, read_cfg
from sae_core.sae import SAE
from sae_core.sae_config import Architecture, SAECard, SAEConfig
from sae_core.sae_weights import SAEStore

CFG = "cfg.json"
WEIGHTS = "sae.safetensors"
RUN_CONFIG = "config.json"
"""Of the whole training run, beside the folders of its modules; names the model."""

MODULE = re.compile(r"(?:[a-z_]+\.)*[a-z_]+\.\d+(?:\.[a-z_]\w*)*|embed_tokens|embed_in|wte")
"""A module's path below the base model, as a folder is called: layers.3, h.3.mlp."""
SEED = re.compile(r"seed\d+")


def is_sparsify(path: Path) -> bool:
    """Whether the folder holds the two files of a sparsify SAE or transcoder."""
    return (path / CFG).is_file() and (path / WEIGHTS).is_file()


def read_sparsify(path: Path, *, transcode: bool | None = None) -> SAE:
    """The SAE or transcoder in the folder.

    `transcode` says whether a file from before February 2025, which has no such key, is a
    transcoder: that decides what it reads, not how, as b_dec was subtracted in either case.
    """
    cfg = read_cfg(path / CFG)
    tensors = open_safetensors(path / WEIGHTS)
    has_skip = cfg.flag("skip_connection", default=False)
    expected = {"encoder.weight", "encoder.bias", "b_dec"} | ({"W_skip"} if has_skip else set())
    tensors.only(expected, optional=("W_dec",))
    if transcode is not None and "transcode" in cfg.values:
        raise cfg.error("transcode", "no such key, or the hint transcode left out")
    is_new_transcoder = cfg.flag("transcode", default=False)
    is_transcoder = is_new_transcoder or bool(transcode)
    d_in = cfg.count("d_in")
    architecture = _architecture(cfg)
    config = SAEConfig(
        architecture=architecture,
        d_in=d_in,
        d_sae=_d_sae(cfg, d_in),
        d_out=tensors.shape("b_dec", 1)[0],
        k=cfg.count("k"),
        apply_b_dec_to_input=not is_new_transcoder,
        predicts_another_place=is_transcoder,
    )
    named = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "b_dec": tensors["b_dec"],
    }
    notes: list[str] = []
    if "W_dec" in tensors:
        named["W_dec"] = tensors["W_dec"]
    else:
        notes.append("Its file has no W_dec: it encodes and cannot reconstruct.")
    if has_skip:
        named["W_skip"] = tensors["W_skip"].T
    if "transcode" not in cfg.values and transcode is None:
        notes.append(
            "Its cfg.json is from before February 2025 and does not say whether it is a "
            "transcoder; it was taken for an SAE (the hint transcode says otherwise)."
        )
    folder = _module_folder(path)
    reads, predicts = None, None
    if folder is not None:
        reads = f"{folder.name}.{'input' if is_transcoder else 'output'}"
        predicts = f"{folder.name}.output" if is_transcoder else None
    card = SAECard(
        format="sparsify",
        source=str(path),
        hook_point=reads,
        hook_point_out=predicts,
        model_name=None if folder is None else _model_name(folder.parent / RUN_CONFIG),
        facts=dict(cfg.values),
        notes=tuple(notes),
    )
    return SAE(config, SAEStore(config, named), card)


def _architecture(cfg: Cfg) -> Architecture:
    """The gate; files of mid-2024 had no `activation` and could be `signed`."""
    activation = "topk"
    if "activation" in cfg.values:
        activation = cfg.one_of("activation", ("topk", "groupmax"))
    if not cfg.flag("signed", default=False):
        return "topk" if activation == "topk" else "groupmax"
    if activation != "topk":
        raise cfg.error("signed", f"false, as activation is {activation}")
    return "abstopk"


def _d_sae(cfg: Cfg, d_in: int) -> int:
    if cfg.values.get("num_latents") in (None, 0):
        return d_in * cfg.count("expansion_factor")
    return cfg.count("num_latents")


def _module_folder(path: Path) -> Path | None:
    """The folder that is named after a module: this one, or the one that holds its seeds."""
    folder = path.absolute()
    if SEED.fullmatch(folder.name):
        folder = folder.parent
    return folder if MODULE.fullmatch(folder.name) else None


def _model_name(run_config: Path) -> str | None:
    if not run_config.is_file():
        return None
    try:
        return read_cfg(run_config).text("model")
    except SAEFormatError as error:
        raise SAEFormatError(
            f"{error} (the run's own config, beside the module's folder)"
        ) from error
