"""The training loop: texts -> contexts -> activations -> SAEs, one or several at each hook point.

All SAEs of a run share one forward pass of the language model and see the same tokens. A run that
is stopped at any moment and taken up again ends with the bits of one that was not, on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sae_core.errors import TrainingError, TrainingStopped
from sae_core.sae_weights import SAEWeights
from sae_core.training.activation_buffer import ActivationBuffer
from sae_core.training.activations import ActivationsForward, TextEncoder, token_contexts
from sae_core.training.input_transform import InputTransform
from sae_core.training.pace import Pace
from sae_core.training.sae_checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from sae_core.training.sae_learner import SAELearner, StepStats
from sae_core.training.sae_train_config import SAETrainConfig, planned_saes

Rows = TypeVar("Rows")
TRANSFORM_TOKENS = 32_768
"""Tokens that the input transform is fitted on: a deviation known to half a percent."""


class TrainProgress(NamedTuple):
    """Where a run stands, for a progress line."""

    what: str
    """`training`, or `reading activations` while the buffer is filled."""
    n_tokens: int
    """Trained on."""
    total_tokens: int
    n_read: int
    """Of the filling that is under way, 0 while training."""
    n_to_read: int
    stats: Mapping[str, StepStats]
    """Of the last batch, by the SAE's name; empty before the first."""
    tokens_per_second: float
    """Read and trained on, since this start."""
    seconds_left: float | None
    """None while there is nothing to tell it from, as before the first batch."""


class TrainedSAE(NamedTuple):
    """One SAE in the raw units of its hook point."""

    weights: SAEWeights
    dead_share: float
    """Share of latents that did not fire on the last `dead_after_tokens` tokens of training."""


class TrainedRun(NamedTuple):
    """What a run gave."""

    saes: Mapping[str, TrainedSAE]
    """By name; see `planned_saes`."""
    n_tokens: int
    n_contexts: int
    seconds: float
    data_digest: str
    """sha256 over the tokens that were read; see `ActivationBuffer`."""


