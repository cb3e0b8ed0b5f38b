"""A reservoir that mixes the activations of many documents before an SAE is trained on them.

Activations of several hook points lie side by side: a token's rows share one slot, so all SAEs see
the same tokens in the same order. The reservoir is filled, handed out in random order down to
half, and topped up. It lives in memory, or in a folder of memory-mapped files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sae_core.errors import TrainingError
from sae_core.training.activations import ActivationsForward

GENERATOR = "generator"


class ActivationBuffer:
    """Rows of at most `capacity` tokens at every hook point.

    Args:
        contexts: Token ids, BOS first.
        forward: Gives the activations of some contexts.
        capacity: Tokens held.
        forward_tokens: Most tokens in one forward pass.
        total_tokens: No more than these are computed, for all `take`s together.
        seed: Of the order in which rows are handed out.
        folder: Where the rows are kept; None keeps them in memory.
        on_forward: Called after each forward pass of a filling with the tokens it has so far and
            those it will have. What it raises ends the filling and leaves the buffer as it was.
    """

    def __init__(
        self,
        contexts: Iterator[list[int]],
        forward: ActivationsForward,
        *,
        capacity: int,
        forward_tokens: int,
        total_tokens: int,
        seed: int,
        folder: Path | None = None,
        on_forward: Callable[[int, int], None] = lambda done, wanted: None,
    ) -> None:
        self._contexts = contexts
        self._forward = forward
        self._forward_tokens = forward_tokens
        self._on_forward = on_forward
        self._rows = {
            name: _rows_of(capacity, width, folder, f"rows-{index}")
            for index, (name, width) in enumerate(forward.widths.items())
        }
        self.capacity = capacity
        self.n_contexts = 0
        """Contexts whose rows are, or were, in the buffer."""
        self._digest = hashlib.sha256()
        self._n_wanted = total_tokens
        """Tokens still to be computed."""
        self._order = torch.empty(0, dtype=torch.int64)
        """Slots in the order in which they will be handed out, the last one first."""
        self._pending: list[int] | None = None
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Tokens held."""
        return len(self._order)

    def take(self, n_tokens: int) -> dict[str, Float[Tensor, "n_tokens _"]] | None:
        """The next tokens at every hook point, in random order; None where fewer are left."""
        if len(self) - n_tokens < self.capacity // 2:
            self._fill()
        if len(self) < n_tokens:
            return None
        self._order, slots = self._order[:-n_tokens], self._order[-n_tokens:]
        return self._at(slots)

    def peek(self, n_tokens: int) -> dict[str, Float[Tensor, "found _"]]:
        """Up to `n_tokens` random tokens of a full buffer, which stay in it."""
        if not len(self):
            self._fill()
        if not len(self):
            raise TrainingError("data: found no text of at least four tokens to train on")
        return self._at(self._order[-n_tokens:])

    @property
    def n_to_compute(self) -> int:
        """Tokens whose activations are still to be computed, if the texts have so many."""
        return max(0, self._n_wanted)

    @property
    def data_digest(self) -> str:
        """sha256 over the token ids of those contexts: the tokens as little-endian 32-bit numbers,
        the length before them."""
        return self._digest.hexdigest()

    def state(self) -> dict[str, Tensor]:
        """The rows in the order in which they will be handed out, and the generator."""
        return {**self._at(self._order), GENERATOR: self._generator.get_state()}

    def load_state(self, tensors: Mapping[str, Tensor], *, n_contexts: int, n_taken: int) -> None:
        """Put back what `state` gave, and pass over the contexts that were used until then."""
        n_held = 0
        for name, rows in self._rows.items():
            given = tensors.get(name)
            if given is None or given.shape[1:] != rows.shape[1:] or len(given) > self.capacity:
                raise TrainingError(
                    f"checkpoint: found no buffer of {name} {rows.shape[1]} wide with at most "
                    f"{self.capacity} tokens, expected one"
                )
            n_held = len(given)
            rows[:n_held] = given
        self._order = torch.arange(n_held)
        self._generator.set_state(tensors[GENERATOR])
        self._n_wanted -= n_taken + n_held
        for _ in range(n_contexts):
            context = next(self._contexts, None)
            if context is None:
                raise TrainingError(
                    f"data: found fewer than the {n_contexts} contexts that the checkpoint has "
                    "used, expected the data it was made with"
                )
            self._count(context)

    def _at(self, slots: Int64[Tensor, " n"]) -> dict[str, Float[Tensor, "n _"]]:
        return {name: rows[slots] for name, rows in self._rows.items()}

    def _fill(self) -> None:
        """Top up, then shuffle all; nothing changes where `on_forward` raises."""
        if self._n_wanted <= 0:
            return
        is_free = torch.ones(self.capacity, dtype=torch.bool)
        is_free[self._order] = False
        free = is_free.nonzero()[:, 0]
        n_wanted = min(len(free), self._n_wanted)
        n_new = 0
        used: list[list[int]] = []
        for batch in self._batches(n_wanted):
            acts = self._forward(batch)
            n_rows = sum(len(context) - 1 for context in batch)
            for name, rows in self._rows.items():
                rows[free[n_new : n_new + n_rows]] = acts[name]
            n_new += n_rows
            used += batch
            self._on_forward(n_new, n_wanted)
        if not n_new:
            return
        order = torch.cat([self._order, free[:n_new]])
        self._order = order[torch.randperm(len(order), generator=self._generator)]
        for context in used:
            self._count(context)
        self._n_wanted -= n_new

    def _count(self, context: Sequence[int]) -> None:
        self.n_contexts += 1
        self._digest.update(np.array([len(context), *context], dtype="<u4").tobytes())

    def _batches(self, n_wanted: int) -> Iterator[list[list[int]]]:
        """Contexts of `n_wanted` tokens or a few less, as many to a batch as a forward takes."""
        batch: list[list[int]] = []
        n_batch = n_tokens = 0
        while (context := self._next_context()) is not None:
            n_rows = len(context) - 1
            if n_tokens + n_rows > n_wanted:
                self._pending = context
                break
            if batch and n_batch + len(context) > self._forward_tokens:
                yield batch
                batch, n_batch = [], 0
            batch.append(context)
            n_batch += len(context)
            n_tokens += n_rows
        if batch:
            yield batch

    def _next_context(self) -> list[int] | None:
        if self._pending is not None:
            context, self._pending = self._pending, None
            return context
        return next(self._contexts, None)


def _rows_of(capacity: int, width: int, folder: Path | None, name: str) -> Tensor:
    if folder is None:
        return torch.empty(capacity, width)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.float32"
        array = np.memmap(path, dtype=np.float32, mode="w+", shape=(capacity, width))
    except OSError as error:
        raise TrainingError(
            f"buffer folder {folder}: cannot hold {4 * capacity * width:,} bytes ({error.strerror})"
        ) from error
    return torch.from_numpy(array)
