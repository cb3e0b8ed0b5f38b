"""From a model folder and texts to SAELens folders: trains, measures, writes, with a card.

out/cfg.json, out/sae_weights.safetensors     the SAE, and in `metadata` how it was made
out/CARD.md                                   the same facts for a reader
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.errors import TrainingError
from sae_core.formats.saelens_writer import save_saelens
from sae_core.hook_points import HookPoint
from sae_core.language_model.checksums import digest_folder
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.tokenizer import load_tokenizer
from sae_core.sae import SAE
from sae_core.sae_config import SAECard, SAEConfig
from sae_core.sae_weights import SAEWeights
from sae_core.training.activations import (
    ActivationsForward,
    LanguageModelForward,
    TextEncoder,
    token_contexts,
)
from sae_core.training.loss_recovered import LossRecovered, measure_loss_recovered
from sae_core.training.sae_card import sae_card
from sae_core.training.sae_checkpoint import remove_checkpoint
from sae_core.training.sae_report import SAEReport, measure_sae, with_l0
from sae_core.training.sae_train_config import (
    SAETrainConfig,
    TrainedArchitecture,
    planned_saes,
)
from sae_core.training.sae_trainer import SAETrainer, TrainedRun, TrainProgress

LEAST_HELD_OUT = 256
"""Fewer held-out tokens than this measure nothing."""

StoreDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SAETrainInputs:
    """Where everything of one run comes from and goes to."""

    config: SAETrainConfig
    folders: Mapping[HookPoint, Path]
    """Where the SAE of each hook point is written; its widths, where several, in folders below."""
    model_folder: Path
    model_name: str
    texts: Iterable[str]
    """Read once, in their order."""
    held_out: Iterable[str]
    """Texts that are measured on."""
    checkpoint: Path
    """A folder; a run that is there is taken up, and removed once its SAEs are written."""
    d_saes: Sequence[int] = ()
    """Numbers of latents, each for an SAE at every hook point; none given: that of `config`."""
    buffer_folder: Path | None = None
    """Where activations wait; None keeps them in memory."""
    held_out_tokens: int = 32_768
    """About so many: thresholds on the first half, everything else on the second."""
    loss_tokens: int = 2048
    """Of them, those on which the whole model is run for the loss recovered; 0 leaves it out."""
    store_dtype: StoreDtype = "float32"
    """Of the two matrices on disk."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """More for the card, such as digests of the data files."""

    @property
    def plans(self) -> dict[str, tuple[HookPoint, SAETrainConfig, Path]]:
        """By the SAE's name: where it reads, its settings, and where it is written."""
        places = {str(hook_point): (hook_point, path) for hook_point, path in self.folders.items()}
        plans = planned_saes(self.config, tuple(places), self.d_saes)
        several = len(plans) > len(places)
        found = {}
        for name, (place, config) in plans.items():
            hook_point, folder = places[place]
            found[name] = hook_point, config, folder / str(config.d_sae) if several else folder
        return found


class SAEOutcome(NamedTuple):
    """One SAE as it was written."""

    folder: Path
    report: SAEReport
    loss_recovered: LossRecovered | str
    """What was measured, or why it was not."""
    metadata: Mapping[str, Any]
    """As in cfg.json."""


def train_saes(
    inputs: SAETrainInputs,
    *,
    progress: Callable[[TrainProgress], None] = lambda _: None,
    say: Callable[[str, float], None] = lambda what, share: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, SAEOutcome]:
    """Trains the SAEs of all hook points and writes them; by the SAE's name, what was measured.

    Args:
        progress: Called after every step and every forward pass of training.
        say: Called with what else is being done, and the share of it that is done.
        should_stop: Asked often while training; True saves a checkpoint and raises TrainingStopped.

    Raises:
        TrainingError: See `SAETrainer`; also where there is too little held-out text.
        SAECoreError: Whatever a model, tokenizer or hook point is refused for.
    """
    config, hook_points = inputs.config, tuple(inputs.folders)
    check_device(config.device)
    say("reading the model", 0.0)
    tokenizer = load_tokenizer(inputs.model_folder)
    contexts = held_out_contexts(
        inputs.held_out, tokenizer, config.context_tokens, inputs.held_out_tokens
    )
    model_digest = digest_folder(inputs.model_folder)
    mixed_precision = config.dtype == "bfloat16"
    model = load_language_model(
        inputs.model_folder,
        hook_points,
        device=config.device,
        products="torch" if mixed_precision else "auto",  # oneDNN's own layout is of float32 alone
    )
    trained = SAETrainer(
        config,
        inputs.texts,
        tokenizer,
        LanguageModelForward(model, mixed_precision=mixed_precision),
        d_saes=inputs.d_saes,
        checkpoint=inputs.checkpoint,
        facts={"model_digest": model_digest},
        buffer_folder=inputs.buffer_folder,
        progress=progress,
        should_stop=should_stop,
    ).train()

    say("measuring", 0.0)
    exact = LanguageModelForward(model, mixed_precision=False)
    acts = activations_of(contexts, exact, config.forward_tokens)
    saes, reports, plans = {}, {}, inputs.plans
    for index, (name, (hook_point, own, _)) in enumerate(plans.items()):
        rows = acts[str(hook_point)]
        sae, half = finished_sae(trained, name, own, inputs.store_dtype), len(rows) // 2
        if config.architecture == "batchtopk":
            sae = with_l0(sae, rows[:half], config.l0_target)
        saes[name], reports[name] = sae, measure_sae(sae, rows[half:])
        say("measuring", (index + 1) / len(plans))
    del model, exact, acts
    losses = _losses(inputs, saes, contexts, say)
    outcomes = {}
    for name, (hook_point, own, folder) in plans.items():
        metadata = _metadata(inputs, own, trained, name, reports[name], losses[name])
        metadata["model_digest"] = model_digest
        card = SAECard(hook_point=str(hook_point), model_name=inputs.model_name, facts=metadata)
        save_saelens(saes[name].replaced(card=card), folder, dtype=inputs.store_dtype)
        (folder / "CARD.md").write_text(sae_card(saes[name].config, card), encoding="utf-8")
        outcomes[name] = SAEOutcome(folder, reports[name], losses[name], metadata)
    remove_checkpoint(inputs.checkpoint)
    return outcomes


