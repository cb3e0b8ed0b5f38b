"""Goodfire's SAEs, one torch file each, and qresearch's, which rename the tensors.

    a = relu(x @ We + be),   y = a @ Wd + bd;   no bias is taken off the input

It reads the output of a decoder layer, which the file name gives: `...-SAE-l19.pth`. Goodfire's
gpt-oss SAE keeps the k largest of a token instead; its tensors have other names and its file does
not hold k. Source: Goodfire's model cards; sae_lens 6.54.12, pretrained_sae_loaders.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch

from sae_core.errors import SAEFormatError
from sae_core.formats.files import load_torch, torch_tensors
from sae_core.formats.single_file import checked_k, names_in, torch_file
from sae_core.sae import SAE
from sae_core.sae_config import SAECard, SAEConfig
from sae_core.sae_weights import SAEStore
from sae_core.stored import InMemory


class _Names(NamedTuple):
    encoder: str
    decoder: str
    is_topk: bool


GOODFIRE = _Names("encoder_linear", "decoder_linear", is_topk=False)
GOODFIRE_TOPK = _Names("encoder_linear", "decoder", is_topk=True)
QRESEARCH = _Names("encoder", "decoder", is_topk=False)
DICTIONARY_LEARNING = "ae.pt"
"""AutoEncoderNew of `dictionary_learning` has qresearch's tensor names, and always this name."""

_LAYER = re.compile(r"[-_]l(\d+)(?![^-_.])")
_MODEL = re.compile(r"(.+)-SAE-l\d+")


def is_goodfire(path: Path) -> bool:
    """Whether it is a torch file with the names of two torch.nn.Linear and nothing else."""
    if path.name == DICTIONARY_LEARNING or (path / DICTIONARY_LEARNING).exists():
        return False
    names = names_in(path)
    if "encoder_linear.weight" in names:
        return True
    return names == {f"{part}.{kind}" for part in QRESEARCH[:2] for kind in ("weight", "bias")}


def read_goodfire(path: Path, *, k: int | None = None) -> SAE:
    """The SAE in the file, or in the one file of the folder.

    A TopK file needs `k`; with any other it is refused.
    """
    file = torch_file(path)
    tensors = torch_tensors(file, load_torch(file))
    fitting = (n for n in (GOODFIRE, GOODFIRE_TOPK, QRESEARCH) if f"{n.decoder}.weight" in tensors)
    names = next((n for n in fitting if f"{n.encoder}.weight" in tensors), GOODFIRE)
    weights, biases = ([f"{n}.{kind}" for n in names[:2]] for kind in ("weight", "bias"))
    tensors.only(
        weights if names.is_topk else weights + biases, optional=biases if names.is_topk else ()
    )
    if names.is_topk and checked_k(file, k) is None:
        raise SAEFormatError(
            f"{file}: {names.decoder}.weight beside {names.encoder}.weight is a TopK SAE's: found "
            "no k, expected the hint k (the published file name ends in it)"
        )
    if k is not None and not names.is_topk:
        raise SAEFormatError(f"{file}: {names.decoder}.weight is a ReLU SAE's: expected no hint k")
    d_sae, d_in = tensors.shape(weights[0], 2)
    config = SAEConfig(
        architecture="topk" if names.is_topk else "relu", d_in=d_in, d_sae=d_sae, k=k
    )
    widths = {biases[0]: d_sae, biases[1]: d_in}
    b_enc, b_dec = (
        tensors[n] if n in tensors else InMemory(torch.zeros(widths[n]), n) for n in biases
    )
    named = {
        "W_enc": tensors[weights[0]].T,
        "b_enc": b_enc,
        "W_dec": tensors[weights[1]].T,
        "b_dec": b_dec,
    }
    layer, model = _LAYER.search(file.stem), _MODEL.match(file.stem)
    card = SAECard(
        format="qresearch" if names is QRESEARCH else "Goodfire",
        source=str(file),
        hook_point=f"blocks.{int(layer[1])}.hook_resid_post" if layer else None,
        model_name=model[1] if model else None,
    )
    return SAE(config, SAEStore(config, named), card)
