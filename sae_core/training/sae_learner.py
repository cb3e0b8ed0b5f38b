"""A sparse autoencoder while it learns: parameters, loss, one optimiser step.

    a = gate((x - b_dec) @ W_enc.T + b_enc)        x: a token in the space of the InputTransform
    loss = mean |x - b_dec - a @ W_dec|^2 + the gate's penalty + the auxiliary loss

Decoder rows have norm one: the gradient along a row is taken out, and the row rescaled after the
step. It knows nothing of language models or files.
Source of the auxiliary loss on dead latents: Gao et al. 2024, arXiv:2406.04093.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from sae_core.errors import TrainingError
from sae_core.sae_weights import SAEWeights
from sae_core.training.gates import JumpReLUGate, gate_of, indices_where
from sae_core.training.input_transform import InputTransform
from sae_core.training.latent_entries import LatentEntries
from sae_core.training.sae_train_config import SAETrainConfig

SPEEDS = {"threshold": 10.0}
"""Learning rates over the common one. Pre-activations change by many weights at once, thresholds by
one number: at the common rate L0 stays at half of its target (benchmarks/LOG.md, 2026-11-24)."""


class StepStats(NamedTuple):
    """What one optimiser step saw."""

    fvu: float
    """Of the batch, in the training space."""
    l0: float
    dead_share: float


class SAELearner:
    """Parameters and Adam state of one SAE."""

    def __init__(self, config: SAETrainConfig, transform: InputTransform, *, seed: int = 0) -> None:
        self.config = config
        device = torch.device(config.device)
        self.transform = InputTransform(*(part.to(device) for part in transform))
        generator = torch.Generator().manual_seed(seed)
        d_in = len(transform.mean)
        W_dec = torch.randn(config.d_sae, d_in, generator=generator)
        W_dec = (W_dec / W_dec.norm(dim=1, keepdim=True)).to(device)
        self.parameters = {
            # d_sae d_in here, unlike in SAE: both matrices are then read by rows.
            "W_enc": W_dec.clone(),
            "b_enc": torch.zeros(config.d_sae, device=device),
            "W_dec": W_dec,
            "b_dec": torch.zeros(d_in, device=device),
        }
        if config.architecture == "jumprelu":
            self.parameters["threshold"] = torch.zeros(config.d_sae, device=device)
        self.optimiser = torch.optim.Adam(
            [
                {"params": [parameter], "speed": SPEEDS.get(name, 1.0)}
                for name, parameter in self.parameters.items()
            ],
            lr=0.0,
            fused=True,
        )
        self.gate = gate_of(config, self.parameters.get("threshold"))
        if isinstance(self.gate, JumpReLUGate):
            self.gate.d_in = d_in
        self.tokens_since_fired = torch.zeros(config.d_sae, dtype=torch.int64, device=device)
        self.n_tokens = 0
        self._compute = getattr(torch, config.dtype)

    @property
    def dead_share(self) -> float:
        """Share of latents that did not fire on the last `dead_after_tokens` tokens."""
        dead = self.tokens_since_fired >= self.config.dead_after_tokens
        return float(dead.double().mean())

    @torch.no_grad()
    def step(self, raw: Float[Tensor, "rows d_in"]) -> StepStats:
        """One Adam step on a batch of raw activations.

        Gradients are written out over the pairs that are active (`LatentEntries`), which on a CPU
        costs a tenth of the dense products that autograd would make.
        """
        p, n_rows = self.parameters, len(raw)
        x = self.transform(raw.to(p["W_dec"].device))
        if self.n_tokens == 0:
            self._fit_encoder_size(x)
        centred = x - p["b_dec"]
        pre_acts = functional.linear(  # rows d_sae
            *(part.to(self._compute) for part in (centred, p["W_enc"], p["b_enc"]))
        )
        flat_ids = self.gate.entries(pre_acts)
        entries = LatentEntries(flat_ids, *pre_acts.shape)
        latent_ids = entries.latent_ids
        pre = pre_acts.flatten()[flat_ids].float()
        acts = self.gate.acts(pre, latent_ids)
        recons, decoded = entries.decode(acts, p["W_dec"])
        error = centred - recons
        grad_recons = error * (-2.0 / n_rows)
        grad_acts = entries.grad_acts(decoded, grad_recons)
        grad_pre = self.gate.grad_pre(pre, acts, grad_acts, latent_ids, n_rows)
        p["W_dec"].grad = entries.sum_rows(acts, grad_recons)
        p["W_enc"].grad = entries.sum_rows(grad_pre, centred)
        p["b_enc"].grad = entries.sum(grad_pre)
        p["b_dec"].grad = grad_recons.sum(0) - p["b_enc"].grad @ p["W_enc"]

        dead_ids = (self.tokens_since_fired >= self.config.dead_after_tokens).nonzero()[:, 0]
        if len(dead_ids) and self.config.aux_coefficient:
            self._add_aux_gradients(centred, error, pre_acts[:, dead_ids], dead_ids)
        self._apply()

        firings = torch.bincount(latent_ids[acts > 0], minlength=self.config.d_sae)
        self.tokens_since_fired = torch.where(firings > 0, 0, self.tokens_since_fired + n_rows)
        self.n_tokens += n_rows
        l0 = int(firings.sum()) / n_rows
        self.gate.after_step(l0)
        variance = (x - x.mean(0)).square().sum()
        return StepStats(
            fvu=float(error.square().sum() / variance),
            l0=l0,
            dead_share=len(dead_ids) / self.config.d_sae,
        )

    def _fit_encoder_size(self, x: Float[Tensor, "rows d_in"]) -> None:
        """Scale the encoder so that the first reconstruction is as long as it should be.

        Random directions that are chosen for being large overshoot together: at size one the first
        FVU is 1.5 and the first steps only undo that.
        """
        W_enc, W_dec, number = self.parameters["W_enc"], self.parameters["W_dec"], self.gate.number
        pre_acts = x @ W_enc.T
        flat_ids = self.gate.entries(pre_acts)
        entries = LatentEntries(flat_ids, *pre_acts.shape)
        acts = self.gate.acts(pre_acts.flatten()[flat_ids], entries.latent_ids)
        recons, _ = entries.decode(acts, W_dec)
        size = float((recons * x).sum() / recons.square().sum().clamp(min=1e-12))
        W_enc *= min(max(size, 0.01), 1.0)
        self.gate.number = number

    def _add_aux_gradients(
        self,
        centred: Float[Tensor, "rows d_in"],
        error: Float[Tensor, "rows d_in"],
        pre_acts: Float[Tensor, "rows dead"],
        dead_ids: Int64[Tensor, " dead"],
    ) -> None:
        """Let the dead latents alone explain the error, and add that loss's gradients."""
        n_rows, n_dead = pre_acts.shape
        if n_dead > self.config.aux_k:
            found = pre_acts.topk(self.config.aux_k, dim=1, sorted=False)
            starts = torch.arange(n_rows, device=pre_acts.device)[:, None] * n_dead
            flat_ids = (found.indices + starts)[found.values > 0].sort().values
        else:
            flat_ids = indices_where(pre_acts.flatten() > 0)
        entries = LatentEntries(flat_ids, n_rows, n_dead)
        acts = pre_acts.flatten()[flat_ids].float()
        explained, decoded = entries.decode(acts, self.parameters["W_dec"][dead_ids])
        grad_explained = (explained - error) * (2 * self.config.aux_coefficient / n_rows)
        grad_acts = entries.grad_acts(decoded, grad_explained)
        for name, grad in (
            ("W_dec", entries.sum_rows(acts, grad_explained)),
            ("W_enc", entries.sum_rows(grad_acts, centred)),
            ("b_enc", entries.sum(grad_acts)),
        ):
            whole = self.parameters[name].grad
            assert whole is not None
            whole.index_add_(0, dead_ids, grad)

    def _apply(self) -> None:
        """Adam on gradients of bounded length that keep every decoder row at norm one."""
        W_dec = self.parameters["W_dec"]
        grad = W_dec.grad
        assert grad is not None
        grad -= (grad * W_dec).sum(1, keepdim=True) * W_dec
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        if norm > self.config.max_grad_norm:
            torch._foreach_mul_(grads, self.config.max_grad_norm / norm)
        for group in self.optimiser.param_groups:
            group["lr"] = group["speed"] * self.config.rate_at(self.n_tokens)
        self.optimiser.step()
        W_dec /= W_dec.norm(dim=1, keepdim=True)

    def state(self) -> dict[str, Tensor]:
        """Parameters, Adam moments and counters as named tensors."""
        tensors = dict(self.parameters)
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                tensors[f"adam.{name}.{key}"] = torch.as_tensor(value)
        tensors["mean"], tensors["scale"] = self.transform
        tensors["tokens_since_fired"] = self.tokens_since_fired
        tensors["numbers"] = torch.tensor(
            [self.gate.number, float(self.n_tokens)], dtype=torch.float64
        )
        return tensors

    @classmethod
    def from_state(cls, config: SAETrainConfig, tensors: dict[str, Tensor]) -> SAELearner:
        """Take up what `state` gave; TrainingError where it is of another shape."""
        learner = cls(config, InputTransform(tensors["mean"], tensors["scale"]))
        for name, parameter in learner.parameters.items():
            if name not in tensors or tensors[name].shape != parameter.shape:
                found = list(tensors[name].shape) if name in tensors else "none"
                raise TrainingError(
                    f"checkpoint: {name}: found {found}, expected {list(parameter.shape)}"
                )
            parameter.copy_(tensors[name])
            prefix = f"adam.{name}."
            learner.optimiser.state[parameter] = {
                # Fused Adam keeps its count of steps beside the parameter.
                key.removeprefix(prefix): value.to(parameter.device, copy=True)
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
        learner.tokens_since_fired.copy_(tensors["tokens_since_fired"])
        number, n_tokens = tensors["numbers"].tolist()
        learner.gate.number, learner.n_tokens = number, int(n_tokens)
        return learner

    @torch.no_grad()
    def raw_weights(self) -> SAEWeights:
        """The weights with the input transform folded in, on the CPU.

        Latent acts keep the training space's unit, in which decoder rows have norm one, so that
        one threshold can serve every latent (BatchTopK: the running one, repeated).
        """
        p, (mean, scale) = self.parameters, self.transform
        threshold = p.get("threshold")
        if self.config.architecture == "batchtopk":
            threshold = torch.full_like(p["b_enc"], self.gate.number)
        return SAEWeights(
            W_enc=(p["W_enc"] / scale).T.contiguous().cpu(),
            b_enc=p["b_enc"].clone().cpu(),
            W_dec=(p["W_dec"] * scale).cpu(),
            b_dec=(p["b_dec"] * scale + mean).cpu(),
            threshold=None if threshold is None else threshold.clone().cpu(),
        )
