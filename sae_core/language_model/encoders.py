"""T5 and ViT: a whole model, one plain forward pass, residual streams only.

Not a `LanguageModel`: nothing is packed, streamed or remembered, a batch is padded by its caller,
and every layer of the model is loaded, though the pass ends at the deepest hook point. An encoder
sees its whole input at once, so there is nothing to score token by token. Positions of a ViT are
the class token, then the patches row by row.

    t5     encoder.blocks.L.hook_resid_pre | _mid | _post     after L's self-attention: _mid
           decoder.blocks.L.hook_resid_pre | _post
    vit    blocks.L.hook_resid_pre | _mid | _post
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import T5EncoderModel, T5Model, ViTModel

from sae_core.errors import HookPointError, ModelLoadError, TokenError
from sae_core.hook_points import HookPoint, Stack
from sae_core.language_model.checkpoint import one_line
from sae_core.language_model.sites import HookSite

ENCODER_MODEL_TYPES = ("t5", "vit")
"""Values of `model_type` in config.json."""

_STACKS: dict[str, dict[Stack, tuple[str, ...]]] = {
    "t5": {"encoder": ("encoder.block",), "decoder": ("decoder.block",)},
    "vit": {"": ("layers", "encoder.layer")},  # the latter in older versions of transformers
}
"""By model type and stack, the paths under which the list of blocks is looked for."""


class ResidualReader:
    """A T5 or ViT model whose residual streams are read at some hook points."""

    def __init__(
        self, module: nn.Module, model_type: str, hook_points: Sequence[HookPoint]
    ) -> None:
        self.hook_points: tuple[HookPoint, ...] = tuple(dict.fromkeys(hook_points))
        self.d_model = int(module.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self.required: tuple[str, ...] = _required(model_type, self.hook_points)
        """Names of the tensors that `read` needs."""
        self._module = module
        self._sites = {h: locate_residual(module, model_type, h) for h in self.hook_points}
        self._lock = Lock()

    def read(self, **inputs: Tensor) -> dict[HookPoint, Float[Tensor, "batch pos d_model"]]:
        """The residual stream at every hook point, padded positions included.

        Args:
            inputs: By Hugging Face's names: `pixel_values` for ViT; `input_ids` for T5, with
                `decoder_input_ids` when a decoder hook point is read; masks as they are there.

        Raises:
            TokenError: An input that is needed is not given.
        """
        missing = [name for name in self.required if name not in inputs]
        if missing:
            found = ", ".join(inputs) or "none"
            raise TokenError(f"inputs: found {found}, expected {', '.join(self.required)}")
        captured: dict[HookPoint, Tensor] = {}
        with (
            self._lock,
            self._capture(captured),
            torch.inference_mode(),
            suppress(_DeepestReached),
        ):
            self._module(**inputs)
        return {hook_point: captured[hook_point].clone() for hook_point in self.hook_points}

    @contextmanager
    def _capture(self, captured: dict[HookPoint, Tensor]) -> Iterator[None]:
        def receive(hook_point: HookPoint, resid: Tensor) -> None:
            captured[hook_point] = resid
            if len(captured) == len(self._sites):
                raise _DeepestReached

        handles = [site.register(partial(receive, h)) for h, site in self._sites.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _DeepestReached(Exception):
    """Ends a forward pass once every hook point has been read; never leaves `read`."""


def load_residual_reader(
    folder: str | Path,
    hook_points: Iterable[HookPoint],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ResidualReader:
    """Loads the T5 or ViT model in `folder`; of a T5 only the encoder when no more is read.

    Raises:
        ModelLoadError: The folder is missing, damaged, incomplete or of another family.
        HookPointError: The model has no such place, or there is none to read.
    """
    folder, wanted = Path(folder), tuple(hook_points)
    if not wanted:
        raise HookPointError("hook points: found none, expected at least one")
    model_type = _read_model_type(folder / "config.json")
    for hook_point in wanted:
        _check_stack(model_type, hook_point)
    load: Any = partial(ViTModel.from_pretrained, add_pooling_layer=False)
    if model_type == "t5":
        reads_decoder = any(h.stack == "decoder" for h in wanted)
        load = (T5Model if reads_decoder else T5EncoderModel).from_pretrained
    try:
        module, info = load(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
        )
    except (
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        raise ModelLoadError(f"model folder {folder}: {one_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelLoadError(f"model folder {folder}: missing tensor {missing[0]}{more}")
    module = module.eval().requires_grad_(False).to(device)
    return ResidualReader(module, model_type, wanted)


def locate_residual(module: nn.Module, model_type: str, hook_point: HookPoint) -> HookSite:
    """The module of a T5 or ViT base model that carries a hook point."""
    _check_stack(model_type, hook_point)
    blocks = _blocks(module, _STACKS[model_type][hook_point.stack])
    if hook_point.layer >= len(blocks):
        deepest = HookPoint(len(blocks) - 1, "resid_post", hook_point.stack)
        raise HookPointError(
            f"hook point {hook_point}: this {model_type} model has {len(blocks)} such layers, "
            f"so the deepest is {deepest}"
        )
    block = blocks[hook_point.layer]
    if hook_point.site == "resid_mid":
        mid = block.get_submodule("layernorm_after" if model_type == "vit" else "layer.1")
        return HookSite(mid, "input")
    return HookSite(block, "input" if hook_point.site == "resid_pre" else "output")


def _check_stack(model_type: str, hook_point: HookPoint) -> None:
    stacks = _STACKS[model_type]
    if hook_point.stack not in stacks:
        expected = " or ".join(str(HookPoint(0, "resid_post", stack)) for stack in stacks)
        raise HookPointError(
            f"hook point {hook_point}: a {model_type} model has no such stack, "
            f"expected a name such as {expected}"
        )
    sites = ["resid_pre", "resid_mid", "resid_post"]
    if hook_point.stack == "decoder":
        sites.remove("resid_mid")  # cross-attention splits it in two
    if hook_point.site not in sites:
        raise HookPointError(
            f"hook point {hook_point}: of a {model_type} model's {hook_point.stack or 'blocks'} "
            f"only {', '.join(sites)} can be read"
        )


def _blocks(module: nn.Module, paths: Sequence[str]) -> nn.ModuleList:
    for path in paths:
        with suppress(AttributeError):
            blocks = module.get_submodule(path)
            if isinstance(blocks, nn.ModuleList):
                return blocks
    raise HookPointError(f"{type(module).__name__}: found no list of blocks at {', '.join(paths)}")


def _required(model_type: str, hook_points: Sequence[HookPoint]) -> tuple[str, ...]:
    if model_type == "vit":
        return ("pixel_values",)
    reads_decoder = any(h.stack == "decoder" for h in hook_points)
    return ("input_ids", "decoder_input_ids") if reads_decoder else ("input_ids",)


def _read_model_type(path: Path) -> str:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: cannot be read ({one_line(error)})") from error
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if model_type not in ENCODER_MODEL_TYPES:
        expected = ", ".join(ENCODER_MODEL_TYPES)
        raise ModelLoadError(f"{path}: found model_type {model_type!r}, expected one of {expected}")
    return str(model_type)
