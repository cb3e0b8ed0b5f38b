"""A plain Hugging Face forward pass to hold everything else to: slow, and nothing of ours in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

ROUTING_GAP = 1e-4
"""Two experts this close in their router's numbers may change places by rounding alone."""


class PlainModel:
    """The whole model in float64 with its own eager attention, over one text at a time.

    Args:
        layer: The block behind which the residual stream is read.
    """

    def __init__(self, folder: Path, layer: int) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float64,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        self._model.eval()  # type: ignore[no-untyped-call]
        n_layers = self._model.config.num_hidden_layers
        blocks = next(
            m for m in self._model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers
        )
        self._out: list[Any] = []
        blocks[layer].register_forward_hook(lambda _module, _args, out: self._out.append(out))
        self._gaps: list[Tensor] = []
        for name, module in blocks[: layer + 1].named_modules():
            if name.endswith(".gate"):
                module.register_forward_hook(self._note_gap)
        self._known: dict[tuple[int, ...], tuple[Tensor, int]] = {}

    def __call__(self, token_ids: Sequence[int]) -> tuple[Float64[Tensor, "n_tokens d_model"], int]:
        """The residual stream, and how many tokens from the first do not depend on rounding.

        The others come at or after one whose experts are too close to tell.
        """
        key = tuple(token_ids)
        if key not in self._known:
            self._out.clear()
            self._gaps.clear()
            with torch.no_grad():
                self._model(torch.tensor([key]), use_cache=False)
            out = self._out[0][0] if isinstance(self._out[0], tuple) else self._out[0]
            close = torch.zeros(len(key) + 1, dtype=torch.bool)
            close[-1] = True
            for gap in self._gaps:
                close[:-1] |= gap < ROUTING_GAP
            self._known[key] = out.reshape(len(key), -1), int(close.int().argmax())
        return self._known[key]

    def _note_gap(self, _module: nn.Module, _args: object, out: Any) -> None:
        numbers = (out[0] if isinstance(out, tuple) else out).flatten(0, -2)
        k = self._model.config.num_experts_per_tok
        best = numbers.topk(k + 1, dim=-1).values
        self._gaps.append(best[:, k - 1] - best[:, k])
