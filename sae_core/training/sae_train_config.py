"""Every setting of an SAE training run, and what follows from the settings alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, NamedTuple, get_args

from sae_core.errors import TrainingError

TrainedArchitecture = Literal["batchtopk", "topk", "jumprelu", "relu"]
"""Gates that can be trained: Bussmann et al. 2024, arXiv:2412.06410 (BatchTopK); Gao et al. 2024,
arXiv:2406.04093 (TopK); Rajamanoharan et al. 2024, arXiv:2407.14435 (JumpReLU); Bricken et al. 2023
(ReLU with an L1 penalty)."""
COUNTED = ("batchtopk", "topk")
"""Architectures that keep a fixed number of latents, k."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SAETrainConfig:
    """How SAEs are trained; a checkpoint is bound to all of it that changes numbers.

    Lengths and losses are in the training space, where a token's mean squared norm is its width.
    """

    architecture: str = "batchtopk"
    """One of `TrainedArchitecture`."""
    d_sae: int = 8192
    """Number of latents."""
    l0_target: float = 48.0
    """Mean number of active latents a token: k for BatchTopK and TopK, the goal of the others."""
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
    max_grad_norm: float = 100.0
    """Longer gradients, all parameters together, are scaled down to this length."""
    tempering: float = 0.5
    """How far dimensions of large variance are scaled down, 0 (not) to 1 (all alike)."""
    aux_k: int = 256
    """Dead latents that may explain each token's residual error."""
    aux_coefficient: float = 1 / 32
    """Weight of the auxiliary loss."""
    dead_after_tokens: int = 200_000
    """A latent that has not fired for so many tokens counts as dead."""
    l0_coefficient: float = 1.0
    """JumpReLU: weight of (L0 / l0_target - 1)^2, in units of the activations' whole variance."""
    bandwidth: float = 0.5
    """JumpReLU: width of the window around a threshold in which it gets a gradient."""
    l1_coefficient: float = 1.0
    """ReLU: weight of the L1 penalty at the start; it then follows `l0_target`."""
    context_tokens: int = 256
    """Length of a context, BOS included."""
    buffer_tokens: int = 131_072
    """Tokens in the shuffle buffer."""
    forward_tokens: int = 4096
    """Most tokens in one forward pass of the language model."""
    dtype: str = "float32"
    """float32 or bfloat16: of matrix products, the language model's and the SAE's; weights and
    streams are float32. Without hardware for bfloat16 a CPU is seven times slower with it."""
    device: str = "cpu"
    """Where model and SAEs live: cpu, cuda, or cuda:N."""
    seed: int = 0
    """Seeds the weights and every shuffle."""
    checkpoint_seconds: float = 600.0
    """Wall time between checkpoints."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("architecture", get_args(TrainedArchitecture)),
            ("dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in choices:
                raise _refusal(name, getattr(self, name), f"one of {', '.join(choices)}")
        for name in ("d_sae", "total_tokens", "batch_tokens", "aux_k", "forward_tokens"):
            if getattr(self, name) < 1:
                raise _refusal(name, getattr(self, name), "at least 1")
        if self.context_tokens < 8:
            raise _refusal("context_tokens", self.context_tokens, "at least 8")
        if self.buffer_tokens < 2 * self.batch_tokens:
            expected = f"at least twice batch_tokens, which is {self.batch_tokens}"
            raise _refusal("buffer_tokens", self.buffer_tokens, expected)
        if not 0 < self.l0_target < self.d_sae:
            expected = f"above 0 and below d_sae, which is {self.d_sae}"
            raise _refusal("l0_target", self.l0_target, expected)
        if self.architecture in COUNTED and self.l0_target != int(self.l0_target):
            expected = f"a whole number k for {self.architecture}"
            raise _refusal("l0_target", self.l0_target, expected)
        for name in ("warmup_share", "decay_share", "tempering"):
            if not 0 <= getattr(self, name) <= 1:
                raise _refusal(name, getattr(self, name), "0 to 1")
        for name in ("learning_rate", "max_grad_norm", "bandwidth", "l1_coefficient"):
            if not getattr(self, name) > 0:
                raise _refusal(name, getattr(self, name), "a positive number")
        for name in ("aux_coefficient", "l0_coefficient", "seed", "dead_after_tokens"):
            if getattr(self, name) < 0:
                raise _refusal(name, getattr(self, name), "at least 0")

    @classmethod
    def of(cls, values: Mapping[str, object]) -> SAETrainConfig:
        """The settings that a file or flags give; TrainingError for a value of another type."""
        given: dict[str, Any] = dict(values)
        for field in dataclasses.fields(cls):
            if field.name not in given:
                continue
            value = given[field.name]
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if field.type == "int" and not is_whole:
                raise _refusal(field.name, value, "a whole number")
            if field.type == "float":
                if not (is_whole or (isinstance(value, float) and isfinite(value))):
                    raise _refusal(field.name, value, "a number")
                given[field.name] = float(given[field.name])
            if field.type == "str" and not isinstance(value, str):
                raise _refusal(field.name, value, "a name")
        return cls(**given)

    @property
    def k(self) -> int:
        """Latents a token may have on average, for the architectures that count them."""
        return int(self.l0_target)

    def rate_at(self, n_tokens: int) -> float:
        """Learning rate after `n_tokens` tokens."""
        share = n_tokens / self.total_tokens
        rise = min(1.0, (share + 1e-3) / self.warmup_share) if self.warmup_share else 1.0
        fall = min(1.0, max(0.0, 1.0 - share) / self.decay_share) if self.decay_share else 1.0
        return self.learning_rate * min(rise, fall)

    def identity(self) -> dict[str, Any]:
        """The settings that two runs must share to be one run."""
        facts = dataclasses.asdict(self)
        del facts["checkpoint_seconds"]
        return facts


class PlannedSAE(NamedTuple):
    """One SAE of a run: where it reads, and its settings."""

    hook_point: str
    config: SAETrainConfig


def planned_saes(
    config: SAETrainConfig, hook_points: Sequence[str], d_saes: Sequence[int] = ()
) -> dict[str, PlannedSAE]:
    """The SAEs of a run by name: the hook point's, and `/d_sae` after it where widths are several.

    Raises:
        TrainingError: A width that the other settings do not allow.
    """
    configs = [dataclasses.replace(config, d_sae=d_sae) for d_sae in d_saes] or [config]
    return {
        f"{hook_point}/{one.d_sae}" if len(configs) > 1 else hook_point: PlannedSAE(hook_point, one)
        for hook_point in hook_points
        for one in configs
    }


def _refusal(name: str, found: object, expected: str) -> TrainingError:
    return TrainingError(f"{name}: found {found!r}, expected {expected}")