def check_device(device: str) -> None:
    """Raises TrainingError where the machine has no such device."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise TrainingError(f"device: found {device!r}, expected cpu, cuda or cuda:N") from None
    if found.type not in ("cpu", "cuda"):
        raise TrainingError(f"device: found {device!r}, expected cpu, cuda or cuda:N")
    n_devices = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= n_devices:
        raise TrainingError(f"device: found {device!r}, this machine has {n_devices} CUDA devices")


def held_out_contexts(
    texts: Iterable[str], tokenizer: TextEncoder, context_tokens: int, n_tokens: int
) -> list[list[int]]:
    """Contexts of about `n_tokens` tokens of the texts, in their order."""
    found: list[list[int]] = []
    n = 0
    for context in token_contexts(texts, tokenizer, context_tokens):
        found.append(context)
        n += len(context) - 1
        if n >= n_tokens:
            break
    if n < LEAST_HELD_OUT:
        raise TrainingError(
            f"held-out texts: found {n} tokens, expected at least {LEAST_HELD_OUT} (more data, or "
            "a larger held-out share)"
        )
    return found


def activations_of(
    contexts: Sequence[list[int]], forward: ActivationsForward, forward_tokens: int
) -> dict[str, Float[Tensor, "total _"]]:
    """Activations of all contexts, by hook point."""
    parts: dict[str, list[Tensor]] = {name: [] for name in forward.widths}
    batch: list[list[int]] = []
    for index, context in enumerate(contexts):
        batch.append(context)
        is_last = index + 1 == len(contexts)
        if is_last or sum(map(len, batch)) + len(contexts[index + 1]) > forward_tokens:
            for name, rows in forward(batch).items():
                parts[name].append(rows)
            batch = []
    return {name: torch.cat(rows) for name, rows in parts.items()}


def finished_sae(
    trained: TrainedRun, name: str, config: SAETrainConfig, store_dtype: StoreDtype
) -> SAE:
    """The SAE with the numbers that its file will have."""
    weights = trained.saes[name].weights
    assert weights.W_dec is not None
    stored = getattr(torch, store_dtype)
    weights = SAEWeights(
        **weights._asdict()
        | {"W_enc": weights.W_enc.to(stored).float(), "W_dec": weights.W_dec.to(stored).float()}
    )
    formula = SAEConfig(
        architecture=cast("TrainedArchitecture", config.architecture),
        d_in=weights.W_enc.shape[0],
        d_sae=config.d_sae,
        k=config.k if config.architecture == "topk" else None,
        apply_b_dec_to_input=True,
    )
    return SAE(formula, weights)


def _losses(
    inputs: SAETrainInputs,
    saes: Mapping[str, SAE],
    contexts: Sequence[list[int]],
    say: Callable[[str, float], None],
) -> dict[str, LossRecovered | str]:
    if not inputs.loss_tokens:
        return dict.fromkeys(saes, "not asked for")
    some: list[list[int]] = []
    for context in reversed(contexts):  # from the half that no threshold was set on
        if sum(map(len, some)) >= inputs.loss_tokens:
            break
        some.append(context)
    return measure_loss_recovered(
        inputs.model_folder,
        {name: (inputs.plans[name][0], sae) for name, sae in saes.items()},
        some,
        device=inputs.config.device,
        progress=lambda done, total: say("loss of the whole model", done / total),
    )


def _metadata(
    inputs: SAETrainInputs,
    config: SAETrainConfig,
    trained: TrainedRun,
    name: str,
    report: SAEReport,
    loss: LossRecovered | str,
) -> dict[str, Any]:
    return {
        "training_architecture": config.architecture,
        "prepend_bos": True,
        "exclude_special_tokens": True,
        "context_size": config.context_tokens,
        "training": {
            **dataclasses.asdict(config),
            "hook_points": [str(hook_point) for hook_point in inputs.folders],
            "tokens_seen": trained.n_tokens,
            "contexts_seen": trained.n_contexts,
            "seconds": round(trained.seconds, 1),
            "data_digest": trained.data_digest,
            "dead_share": trained.saes[name].dead_share,
        },
        "held_out": report.to_json(),
        "loss_recovered": loss if isinstance(loss, str) else loss.to_json(),
        "versions": _versions(),
        **inputs.facts,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("sae-monitor", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found