class SAETrainer:
    """One run; `train` runs it to its end.

    Args:
        config: Shared by all SAEs, but for the number of latents where `d_saes` gives several.
        texts: Read in their order; the run stops at `total_tokens` or when they run out.
        d_saes: Numbers of latents, for each of which there is an SAE at every hook point; none
            given means `config.d_sae`. The hook point seeds an SAE, not the others beside it.
        checkpoint: A folder in which the run saves itself; where one is there already, it is
            taken up. None keeps none.
        facts: More that a checkpoint is bound to, such as the model's digest.
        buffer_folder: Where activations wait; None keeps them in memory.
        progress: Called after every step and every forward pass.
        should_stop: Asked at the same moments; True saves a checkpoint and raises TrainingStopped.

    Raises:
        TrainingError: Too little text, or a checkpoint of another run or other texts.
    """

    def __init__(
        self,
        config: SAETrainConfig,
        texts: Iterable[str],
        tokenizer: TextEncoder,
        forward: ActivationsForward,
        *,
        d_saes: Sequence[int] = (),
        checkpoint: Path | None = None,
        facts: Mapping[str, Any] | None = None,
        buffer_folder: Path | None = None,
        progress: Callable[[TrainProgress], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config = config
        self.hook_points = tuple(forward.widths)
        self.plans = planned_saes(config, self.hook_points, d_saes)
        self._checkpoint = checkpoint
        self._identity = {
            **config.identity(),
            **(facts or {}),
            "hook_points": list(self.hook_points),
            "widths": list(forward.widths.values()),
        }
        if len(self.plans) > len(self.hook_points):
            self._identity["saes"] = list(self.plans)
        self._progress, self._should_stop = progress, should_stop
        n_steps = -(-config.total_tokens // config.batch_tokens)
        self._buffer = ActivationBuffer(
            token_contexts(texts, tokenizer, config.context_tokens),
            forward,
            capacity=config.buffer_tokens,
            forward_tokens=config.forward_tokens,
            total_tokens=n_steps * config.batch_tokens + config.context_tokens,
            seed=config.seed,
            folder=buffer_folder,
            on_forward=self._on_forward,
        )
        self._learners: dict[str, SAELearner] = {}
        self._stats: dict[str, StepStats] = {}
        self._seconds_before = 0.0
        self._pace = Pace()
        self._started = time.monotonic()

    @property
    def n_tokens(self) -> int:
        """Trained on so far."""
        return next((learner.n_tokens for learner in self._learners.values()), 0)

    def train(self) -> TrainedRun:
        """Runs to the end; with a checkpoint, from where it left off."""
        config = self.config
        self._started = last_saved = time.monotonic()
        try:
            self._take_up()
            while self.n_tokens < config.total_tokens:
                rows = self._paced(lambda: self._buffer.take(config.batch_tokens))
                if rows is None:
                    break
                began = time.monotonic()
                self._stats = {
                    name: learner.step(rows[self.plans[name].hook_point])
                    for name, learner in self._learners.items()
                }
                self._pace.trained(config.batch_tokens, time.monotonic() - began)
                self._say("training", 0, 0)
                if self._should_stop():
                    raise TrainingStopped
                now = time.monotonic()
                if self._checkpoint and now - last_saved > config.checkpoint_seconds:
                    self._save()
                    last_saved = time.monotonic()
        except TrainingStopped:
            raise TrainingStopped(self._stop()) from None
        if self.n_tokens == 0:
            raise TrainingError(
                f"data: found fewer than the {config.batch_tokens} tokens of one batch"
            )
        self._save()
        return TrainedRun(
            saes={
                name: TrainedSAE(learner.raw_weights(), learner.dead_share)
                for name, learner in self._learners.items()
            },
            n_tokens=self.n_tokens,
            n_contexts=self._buffer.n_contexts,
            seconds=self._seconds(),
            data_digest=self._buffer.data_digest,
        )

    def _take_up(self) -> None:
        config = self.config
        saved = read_checkpoint(self._checkpoint, self._identity) if self._checkpoint else None
        if saved is None:
            sample = self._paced(lambda: self._buffer.peek(TRANSFORM_TOKENS))
            transforms = {
                hook_point: InputTransform.fit(rows, config.tempering)
                for hook_point, rows in sample.items()
            }
            for name, (hook_point, own) in self.plans.items():
                seed = config.seed + self.hook_points.index(hook_point)
                self._learners[name] = SAELearner(own, transforms[hook_point], seed=seed)
            return
        self._buffer.load_state(saved.buffer, n_contexts=saved.n_contexts, n_taken=saved.n_tokens)
        if self._buffer.data_digest != saved.data_digest:
            raise TrainingError(
                f"checkpoint {self._checkpoint}: was made from other texts (sha256 "
                f"{saved.data_digest:.12}, found {self._buffer.data_digest:.12}), expected the "
                "same data"
            )
        for (name, plan), tensors in zip(self.plans.items(), saved.learners, strict=True):
            self._learners[name] = SAELearner.from_state(plan.config, dict(tensors))
        self._seconds_before = saved.seconds

    def _paced(self, give: Callable[[], Rows]) -> Rows:
        """What the buffer gives; the time and the tokens that it reads for that are counted."""
        began, n_before = time.monotonic(), self._buffer.n_to_compute
        rows = give()
        self._pace.read(n_before - self._buffer.n_to_compute, time.monotonic() - began)
        return rows

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _save(self) -> None:
        if self._checkpoint is None:
            return
        write_checkpoint(
            self._checkpoint,
            Checkpoint(
                identity=self._identity,
                n_tokens=self.n_tokens,
                n_contexts=self._buffer.n_contexts,
                seconds=self._seconds(),
                data_digest=self._buffer.data_digest,
                buffer=self._buffer.state(),
                learners=[learner.state() for learner in self._learners.values()],
            ),
        )

    def _stop(self) -> str:
        """Saves, and says what there is."""
        total = f"{self.n_tokens:,} of {self.config.total_tokens:,} tokens"
        if self._checkpoint is None or not self.n_tokens:
            return f"stopped after {total}; nothing was saved"
        self._save()
        return f"stopped after {total}; resume from {self._checkpoint}"

    def _on_forward(self, n_read: int, n_to_read: int) -> None:
        self._say("reading activations", n_read, n_to_read)
        if self._should_stop():
            raise TrainingStopped

    def _say(self, what: str, n_read: int, n_to_read: int) -> None:
        n_tokens, total = self.n_tokens, self.config.total_tokens
        n_left = max(0, total - n_tokens)
        n_to_come = max(0, self._buffer.n_to_compute - n_read)
        self._progress(
            TrainProgress(
                what=what,
                n_tokens=n_tokens,
                total_tokens=total,
                n_read=n_read,
                n_to_read=n_to_read,
                stats=self._stats,
                tokens_per_second=self._pace.tokens_per_second,
                seconds_left=self._pace.seconds_left(min(n_to_come, n_left), n_left),
            )
        )
