"""Gemma Scope (Gemma 2): `params.npz`, whose layer and site only its path tells.

JumpReLU without any normalisation. Published as `google/gemma-scope-SIZE-KIND-SITE` with
`layer_L/width_W/average_l0_N/params.npz` inside. Not trained on BOS. Source: Lieberum et al. 2024,
arXiv:2408.05147, and sae_lens 6.54.12, loading/pretrained_sae_loaders.py.
"""

from __future__ import annotations

import re
from math import sqrt
from pathlib import Path
from typing import NamedTuple

from sae_core.errors import SAEFormatError
from sae_core.formats.files import open_npz
from sae_core.sae import SAE
from sae_core.sae_config import SAECard, SAEConfig
from sae_core.sae_weights import SAEStore

WEIGHTS = "params.npz"
TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
REPO = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)\b")
INNER = re.compile(r"/(?:layer_(\d+)|(embedding))/width_\w+/[^/]+$")
"""The last three folders: layer, width and how sparse."""

SITES = {
    "res": ("blocks.{}.hook_resid_post", None),
    "mlp": ("layers.{}.post_feedforward_layernorm.output", None),
    "att": ("layers.{}.self_attn.o_proj.input", None),
    "transcoders": (
        "blocks.{}.ln2.hook_normalized",
        "layers.{}.post_feedforward_layernorm.output",
    ),
}
"""What each repository reads, and what its transcoders predict."""
BEFORE_GAIN = (
    "It reads pre_feedforward_layernorm before its gain: what that module puts out, divided by "
    "(1 + weight)."
)


class _Origin(NamedTuple):
    """What the path says; None where it does not."""

    model_name: str | None
    site: str | None
    layer: int | None
    is_embedding: bool


def is_gemma_scope(path: Path) -> bool:
    """Whether the folder holds params.npz, or the file is an npz."""
    return (path / WEIGHTS).is_file() or (path.is_file() and path.suffix == ".npz")


def read_gemma_scope(path: Path, *, embedding_scale: float | None = None) -> SAE:
    """The SAE or transcoder in the folder or npz file.

    `embedding_scale` is for SAEs of token embeddings, which take them as the table has them: what
    the model multiplied the embeddings by that it will be given. A path with `embedding` in the
    place of the layer stands for sqrt(d_in), as Gemma multiplies; 1 is for unscaled embeddings.
    """
    tensors = open_npz(path / WEIGHTS if path.is_dir() else path)
    tensors.only(TENSORS)
    d_in, d_sae = tensors.shape("W_enc", 2)
    origin = _origin(path if path.is_dir() else path.parent)
    scale = sqrt(d_in) if origin.is_embedding else 1.0
    if embedding_scale is not None:
        if origin.layer is not None or not embedding_scale > 0:
            raise SAEFormatError(
                f"{path}: embedding_scale: found {embedding_scale}, expected a positive number "
                "for an SAE of token embeddings, and none where the path names a layer"
            )
        scale, origin = embedding_scale, origin._replace(is_embedding=True)
    is_transcoder = origin.site == "transcoders"
    config = SAEConfig(
        architecture="jumprelu",
        d_in=d_in,
        d_sae=d_sae,
        d_out=tensors.shape("W_dec", 2)[1],
        input_scale=1 / scale,
        output_scale=1 / scale,
        predicts_another_place=is_transcoder,
    )
    notes = [BEFORE_GAIN] if is_transcoder else []
    if origin.is_embedding:
        notes.append(
            f"It reads token embeddings that were multiplied by {scale:g}; Gemma multiplies by "
            "sqrt(d_model), rounded to the dtype that it runs in."
        )
    reads, predicts = _hook_points(origin, is_scaled=scale != 1)
    card = SAECard(
        format="Gemma Scope",
        source=str(path),
        hook_point=reads,
        hook_point_out=predicts,
        model_name=origin.model_name,
        notes=tuple(notes),
    )
    named = {name: tensors[name] for name in TENSORS}
    return SAE(config, SAEStore(config, named), card)


def _origin(folder: Path) -> _Origin:
    text = folder.absolute().as_posix()
    repos, inner = list(REPO.finditer(text)), INNER.search(text)
    repo = repos[-1] if repos else None
    return _Origin(
        model_name=repo and f"google/gemma-2-{repo[1]}" + ("-it" if repo[2] == "it" else ""),
        site=repo and repo[3],
        layer=int(inner[1]) if inner and inner[1] else None,
        is_embedding=bool(inner and inner[2]),
    )


def _hook_points(origin: _Origin, *, is_scaled: bool) -> tuple[str | None, str | None]:
    """Scaled embeddings are what enters the first block; unscaled ones are no hook point."""
    if origin.is_embedding:
        return ("blocks.0.hook_resid_pre" if is_scaled else None), None
    if origin.site is None or origin.layer is None:
        return None, None
    reads, predicts = SITES[origin.site]
    return reads.format(origin.layer), predicts and predicts.format(origin.layer)
