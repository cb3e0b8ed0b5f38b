"""Qwen-Scope's SAEs: `layer<N>.sae.pt`, one torch file per layer.

    a = the k largest of x @ W_enc.T + b_enc, rectified;   y = a @ W_dec.T + b_dec

Tensors have SAELens's names and torch.nn.Linear's orientation. k and the model are in the name of
the repository only, `SAE-Res-<model>-W<thousands>K-L0_<k>`. It reads the output of decoder layer
N. Source: Qwen's model cards; sae_lens 6.54.12, pretrained_sae_loaders.py.
"""

from __future__ import annotations

import re
from pathlib import Path

from sae_core.errors import SAEFormatError
from sae_core.formats.files import load_torch, torch_tensors
from sae_core.formats.single_file import checked_k, names_in, torch_file
from sae_core.sae import SAE
from sae_core.sae_config import SAECard, SAEConfig
from sae_core.sae_weights import SAEStore

TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")
_FILE = re.compile(r"layer(\d+)\.sae\.pt")
_REPOSITORY = re.compile(r"SAE-Res-(.+)-W\d+K-L0_(\d+)")


def is_qwen_scope(path: Path) -> bool:
    """Whether it is a file of the published name with the four tensors."""
    names = names_in(path)  # first: it says so where a folder holds several files
    return names == set(TENSORS) and _FILE.fullmatch(torch_file(path).name) is not None


def read_qwen_scope(path: Path, *, k: int | None = None) -> SAE:
    """The SAE in the file, or in the one file of the folder.

    `k` is needed where no folder above has the name of the published repository.
    """
    file = torch_file(path)
    tensors = torch_tensors(file, load_torch(file))
    tensors.only(TENSORS)
    d_sae, d_in = tensors.shape("W_enc", 2)
    model, published_k = _repository(file)
    if checked_k(file, k) is not None and published_k not in (None, k):
        raise SAEFormatError(
            f"{file}: k: found the hint {k}, expected {published_k} as in its path"
        )
    if k is None and published_k is None:
        raise SAEFormatError(
            f"{file}: k: found none, expected the hint k, or a path with the repository's name "
            "(SAE-Res-<model>-W<thousands>K-L0_<k>)"
        )
    layer = _FILE.fullmatch(file.name)
    config = SAEConfig(
        architecture="topk", d_in=d_in, d_sae=d_sae, k=published_k if k is None else k
    )
    named = {
        "W_enc": tensors["W_enc"].T,
        "b_enc": tensors["b_enc"],
        "W_dec": tensors["W_dec"].T,
        "b_dec": tensors["b_dec"],
    }
    card = SAECard(
        format="Qwen-Scope",
        source=str(file),
        hook_point=f"blocks.{int(layer[1])}.hook_resid_post" if layer else None,
        model_name=model,
    )
    return SAE(config, SAEStore(config, named), card)


def _repository(file: Path) -> tuple[str | None, int | None]:
    """Model and k, from the innermost folder of the repository's name."""
    for part in reversed(file.absolute().parts[:-1]):
        if found := _REPOSITORY.search(part):
            return found[1], int(found[2])
    return None, None
