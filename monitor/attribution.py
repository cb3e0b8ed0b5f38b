"""Why a cluster's score is what it is: the tokens that made it, and what each latent gave."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from monitor.audit_log.token_latents import TokenLatents
from monitor.bundle_spec import ClusterModel
from monitor.records import Attribution, LatentContribution


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Window:
    """The tokens that made one cluster's score."""

    cluster: ClusterModel
    positions: NDArray[np.int64]
    """[n_tokens] in the request, ascending."""
    weights: NDArray[np.float64]
    """[n_tokens]: the score is the weighted sum of the tokens' fused logits, but for the gate."""
    dense: NDArray[np.float64]
    """[n_tokens]: logits of the dense head."""
    terms: NDArray[np.float64]
    """[n_tokens, n_latents]: what each latent adds to a token's fused logit."""
    is_gated: bool
    """Whether the evidence gate holds the score below that sum."""

    def attribution(self, score: float) -> Attribution:
        """The terms of the score."""
        cluster = self.cluster
        shares = self.weights @ self.terms
        dense = float(cluster.fusion.dense * (self.weights @ self.dense))
        bias = float(cluster.fusion.bias * self.weights.sum())
        latents = [
            LatentContribution(
                sae=latent.sae,
                latent_id=latent.id,
                label=latent.label,
                contribution=float(shares[i]),
                positions=tuple(self.positions[self.terms[:, i] != 0].tolist()),
            )
            for i, latent in enumerate(cluster.latents)
            if shares[i] != 0
        ]
        total = dense + bias + sum(latent.contribution for latent in latents)
        return Attribution(
            latents=tuple(sorted(latents, key=lambda x: -abs(x.contribution))),
            dense=dense,
            bias=bias,
            gate=min(0.0, score - total) if self.is_gated else 0.0,
            window_start=int(self.positions[0]),
            window_stop=int(self.positions[-1]) + 1,
        )

    def token_latents(self) -> TokenLatents:
        """The same token by token."""
        return TokenLatents(
            latents=tuple((latent.sae, latent.id) for latent in self.cluster.latents),
            positions=self.positions,
            contributions=self.terms,
        )
