"""Texts to shuffled residual activations, the SAE trainer's diet.

Each document is cut into contexts that begin with BOS, as a served text does; the BOS position
itself is never handed on, because its norm is many times that of any other token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.errors import SAECoreError
from sae_core.hook_points import HookPoint
from sae_core.language_model.model import LanguageModel, Segment


class TrainingError(SAECoreError):
    """Training cannot go on: too little data, a bad setting, a checkpoint of another run."""


@runtime_checkable
class ContextForward(Protocol):
    """Runs a language model up to one hook point."""

    def __call__(self, contexts: Sequence[Sequence[int]]) -> Float[Tensor, "total d_in"]:
        """Residuals of every position but the first of each context, contexts one after another."""
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


def language_model_forward(
    model: LanguageModel, hook_point: HookPoint, *, mixed_precision: bool
) -> ContextForward:
    """The residual stream of `model` at one of its hook points.

    `mixed_precision` runs a float32 model's matrix products in bfloat16. The residual stream
    itself stays float32: some models (Gemma 3) keep values in it that bfloat16 cannot tell apart.
    """
    device = model.config.device.type

    def forward(contexts: Sequence[Sequence[int]]) -> Float[Tensor, "total d_in"]:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=mixed_precision):
            segments = [Segment(model.open_stream(), context) for context in contexts]
            resid = model.step(segments)[hook_point].float()  # all positions
        is_first = torch.zeros(len(resid), dtype=torch.bool)
        is_first[[0, *accumulate(len(context) for context in contexts)][:-1]] = True
        return resid[~is_first.to(resid.device)].cpu()

    return forward


class ActivationBuffer:
    """A reservoir that mixes the activations of many documents before they are trained on.

    It is filled to `capacity` rows, shuffled, and handed out down to half; then the next half
    joins. That half is computed by `n_workers` threads while the trainer is busy; which contexts
    it holds does not depend on timing.
    """

    def __init__(
        self,
        contexts: Iterator[list[int]],
        forward: ContextForward,
        *,
        capacity: int,
        forward_tokens: int,
        generator: torch.Generator,
        n_workers: int = 1,
    ) -> None:
        self.contexts = contexts
        self.forward = forward
        self.capacity = capacity
        self.forward_tokens = forward_tokens
        self.generator = generator
        self.rows: Tensor | None = None
        self.n_contexts = 0
        """Contexts whose rows are, or were, in the buffer."""
        self._workers = ThreadPoolExecutor(n_workers, thread_name_prefix="activations")
        self._coming: list[Future[Tensor]] = []
        self._n_coming = 0

    def take(self, n_rows: int) -> Float[Tensor, "rows d_in"] | None:
        """The next `n_rows` rows in random order; None once the texts have run out."""
        if self.rows is None:
            self._order(self.capacity)
            self._receive()
        elif len(self.rows) - n_rows < self.capacity // 2:
            self._receive()
        if self.rows is None or len(self.rows) < n_rows:
            return None
        batch, self.rows = self.rows[-n_rows:], self.rows[:-n_rows]
        return batch

    def peek(self) -> Float[Tensor, "rows d_in"]:
        """The rows of a full buffer, which stay in it."""
        if self.rows is None:
            self._order(self.capacity)
            self._receive()
        if self.rows is None:
            raise TrainingError("the texts gave no context of at least four tokens")
        return self.rows

    def skip_contexts(self, n_contexts: int) -> None:
        """Pass over contexts that an earlier run has already consumed."""
        for _ in range(n_contexts):
            if next(self.contexts, None) is None:
                break
        self.n_contexts = n_contexts

    def close(self) -> None:
        """Stop the workers; rows still coming are dropped."""
        self._workers.shutdown(wait=True, cancel_futures=True)

    def _order(self, n_rows: int) -> None:
        """Set the workers to compute at least `n_rows` rows, or what the texts still give."""
        waiting: list[list[int]] = []
        n_waiting = 0
        while n_waiting < n_rows:
            context = next(self.contexts, None)
            if context is None:
                break
            waiting.append(context)
            n_waiting += len(context) - 1
        # Contexts of like length share a forward, for engines that pad.
        waiting.sort(key=len)
        self._n_coming = len(waiting)
        self._coming = [
            self._workers.submit(self._rows_of, batch)
            for batch in _by_tokens(waiting, self.forward_tokens)
        ]

    def _rows_of(self, batch: list[list[int]]) -> Float[Tensor, "rows d_in"]:
        return self.forward(batch).float()

    def _receive(self) -> None:
        """Mix in what was ordered, and order the next half."""
        if self._coming:
            kept = [] if self.rows is None else [self.rows]
            rows = torch.cat([*kept, *(future.result() for future in self._coming)])
            self.rows = rows[torch.randperm(len(rows), generator=self.generator)]
            self.n_contexts += self._n_coming
        self._order(self.capacity // 2)


def _by_tokens(contexts: Sequence[list[int]], n_tokens: int) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    total = 0
    for context in contexts:
        if batch and total + len(context) > n_tokens:
            yield batch
            batch, total = [], 0
        batch.append(context)
        total += len(context)
    if batch:
        yield batch
