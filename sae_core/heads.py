"""Clusters of latents and dense heads: resid and latent_acts in, three logits a token out.

    sae   = sum_i weight_i * g(latent_act_i / scale_i)      g: identity | clip | step
    dense = dense_weight . resid + dense_bias               0 without a dense head
    fused = fusion_bias + fusion_sae * sae + fusion_dense * dense

`clip` is min(act / scale, 1); `step` is 1 where the latent is active. Float32 throughout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import isfinite
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from sae_core.errors import HeadError, ShapeError

Transform = Literal["identity", "clip", "step"]

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentTerm:
    """One latent's part in a cluster."""

    sae: str
    latent_id: int
    weight: float
    scale: float = 1.0
    """The activation that counts as 1; positive."""
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cluster:
    """A registered risk: weighted latents, perhaps a dense head, and how the two are fused."""

    id: str
    latents: tuple[LatentTerm, ...] = ()
    transform: Transform = "identity"
    dense_weight: Float[np.ndarray, " d_in"] | None = None
    dense_bias: float = 0.0
    dense_hook_point: str | None = None
    """Where the dense head reads, as `str(HookPoint)`; set exactly where `dense_weight` is."""
    fusion_sae: float = 1.0
    fusion_dense: float = 1.0
    fusion_bias: float = 0.0

    def __post_init__(self) -> None:
        if self.transform not in get_args(Transform):
            expected = ", ".join(get_args(Transform))
            raise self._error(f"transform is {self.transform!r}, expected one of {expected}")
        for name in ("dense_bias", "fusion_sae", "fusion_dense", "fusion_bias"):
            if not isfinite(getattr(self, name)):
                raise self._error(f"{name} is {getattr(self, name)}, expected a finite number")
        if (self.dense_weight is None) != (self.dense_hook_point is None):
            found = "absent" if self.dense_weight is None else "present"
            hook_point = self.dense_hook_point
            raise self._error(f"dense_weight is {found}, dense_hook_point is {hook_point}")
        if self.dense_weight is not None and not np.isfinite(self.dense_weight).all():
            index = int(np.flatnonzero(~np.isfinite(self.dense_weight))[0])
            found = f"{self.dense_weight[index]} at index {index}"
            raise self._error(f"dense_weight is {found}, expected finite numbers")
        seen: set[tuple[str, int]] = set()
        for term in self.latents:
            name = f"latent {term.latent_id} of SAE {term.sae!r}"
            if (term.sae, term.latent_id) in seen:
                raise self._error(f"{name} is registered twice, expected once")
            if term.latent_id < 0:
                raise self._error(f"{name}, expected an id from 0")
            if not isfinite(term.weight):
                raise self._error(f"{name} has weight {term.weight}, expected a finite number")
            if not (isfinite(term.scale) and term.scale > 0):
                raise self._error(f"{name} has scale {term.scale}, expected a positive number")
            if self.transform != "step" and abs(term.weight / term.scale) > _FLOAT32_MAX:
                found = f"weight {term.weight} over scale {term.scale}"
                raise self._error(f"{name} has {found}, expected a finite float32")
            seen.add((term.sae, term.latent_id))

    def _error(self, problem: str) -> HeadError:
        return HeadError(f"cluster {self.id!r}: {problem}")


class TokenLogits(NamedTuple):
    """Each token's logits from the three sources, clusters in registered order."""

    fused: Float[Tensor, "n_tokens n_clusters"]
    dense: Float[Tensor, "n_tokens n_clusters"]
    sae: Float[Tensor, "n_tokens n_clusters"]


class _Terms(NamedTuple):
    """The terms of all clusters under one transform, side by side."""

    columns: Int[Tensor, " n_terms"]
    """Of the latent activations."""
    scale: Float[Tensor, " n_terms"]
    weight: Float[Tensor, "n_terms n_clusters"]
    """What one unit adds, 0 for the other clusters: over `scale` for clip, of the step for step."""


class _DenseHeads(NamedTuple):
    """The dense heads that read one hook point; zeros for clusters that do not."""

    hook_point: str
    weight: Float[Tensor, "n_clusters d_in"]
    bias: Float[Tensor, " n_clusters"]


