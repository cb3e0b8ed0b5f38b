"""Names of places in a language model where activations are read.

Two vocabularies, because SAE formats store both: TransformerLens's (`blocks.8.hook_resid_post`) and
Hugging Face's module paths (`model.layers.8.self_attn.o_proj.input`). Knows no model: which module
a name means, and whether the family has such a place, is `language_model.sites`'s.

    d_model wide unless noted        site             name
    token embedding (Gemma: scaled,  embed            hook_embed
      as it enters the stream)
    before a block                   resid_pre        blocks.L.hook_resid_pre
    heads, side by side, n_heads *   z                blocks.L.attn.hook_z
      head_dim wide, before o_proj
    what attention adds              attn_out         blocks.L.hook_attn_out
    between attention and MLP        resid_mid        blocks.L.hook_resid_mid
    MLP's norm, before its gain      mlp_normalized   blocks.L.ln2.hook_normalized
    what enters the MLP              mlp_in           blocks.L.mlp.hook_in
    MLP neurons, d_mlp wide          mlp_post         blocks.L.mlp.hook_post
    what the MLP adds                mlp_out          blocks.L.hook_mlp_out
    after a block                    resid_post       blocks.L.hook_resid_post
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, cast

from sae_core.errors import HookPointError

Site = Literal[
    "embed",
    "resid_pre",
    "z",
    "attn_out",
    "resid_mid",
    "mlp_normalized",
    "mlp_in",
    "mlp_post",
    "mlp_out",
    "resid_post",
    "module",
]
"""Places in the order in which a sequential block reaches them; "module" is a `ModulePath`'s."""

Stack = Literal["", "encoder", "decoder"]
"""Which stack of blocks; empty where a model has only one."""

IO = Literal["input", "output"]
"""Which side of a module."""

EMBED = "hook_embed"
_IN_BLOCK: dict[Site, str] = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
    "mlp_in": "mlp.hook_in",
    "mlp_post": "mlp.hook_post",
    "mlp_normalized": "ln2.hook_normalized",
}
SITES_IN_BLOCK: tuple[Site, ...] = tuple(_IN_BLOCK)
"""Every named place inside a block."""

_NUMBER = r"0|[1-9][0-9]*"
_NAME = re.compile(rf"(?:(encoder|decoder)\.)?blocks\.({_NUMBER})\.([a-z0-9_.]+)")
_PATH = re.compile(
    r"(?:(?:model|transformer|gpt_neox|language_model|decoder)\.)*"  # ways to the base model
    rf"(?:(?P<blocks>layers|h)\.(?P<layer>{_NUMBER})(?P<submodule>(?:\.[A-Za-z0-9_]+)*?)"
    r"|(?P<embedding>embed_tokens|embed_in|wte))"
    r"(?:\.(?P<io>input|output))?"
)
_FORMS = (
    ", ".join(f"blocks.LAYER.{name}" for name in _IN_BLOCK.values())
    + f", {EMBED}, a Hugging Face module path such as layers.LAYER.mlp or "
    "model.layers.LAYER.self_attn.o_proj.input, or encoder. or decoder. before blocks.LAYER"
)


@dataclass(frozen=True, slots=True)
class HookPoint:
    """One place where activations are read; `str()` gives the name back."""

    layer: int
    """Index of the block, from 0; 0 for the embedding."""
    site: Site
    stack: Stack = ""

    def __post_init__(self) -> None:
        if self.site == "module":
            raise HookPointError("hook point: found site 'module', expected a ModulePath for it")
        if self.site == "embed" and self.layer:
            raise HookPointError(f"{EMBED}: found layer {self.layer}, expected 0")

    def __str__(self) -> str:
        stack = f"{self.stack}." if self.stack else ""
        if self.site == "embed":
            return stack + EMBED
        return f"{stack}blocks.{self.layer}.{_IN_BLOCK[self.site]}"


@dataclass(frozen=True, slots=True)
class ModulePath(HookPoint):
    """One side of a Hugging Face module, by its path; `str()` gives the text back as it was.

    Paths begin at the base model (`layers.5.mlp`, `h.3`, as sparsify has them) or further out
    (`model.layers.5`, as Gemma Scope 2 has them), and lie in a block or name the embedding.
    """

    layer: int = field(init=False)
    site: Site = field(init=False)
    stack: Stack = field(init=False)
    path: str
    """Without `.input` or `.output`."""
    io: IO | None = None
    """As written; a path that names no side means the output (see `side`)."""
    blocks: str = field(init=False, repr=False, compare=False)
    """Name of the list of blocks, `layers` or `h`; empty for the embedding."""
    submodule: str = field(init=False, repr=False, compare=False)
    """Path inside the block, empty for the block itself; of the embedding its name."""

    def __post_init__(self) -> None:
        match = _PATH.fullmatch(self.path)
        if match is None or match["io"] is not None:
            raise HookPointError(f"module path: found {self.path!r}, expected one of {_FORMS}")
        submodule = match["embedding"] or match["submodule"].removeprefix(".")
        facts = {"layer": int(match["layer"] or 0), "site": "module", "stack": ""}
        facts |= {"blocks": match["blocks"] or "", "submodule": submodule}
        for name, value in facts.items():
            object.__setattr__(self, name, value)

    @property
    def side(self) -> IO:
        """The side that is read."""
        return self.io or "output"

    def __str__(self) -> str:
        return self.path if self.io is None else f"{self.path}.{self.io}"


def parse_hook_point(text: str) -> HookPoint:
    """The hook point that `text` names; the error for anything else lists the accepted forms.

    `hook_mlp_in` is refused: in TransformerLens it is the residual stream before the norm, in
    SAELens' labels of the Gemma Scope 2 transcoders the MLP's input after it.
    """
    if text == EMBED:
        return HookPoint(0, "embed")
    if (match := _NAME.fullmatch(text)) is not None:
        for site, name in _IN_BLOCK.items():
            if name == match[3]:
                return HookPoint(int(match[2]), site, cast("Stack", match[1] or ""))
        if match[3] == "hook_mlp_in":
            block = f"blocks.{match[2]}"
            raise HookPointError(
                f"hook point: found {text!r}, which means different places to different tools; "
                f"expected {block}.hook_resid_mid (before the MLP's norm) or "
                f"{block}.mlp.hook_in (after it)"
            )
    if (match := _PATH.fullmatch(text)) is not None:
        io = cast("IO | None", match["io"])
        return ModulePath(text if io is None else text.removesuffix(f".{io}"), io)
    raise HookPointError(f"hook point: found {text!r}, expected {_FORMS}")


def n_layers_needed(hook_points: Iterable[HookPoint]) -> int:
    """How many blocks must exist to reach every hook point; resid_pre L is the stream after L."""
    return max((_n_layers(hook_point) for hook_point in hook_points), default=0)


def _n_layers(hook_point: HookPoint) -> int:
    if isinstance(hook_point, ModulePath):
        if not hook_point.blocks:
            return 0
        return hook_point.layer + bool(hook_point.submodule or hook_point.side == "output")
    return hook_point.layer + (hook_point.site not in ("embed", "resid_pre"))
