"""The BatchTopK sparse autoencoder while it learns: parameters, loss, one optimiser step.

Source: Bussmann et al. 2024, arXiv:2412.06410 (BatchTopK); Gao et al. 2024, arXiv:2406.04093
(auxiliary loss on dead latents). It knows nothing of language models or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from sae_core.training.activations import TrainingError


@dataclass(frozen=True, slots=True, kw_only=True)
class SAETrainConfig:
    """Every setting of one SAE training run; a checkpoint is bound to it."""

    hook_point: str
    """Where the residual stream is read, for example blocks.8.hook_resid_post."""
    n_latents: int = 8192
    """d_sae."""
    k: int = 48
    """Mean number of active latents a token."""
    total_tokens: int = 3_000_000
    """Tokens to train on; the learning-rate schedule ends here."""
    batch_tokens: int = 2048
    """Tokens in one optimiser step."""
    learning_rate: float = 1e-3
    """Adam's peak learning rate."""
    warmup_share: float = 0.03
    """Share of the run in which the rate rises linearly from zero."""
    decay_share: float = 0.3
    """Share at the end in which it falls linearly to zero."""
    tempering: float = 0.5
    """How far dimensions of large variance are scaled down, 0 (not) to 1 (all alike)."""
    aux_k: int = 256
    """Dead latents that may explain each token's residual error."""
    aux_coefficient: float = 1 / 32
    """Weight of the auxiliary loss."""
    dead_after_tokens: int = 200_000
    """A latent that has not fired for so many tokens counts as dead."""
    context_tokens: int = 256
    """Length of a context, BOS included."""
    buffer_tokens: int = 131_072
    """Rows in the shuffle buffer."""
    forward_tokens: int = 4096
    """Most tokens in one forward of the language model."""
    n_workers: int = 1
    """Threads that run the language model while the SAE learns."""
    dtype: str = "bfloat16"
    """Dtype of the language model's forward and of the SAE's matrix products."""
    seed: int = 0
    """Seeds the weights and every shuffle."""
    checkpoint_seconds: float = 240.0
    """Wall time between checkpoints."""

    def __post_init__(self) -> None:
        for name in ("n_latents", "k", "total_tokens", "batch_tokens", "buffer_tokens", "aux_k"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.k >= self.n_latents:
            raise TrainingError(f"k is {self.k}, expected less than n_latents {self.n_latents}")
        if self.dtype not in ("float32", "bfloat16"):
            raise TrainingError(f"dtype is {self.dtype!r}, expected 'float32' or 'bfloat16'")

    def rate_at(self, n_tokens: int) -> float:
        """Learning rate after `n_tokens` tokens."""
        share = n_tokens / self.total_tokens
        rise = min(1.0, (share + 1e-3) / self.warmup_share) if self.warmup_share else 1.0
        fall = min(1.0, max(0.0, 1.0 - share) / self.decay_share) if self.decay_share else 1.0
        return self.learning_rate * min(rise, fall)


class StepStats(NamedTuple):
    """What one optimiser step saw."""

    fvu: float
    l0: float
    dead_share: float
    threshold: float


PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


class InputTransform(NamedTuple):
    """Raw activations to the space the SAE learns in: (x - mean) / scale, per dimension.

    A few dimensions of a residual stream can hold most of its variance (Gemma 3: one holds more
    than half) and would take most of the dictionary; `tempering` flattens them.
    """

    mean: Float[Tensor, " d_in"]
    scale: Float[Tensor, " d_in"]

    @classmethod
    def fit(cls, rows: Float[Tensor, "rows d_in"], tempering: float) -> InputTransform:
        """`tempering` 0 divides every dimension by one number, 1 each by its own deviation.

        Either way the mean squared norm comes out as d_in.
        """
        mean = rows.float().mean(0)
        variance = (rows.float() - mean).square().mean(0)
        if not bool(torch.isfinite(variance).all()) or float(variance.max()) <= 0:
            raise TrainingError("activations are not finite or do not vary, nothing to learn")
        floor = float(variance.mean()) * 1e-6
        scale = variance.clamp(min=floor).pow(tempering / 2)
        scale = scale * (variance / scale.square()).mean().sqrt()
        return cls(mean, scale)

    def __call__(self, rows: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
        return (rows.float() - self.mean) / self.scale


class BatchTopK:
    """Parameters and Adam state, in the space of its `InputTransform`."""

    def __init__(self, config: SAETrainConfig, transform: InputTransform) -> None:
        self.config = config
        self.transform = transform
        generator = torch.Generator().manual_seed(config.seed)
        d_in = len(transform.mean)
        W_dec = torch.randn(config.n_latents, d_in, generator=generator)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        self.W_dec = W_dec.requires_grad_()
        # d_sae d_in here, unlike in SAE: both matrices are then read by rows.
        self.W_enc = W_dec.detach().clone().requires_grad_()
        self.b_enc = torch.zeros(config.n_latents, requires_grad=True)
        self.b_dec = torch.zeros(d_in, requires_grad=True)
        self.optimiser = torch.optim.Adam(
            [getattr(self, name) for name in PARAMETERS], lr=0.0, fused=True
        )
        self.tokens_since_fired = torch.zeros(config.n_latents, dtype=torch.int64)
        self.threshold = 0.0
        self.n_tokens = 0
        self._compute = getattr(torch, config.dtype)

    @classmethod
    def from_state(cls, config: SAETrainConfig, tensors: dict[str, Tensor]) -> BatchTopK:
        """Take up what `state` gave."""
        trainer = cls(config, InputTransform(tensors["mean"], tensors["scale"]))
        trainer.load_state(tensors)
        return trainer

    def step(self, raw: Float[Tensor, "rows d_in"]) -> StepStats:
        """One Adam step on a batch of raw activations.

        Gradients are written out by hand over the active latents only (about k in d_sae), which
        on a CPU costs a tenth of the dense products that autograd would make.
        """
        config = self.config
        with torch.no_grad():
            x = self.transform(raw)
            n_rows = len(x)
            centred = x - self.b_dec
            pre_acts = centred.to(self._compute) @ self.W_enc.to(self._compute).T  # rows d_sae
            pre_acts += self.b_enc.to(self._compute)
            kept_from = batch_threshold(pre_acts, config.k, self.threshold)
            row_ids, latent_ids = (pre_acts >= max(kept_from, 1e-6)).nonzero(as_tuple=True)
            acts = pre_acts[row_ids, latent_ids].float()
            starts = torch.searchsorted(row_ids, torch.arange(n_rows))
        acts.requires_grad_()
        recons = functional.embedding_bag(
            latent_ids, self.W_dec, starts, mode="sum", per_sample_weights=acts
        )
        with torch.no_grad():
            error = x - recons - self.b_dec
            grad_recons = error * (-2.0 / n_rows)
            (grad_acts,) = torch.autograd.grad(recons, acts, grad_recons)
            by_latent = torch.argsort(latent_ids, stable=True)
            counts = torch.bincount(latent_ids, minlength=config.n_latents)
            bags = (row_ids[by_latent], counts.cumsum(0) - counts)
            self.W_dec.grad = _sum_rows(grad_recons, bags, acts.detach()[by_latent])
            self.W_enc.grad = _sum_rows(centred, bags, grad_acts[by_latent])
            self.b_enc.grad = torch.bincount(
                latent_ids, weights=grad_acts, minlength=config.n_latents
            ).float()
            self.b_dec.grad = grad_recons.sum(0) - self.b_enc.grad @ self.W_enc

        dead_ids = (self.tokens_since_fired >= config.dead_after_tokens).nonzero()[:, 0]
        if len(dead_ids):
            self._add_aux_gradients(centred, error, dead_ids)
        self._apply()

        self.tokens_since_fired = torch.where(counts > 0, 0, self.tokens_since_fired + n_rows)
        self.threshold = (
            kept_from if self.threshold == 0 else 0.95 * self.threshold + 0.05 * kept_from
        )
        self.n_tokens += n_rows
        variance = (x - x.mean(0)).square().sum(1).mean()
        return StepStats(
            fvu=float(error.square().sum(1).mean() / variance),
            l0=len(row_ids) / n_rows,
            dead_share=len(dead_ids) / config.n_latents,
            threshold=self.threshold,
        )

    def _add_aux_gradients(
        self,
        centred: Float[Tensor, "rows d_in"],
        error: Float[Tensor, "rows d_in"],
        dead_ids: Int[Tensor, " dead"],
    ) -> None:
        """Let the dead latents alone explain the error, and add that loss's gradients."""
        names = ("W_enc", "b_enc", "W_dec")
        leaves = [getattr(self, name).detach()[dead_ids].requires_grad_() for name in names]
        W_enc, b_enc, W_dec = leaves
        acts = torch.relu(
            centred.to(self._compute) @ W_enc.to(self._compute).T + b_enc.to(self._compute)
        )
        if len(dead_ids) > self.config.aux_k:
            floor = acts.detach().float().topk(self.config.aux_k, dim=1).values[:, -1:]
            acts = acts * (acts.detach() >= floor)
        explained = (acts @ W_dec.to(self._compute)).float()
        loss = self.config.aux_coefficient * (error - explained).square().sum(1).mean()
        for name, grad in zip(names, torch.autograd.grad(loss, leaves), strict=True):
            getattr(self, name).grad.index_add_(0, dead_ids, grad)

    def _apply(self) -> None:
        """Adam on gradients that keep every decoder row at norm one."""
        with torch.no_grad():
            assert self.W_dec.grad is not None
            along = (self.W_dec.grad * self.W_dec).sum(1, keepdim=True)
            self.W_dec.grad -= along * self.W_dec
            for group in self.optimiser.param_groups:
                group["lr"] = self.config.rate_at(self.n_tokens)
            self.optimiser.step()
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    def state(self) -> dict[str, Tensor]:
        """Parameters, Adam moments and counters as named tensors."""
        tensors = {name: getattr(self, name).detach() for name in PARAMETERS}
        for name in PARAMETERS:
            moments = self.optimiser.state.get(getattr(self, name), {})
            for key, value in moments.items():
                tensors[f"adam.{name}.{key}"] = torch.as_tensor(value)
        tensors["mean"], tensors["scale"] = self.transform
        tensors["tokens_since_fired"] = self.tokens_since_fired
        tensors["scalars"] = torch.tensor(
            [self.threshold, float(self.n_tokens)], dtype=torch.float64
        )
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        with torch.no_grad():
            for name in PARAMETERS:
                parameter = getattr(self, name)
                if tensors[name].shape != parameter.shape:
                    raise TrainingError(
                        f"checkpoint {name} is {tuple(tensors[name].shape)}, "
                        f"expected {tuple(parameter.shape)}"
                    )
                parameter.copy_(tensors[name])
                prefix = f"adam.{name}."
                self.optimiser.state[parameter] = {
                    key.removeprefix(prefix): value.clone()
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }
        self.tokens_since_fired = tensors["tokens_since_fired"].clone()
        threshold, n_tokens = tensors["scalars"].tolist()
        self.threshold, self.n_tokens = threshold, int(n_tokens)

    def raw_weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """W_enc, b_enc, W_dec, b_dec, threshold, with the input transform folded in.

        Latent acts keep the training space's unit, in which decoder rows have norm one, so that
        one threshold serves every latent.
        """
        with torch.no_grad():
            W_enc = (self.W_enc / self.transform.scale).T.contiguous()
            W_dec = self.W_dec * self.transform.scale
            b_dec = self.b_dec * self.transform.scale + self.transform.mean
            return W_enc, self.b_enc.clone(), W_dec, b_dec, self.threshold


def _sum_rows(
    rows: Float[Tensor, "rows d_in"],
    bags: tuple[Int[Tensor, " active"], Int[Tensor, " d_sae"]],
    weights: Float[Tensor, " active"],
) -> Float[Tensor, "d_sae d_in"]:
    """For each latent the weighted sum of the rows on which it is active."""
    return functional.embedding_bag(bags[0], rows, bags[1], mode="sum", per_sample_weights=weights)


def batch_threshold(acts: Float[Tensor, "rows d_sae"], k: int, guess: float) -> float:
    """The activation that the `rows * k` largest of a batch reach.

    `guess`, a threshold of earlier batches, spares sorting what is surely below.
    """
    n_kept = len(acts) * k
    flat = acts.flatten()
    candidates = flat[flat > 0.8 * guess]
    if candidates.numel() < n_kept:
        candidates = flat[flat > 0]
    if candidates.numel() < n_kept:
        return 0.0
    return float(candidates.float().topk(n_kept, sorted=False).values.min())