class ClusterHeads:
    """All clusters together, ready to score tokens.

    `sae_ids` is the order of the SAEs. `latent_ids` says which latents of each to encode, and in
    which order; the columns of several SAEs lie side by side in the order of `sae_ids`. `latents`
    names every column by SAE and latent id.
    """

    def __init__(
        self,
        clusters: Sequence[Cluster],
        sae_ids: Sequence[str],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        ids = [cluster.id for cluster in clusters]
        for repeated in (i for n, i in enumerate(ids) if i in ids[:n]):
            raise HeadError(f"cluster {repeated!r} is registered twice, expected once")
        registered: dict[str, set[int]] = {sae: set() for sae in sae_ids}
        for cluster in clusters:
            for term in cluster.latents:
                if term.sae not in registered:
                    found = f"latent {term.latent_id} is of SAE {term.sae!r}"
                    known = ", ".join(map(repr, sae_ids)) or "none"
                    raise HeadError(f"cluster {cluster.id!r}: {found}, registered SAEs: {known}")
                registered[term.sae].add(term.latent_id)
        self.clusters = tuple(clusters)
        self.sae_ids = tuple(sae_ids)
        self.latent_ids = {sae: tuple(sorted(some)) for sae, some in registered.items()}
        self.latents = tuple((sae, i) for sae in sae_ids for i in self.latent_ids[sae])
        columns = {latent: column for column, latent in enumerate(self.latents)}
        self._columns = [
            np.array([columns[t.sae, t.latent_id] for t in c.latents], np.int64) for c in clusters
        ]
        self._build(torch.device(device))

    def to(self, device: torch.device | str) -> ClusterHeads:
        """The same heads with their tensors on `device`."""
        return ClusterHeads(self.clusters, self.sae_ids, device=device)

    @property
    def n_latents(self) -> int:
        """Registered latents of all SAEs together: the columns of a row of latent activations."""
        return len(self.latents)

    @property
    def hook_points(self) -> tuple[str, ...]:
        """Where the dense heads read, each once, in order of first use."""
        return tuple(part.hook_point for part in self._dense)

    def check_fit(self, d_sae: Mapping[str, int], widths: Mapping[str, int]) -> None:
        """Raises HeadError where a latent or a dense head does not fit the SAEs or the model.

        `d_sae` gives the number of latents of every SAE id, `widths` how wide the activations are
        at every hook point that is read.
        """
        for cluster in self.clusters:
            for term in cluster.latents:
                if not 0 <= term.latent_id < d_sae[term.sae]:
                    last = d_sae[term.sae] - 1
                    found = f"latent {term.latent_id} of SAE {term.sae!r}"
                    raise HeadError(f"cluster {cluster.id!r}: {found}, expected 0 to {last}")
            if cluster.dense_weight is None or cluster.dense_hook_point is None:
                continue
            width = widths[cluster.dense_hook_point]
            if len(cluster.dense_weight) != width:
                found = f"dense_weight has {len(cluster.dense_weight)} entries"
                expected = f"{cluster.dense_hook_point} is {width} wide"
                raise HeadError(f"cluster {cluster.id!r}: {found}, {expected}")

    def __call__(
        self,
        resid: Mapping[str, Float[Tensor, "n_tokens _"]],
        latent_acts: Mapping[str, Float[Tensor, "n_tokens _"]],
    ) -> TokenLogits:
        """The logits of every token.

        `resid` is by hook point and needs those of `hook_points`; `latent_acts` is by SAE id, the
        columns as `latent_ids` has them. A row of each is one token.
        """
        n = next(iter((*resid.values(), *latent_acts.values()))).shape[0]  # len() ends a trace
        acts = side_by_side(
            [latent_acts[sae].float() for sae in self.sae_ids],
            torch.zeros(n, 0, device=self.device),
        )
        if acts.shape != (n, self.n_latents):
            raise ShapeError(f"latent_acts are {tuple(acts.shape)}, expected {n, self.n_latents}")
        # Few and large operations: each may wait for threads that other processes hold up.
        sae_parts = [] if self._plain is None else [acts @ self._plain]
        if self._clipped is not None:
            columns, scale, weight = self._clipped
            sae_parts.append(torch.minimum(acts.index_select(1, columns), scale) @ weight)
        if self._stepped is not None:
            columns, _, weight = self._stepped
            sae_parts.append((acts.index_select(1, columns) > 0).float() @ weight)
        dense_parts = [
            torch.nn.functional.linear(resid[part.hook_point].float(), part.weight, part.bias)
            for part in self._dense
        ]
        nothing = torch.zeros(n, len(self.clusters), device=self.device)
        sae = reduce(torch.add, sae_parts) if sae_parts else nothing
        dense = reduce(torch.add, dense_parts) if dense_parts else nothing
        fused = self._fusion_bias + self._fusion_sae * sae + self._fusion_dense * dense
        return TokenLogits(fused, dense, sae)

    def contributions(
        self, cluster_index: int, latent_acts: Float[np.ndarray, "n_tokens n_latents"]
    ) -> Float64[np.ndarray, "n_tokens n_terms"]:
        """What each latent of one cluster adds to each token's fused logit, in float64.

        Takes rows of all registered latents, as `n_latents` counts them; gives a column per
        term of the cluster, in its order. They sum to `fusion_sae * sae`.
        """
        cluster = self.clusters[cluster_index]
        weight = np.array([term.weight for term in cluster.latents], np.float64)
        scale = np.array([term.scale for term in cluster.latents], np.float64)
        acts: np.ndarray = latent_acts[:, self._columns[cluster_index]].astype(np.float64) / scale
        if cluster.transform == "clip":
            acts = np.minimum(acts, 1.0)
        elif cluster.transform == "step":
            acts = (acts > 0).astype(np.float64)
        acts *= cluster.fusion_sae * weight
        return acts

    def _build(self, device: torch.device) -> None:
        """Lays every cluster's terms side by side, so that a matrix product sums them all."""

        def numbers(values: Sequence[float] | np.ndarray) -> Tensor:
            return torch.from_numpy(np.array(values, np.float32)).to(device)

        def terms(transform: Transform) -> _Terms | None:
            clusters = [i for i, c in enumerate(self.clusters) if c.transform == transform]
            columns = np.concatenate([np.empty(0, np.int64), *(self._columns[i] for i in clusters)])
            if not len(columns):
                return None
            weight = np.zeros((len(columns), len(self.clusters)))
            pairs = [(i, term) for i in clusters for term in self.clusters[i].latents]
            for row, (i, term) in enumerate(pairs):
                weight[row, i] = term.weight / (1.0 if transform == "step" else term.scale)
            scale = numbers([term.scale for _, term in pairs])
            return _Terms(torch.from_numpy(columns).to(device), scale, numbers(weight))

        self.device = device
        plain = terms("identity")
        self._plain: Tensor | None = None
        if plain is not None:
            matrix = torch.zeros(self.n_latents, len(self.clusters), device=device)
            self._plain = matrix.index_add(0, plain.columns, plain.weight)
        self._clipped = terms("clip")
        self._stepped = terms("step")
        self._fusion_sae = numbers([c.fusion_sae for c in self.clusters])
        self._fusion_dense = numbers([c.fusion_dense for c in self.clusters])
        self._fusion_bias = numbers([c.fusion_bias for c in self.clusters])
        by_hook_point: dict[str, list[int]] = {}
        for i, cluster in enumerate(self.clusters):
            if cluster.dense_hook_point is not None:
                by_hook_point.setdefault(cluster.dense_hook_point, []).append(i)
        self._dense = [
            _dense_heads(hook_point, indices, self.clusters, device)
            for hook_point, indices in by_hook_point.items()
        ]


def _dense_heads(
    hook_point: str, indices: Sequence[int], clusters: Sequence[Cluster], device: torch.device
) -> _DenseHeads:
    weights = {c.id: c.dense_weight for c in clusters if c.dense_hook_point == hook_point}
    found = {cluster: len(w) for cluster, w in weights.items() if w is not None}
    if len(set(found.values())) > 1:
        raise HeadError(f"dense weights at {hook_point} have lengths {found}, expected one length")
    some = np.stack([np.asarray(w, np.float32) for w in weights.values()])
    weight = np.zeros((len(clusters), some.shape[1]), np.float32)
    weight[indices] = some
    bias = np.zeros(len(clusters), np.float32)
    bias[indices] = [clusters[i].dense_bias for i in indices]
    return _DenseHeads(
        hook_point, torch.from_numpy(weight).to(device), torch.from_numpy(bias).to(device)
    )


def side_by_side(
    latent_acts: Sequence[Float[Tensor, "n_tokens _"]], nothing: Float[Tensor, "n_tokens 0"]
) -> Float[Tensor, "n_tokens n_latents"]:
    """The columns of several SAEs as one tensor: the only one as it is, `nothing` for none."""
    if len(latent_acts) == 1:
        return latent_acts[0]
    return torch.cat([*latent_acts, nothing], dim=-1)


def heads_digest(heads: ClusterHeads) -> str:
    """What token logits depend on beside model and SAEs, as a calibration is bound to it.

    sha256 over latents with weights and scales, dense heads and fusion, cluster by cluster.
    Titles and labels are left out: no score depends on them.
    """
    digest = hashlib.sha256()
    for c in heads.clusters:
        said = {
            "id": c.id,
            "latents": [[t.sae, t.latent_id, t.weight, t.scale] for t in c.latents],
            "transform": c.transform,
            "dense": None if c.dense_weight is None else [c.dense_hook_point, c.dense_bias],
            "fusion": [c.fusion_sae, c.fusion_dense, c.fusion_bias],
        }
        digest.update(json.dumps(said, sort_keys=True).encode() + b"\n")
        if c.dense_weight is not None:
            digest.update(np.ascontiguousarray(c.dense_weight, "<f4").tobytes())
    return digest.hexdigest()
