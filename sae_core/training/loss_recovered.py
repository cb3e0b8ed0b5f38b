"""How well a model still predicts the next token with an SAE's reconstruction spliced in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae_core.errors import HookPointError, ModelLoadError
from sae_core.hook_points import HookPoint
from sae_core.language_model.splicing import WholeModel
from sae_core.sae import SAE


class LossRecovered(NamedTuple):
    """Mean cross-entropy in nats a token; every position but each context's first is replaced."""

    n_tokens: int
    loss: float
    """Of the model as it is."""
    spliced_loss: float
    """With the reconstruction in place of the activations."""
    zero_loss: float
    """With zeros in their place."""

    @property
    def recovered(self) -> float:
        """1 where the reconstruction costs nothing, 0 where it is no better than zeros."""
        return (self.zero_loss - self.spliced_loss) / (self.zero_loss - self.loss)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return {**self._asdict(), "recovered": self.recovered}


def measure_loss_recovered(
    folder: Path,
    saes: Mapping[str, tuple[HookPoint, SAE]],
    contexts: Sequence[Sequence[int]],
    *,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, LossRecovered | str]:
    """For each SAE, by its name, what is recovered; or why it was not measured.

    `progress` is told how many passes over the contexts are done, and how many there are.
    """
    n_passes, n_done = 1 + len(saes) + len({place for place, _ in saes.values()}), 0
    n_tokens = sum(max(0, len(context) - 2) for context in contexts)

    def after_pass(loss: float) -> float:
        nonlocal n_done
        n_done += 1
        progress(n_done, n_passes)
        return loss

    progress(0, n_passes)
    try:
        model = WholeModel(folder, device=device)
        whole = after_pass(model.loss(contexts))
    except ModelLoadError as error:
        return dict.fromkeys(saes, str(error))
    found: dict[str, LossRecovered | str] = {}
    zeros: dict[HookPoint, float] = {}
    for name, (hook_point, sae) in saes.items():
        placed = sae.to(device)
        try:
            spliced = after_pass(model.loss(contexts, hook_point, placed.forward))
            if hook_point not in zeros:
                zeros[hook_point] = after_pass(model.loss(contexts, hook_point, torch.zeros_like))
        except HookPointError as error:
            found[name] = str(error)
            continue
        found[name] = LossRecovered(n_tokens, whole, spliced, zeros[hook_point])
    return found
