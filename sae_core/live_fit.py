"""How well whole SAEs fit some tokens of live traffic: L0 and reconstruction error, in sums.

The whole dictionary is run, which costs about a fifth of the default bundle's forward pass: for a
share of the texts, and at most `MAX_TOKENS` of each piece.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.encoder import cut_input
from sae_core.hook_points import HookPoint
from sae_core.sae import SAE, SMALL_NUMBERS
from sae_core.vitals import FitSums

MAX_TOKENS = 256

Shift = Callable[[Float[Tensor, "n _"]], Float[Tensor, "n _"]]


class LiveFit:
    """The SAEs of a scorer, whole; read when the first text is measured.

    Args:
        saes: where each reads, what is done to that before, and what it is. Those whose encoder has
            more than `SMALL_NUMBERS` are left out: they would hold a step up.
    """

    def __init__(self, saes: Mapping[str, tuple[HookPoint, Shift | None, SAE]]) -> None:
        self._saes = {
            sae_id: (hook_point, shift, sae.replaced())
            for sae_id, (hook_point, shift, sae) in saes.items()
            if sae.config.d_in * sae.config.d_sae <= SMALL_NUMBERS
        }

    @property
    def sae_ids(self) -> tuple[str, ...]:
        """Those that are measured."""
        return tuple(self._saes)

    def __call__(
        self, resid: Mapping[HookPoint, Float[Tensor, "n _"]], start: int
    ) -> dict[str, FitSums]:
        """The sums over consecutive tokens of one text, by SAE; none where no token is left.

        Args:
            start: position of the first one. Position 0 is left out: models put a value there that
                is like no other, and it would be most of the variance.
        """
        rows = slice(1 if start == 0 else 0, MAX_TOKENS)
        found: dict[str, FitSums] = {}
        with torch.inference_mode():
            for sae_id, (hook_point, shift, _) in self._saes.items():
                x = resid[hook_point][rows].float()
                if not len(x):
                    continue
                found[sae_id] = _sums(self._on(sae_id, x.device), x if shift is None else shift(x))
        return found

    def _on(self, sae_id: str, device: torch.device) -> SAE:
        hook_point, shift, sae = self._saes[sae_id]
        if sae.weights.W_enc.device != device:
            sae = sae.to(device)
            self._saes[sae_id] = (hook_point, shift, sae)
        return sae


def _sums(sae: SAE, x: Float[Tensor, "n width"]) -> FitSums:
    recons, l0, _ = sae.reconstruct(x)
    target = cut_input(sae.config, x).double()
    error = float("nan")
    comparable = not sae.config.predicts_another_place
    if comparable and recons is not None and recons.shape == target.shape:
        error = float((target - recons).square().sum())
    return FitSums(
        n_tokens=len(x),
        n_active=float(l0.sum()),
        error=error,
        squares=float(target.square().sum()),
        sums=target.sum(dim=0).cpu().numpy(),
    )
