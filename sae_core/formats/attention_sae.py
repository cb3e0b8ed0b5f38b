"""SAEs of attention outputs, `NAME.pt` beside `NAME_cfg.json`: GPT-2 small's, of all its layers.

ReLU on the heads' outputs side by side, minus b_dec. Source: sae_lens 6.54.12,
loading/pretrained_sae_loaders.py (gpt2-small-hook-z-kk).
"""

from __future__ import annotations

from pathlib import Path

from sae_core.formats.files import load_torch, read_cfg, torch_tensors
from sae_core.sae import SAE
from sae_core.sae_config import SAECard, SAEConfig
from sae_core.sae_weights import SAEStore

TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")


def is_attention_sae(path: Path) -> bool:
    """Whether it is a `.pt` file with its config beside it."""
    return path.is_file() and path.suffix == ".pt" and _cfg_path(path).is_file()


def read_attention_sae(path: Path) -> SAE:
    """The SAE in the file."""
    cfg = read_cfg(_cfg_path(path))
    tensors = torch_tensors(path, load_torch(path))
    tensors.only(TENSORS)
    config = SAEConfig(
        architecture="relu",
        d_in=cfg.count("act_size"),
        d_sae=cfg.count("dict_size"),
        apply_b_dec_to_input=True,
    )
    card = SAECard(
        format="attention SAE",
        source=str(path),
        hook_point=cfg.text("act_name"),
        model_name=cfg.text("model_name"),
        facts=dict(cfg.values),
    )
    named = {name: tensors[name] for name in TENSORS}
    return SAE(config, SAEStore(config, named), card)


def _cfg_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}_cfg.json")
