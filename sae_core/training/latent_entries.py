"""The few (token, latent) pairs of a batch that matter, and the products over them.

Decoding and all gradients of an SAE are sums over active pairs, about k in d_sae of them. On a CPU
only their decoder rows are read. Where many latents are active, or on a GPU, the same products are
dense.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

DENSE_SHARE = 0.08
"""Share of pairs from which dense products are quicker: one pair costs as much as about twelve in a
matrix product (benchmarks/LOG.md, 2026-11-24)."""


class LatentEntries:
    """Pairs of a batch in row-major order; every product takes one number for each of them."""

    def __init__(self, flat_ids: Int64[Tensor, " n"], n_rows: int, d_sae: int) -> None:
        self.flat_ids = flat_ids
        self.n_rows, self.d_sae = n_rows, d_sae
        self.row_ids = torch.div(flat_ids, d_sae, rounding_mode="floor")
        self.latent_ids = flat_ids - self.row_ids * d_sae
        on_cpu = flat_ids.device.type == "cpu"
        self.is_dense = not on_cpu or len(flat_ids) > DENSE_SHARE * n_rows * d_sae
        if not self.is_dense:
            self._starts = torch.searchsorted(self.row_ids, torch.arange(n_rows))
            self._by_latent = _order_of(self.latent_ids, d_sae)
            counts = torch.bincount(self.latent_ids, minlength=d_sae)
            self._latent_starts = counts.cumsum(0) - counts

    def decode(
        self, acts: Float[Tensor, " n"], W_dec: Float[Tensor, "d_sae d_in"]
    ) -> tuple[Float[Tensor, "rows d_in"], _Decoded]:
        """What the activations stand for, and what `grad_acts` needs of it."""
        W_dec = W_dec.detach()
        if self.is_dense:
            return self._matrix(acts) @ W_dec, _Decoded(acts, W_dec)
        with torch.enable_grad():
            acts = acts.detach().requires_grad_()
            recons = functional.embedding_bag(
                self.latent_ids, W_dec, self._starts, mode="sum", per_sample_weights=acts
            )
        return recons.detach(), _Decoded(acts, recons)

    def grad_acts(
        self, decoded: _Decoded, grad_recons: Float[Tensor, "rows d_in"]
    ) -> Float[Tensor, " n"]:
        """For each pair the product of its row's gradient and its latent's decoder row."""
        if self.is_dense:
            return (grad_recons @ decoded.of.T).flatten()[self.flat_ids]
        (found,) = torch.autograd.grad(decoded.of, decoded.acts, grad_recons)
        return found

    def sum_rows(
        self, weights: Float[Tensor, " n"], rows: Float[Tensor, "rows d_in"]
    ) -> Float[Tensor, "d_sae d_in"]:
        """For each latent the weighted sum of its rows."""
        if self.is_dense:
            return self._matrix(weights).T @ rows
        order = self._by_latent
        return functional.embedding_bag(
            self.row_ids[order],
            rows,
            self._latent_starts,
            mode="sum",
            per_sample_weights=weights[order],
        )

    def sum(self, weights: Float[Tensor, " n"]) -> Float[Tensor, " d_sae"]:
        """For each latent the sum of its numbers."""
        total = torch.bincount(self.latent_ids, weights=weights, minlength=self.d_sae)
        return total.float()

    def _matrix(self, weights: Float[Tensor, " n"]) -> Float[Tensor, "rows d_sae"]:
        flat = torch.zeros(self.n_rows * self.d_sae, device=weights.device)
        flat[self.flat_ids] = weights
        return flat.view(self.n_rows, self.d_sae)


class _Decoded:
    """Activations, and their decoder (dense) or their reconstruction with its graph (sparse)."""

    def __init__(self, acts: Tensor, of: Tensor) -> None:
        self.acts, self.of = acts, of


def _order_of(latent_ids: Int64[Tensor, " n"], d_sae: int) -> Int64[Tensor, " n"]:
    """Stable order by latent; NumPy sorts numbers of 16 bits by their digits, in a third of
    torch's time, and waits for no other thread."""
    small = np.uint16 if d_sae <= 2**16 else np.int64
    return torch.from_numpy(np.argsort(latent_ids.numpy().astype(small), kind="stable"))
