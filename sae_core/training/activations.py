"""Texts to contexts, and contexts to a language model's activations.

Each document is cut into contexts that begin with BOS, as a served text does; the BOS position
itself is never handed on, because its norm is many times that of any other token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.errors import TrainingError as TrainingError
from sae_core.hook_points import HookPoint
from sae_core.language_model.model import LanguageModel, Segment


@runtime_checkable
class ContextForward(Protocol):
    """Runs a language model up to one hook point."""

    def __call__(self, contexts: Sequence[Sequence[int]]) -> Float[Tensor, "total d_in"]:
        """Residuals of every position but the first of each context, contexts one after another."""
        ...


@runtime_checkable
class ActivationsForward(Protocol):
    """Runs a language model up to the deepest of several hook points."""

    @property
    def widths(self) -> Mapping[str, int]:
        """Entries of one token's activations, by the hook point's name."""
        ...

    def __call__(self, contexts: Sequence[Sequence[int]]) -> Mapping[str, Float[Tensor, "total _"]]:
        """By hook point, float32 on the CPU, what `ContextForward` gives for one."""
        ...


@runtime_checkable
class TextEncoder(Protocol):
    """The part of a tokenizer that training needs."""

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of the text, BOS first when asked."""
        ...


def token_contexts(
    texts: Iterable[str], tokenizer: TextEncoder, context_tokens: int
) -> Iterator[list[int]]:
    """Contexts of at most `context_tokens` ids, BOS included; a long text gives several.

    A rest of fewer than four tokens is dropped. Where the tokenizer has no BOS a context begins
    with the text, and its first token is the one that is not trained on.
    """
    bos = tokenizer.encode("", add_bos=True)[:1]
    step = context_tokens - len(bos)
    for text in texts:
        body = tokenizer.encode(text, add_bos=False)
        for start in range(0, len(body), step):
            piece = body[start : start + step]
            if len(piece) >= 4:
                yield [*bos, *piece]


class LanguageModelForward:
    """`ActivationsForward` of a language model, at all of its hook points in one packed pass.

    `mixed_precision` runs a float32 model's matrix products in bfloat16. The residual stream
    itself stays float32: some models (Gemma 3) keep values in it that bfloat16 cannot tell apart.
    """

    def __init__(self, model: LanguageModel, *, mixed_precision: bool) -> None:
        self.model = model
        self.mixed_precision = mixed_precision
        self.widths = {str(hook_point): width for hook_point, width in model.widths.items()}

    def __call__(self, contexts: Sequence[Sequence[int]]) -> dict[str, Float[Tensor, "total _"]]:
        device = self.model.config.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.mixed_precision):
            segments = [Segment(self.model.open_stream(), context) for context in contexts]
            acts = self.model.step(segments)
        total = sum(len(context) for context in contexts)
        is_kept = torch.ones(total, dtype=torch.bool, device=device)
        is_kept[[0, *accumulate(len(context) for context in contexts)][:-1]] = False
        return {str(name): rows[is_kept].float().cpu() for name, rows in acts.items()}


def language_model_forward(
    model: LanguageModel, hook_point: HookPoint, *, mixed_precision: bool
) -> ContextForward:
    """The activations of `model` at one of its hook points; see `LanguageModelForward`."""
    everywhere = LanguageModelForward(model, mixed_precision=mixed_precision)

    def forward(contexts: Sequence[Sequence[int]]) -> Float[Tensor, "total d_in"]:
        return everywhere(contexts)[str(hook_point)]

    return forward
