"""Trains a BatchTopK SAE on a language model's residual stream, from texts to a SAELens folder.

The learned thresholded encoder is stored as a JumpReLU with one constant threshold, which is how
SAELens publishes BatchTopK. Checkpoints hold parameters, Adam moments and counters; a resumed run
skips the contexts already used and refills its shuffle buffer from the following ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_core.formats.saelens_writer import save_saelens
from sae_core.hook_points import parse_hook_point
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.tokenizer import load_tokenizer
from sae_core.sae import SAE
from sae_core.sae_config import SAECard, SAEConfig
from sae_core.sae_weights import SAEWeights
from sae_core.training.activations import (
    ActivationBuffer,
    ContextForward,
    TextEncoder,
    TrainingError,
    language_model_forward,
    token_contexts,
)
from sae_core.training.batch_topk import BatchTopK, InputTransform, SAETrainConfig
from sae_core.training.sae_report import SAEReport, measure_sae, threshold_for_l0


class TrainProgress(NamedTuple):
    """Where a run stands, for a progress line."""

    n_tokens: int
    total_tokens: int
    fvu: float
    """Of the last batch, in the training space."""
    l0: float
    dead_share: float
    tokens_per_second: float
    seconds_left: float


class TrainedSAE(NamedTuple):
    """An SAE in the raw units of the residual stream; the threshold is one number."""

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    threshold: float
    n_tokens: int
    n_contexts: int
    seconds: float
    data_digest: str
    dead_share: float
    """Share of latents that did not fire on the last `dead_after_tokens` tokens of training."""


def train_sae_on(
    config: SAETrainConfig,
    texts: Iterable[str],
    tokenizer: TextEncoder,
    forward: ContextForward,
    *,
    checkpoint: Path | None = None,
    progress: Callable[[TrainProgress], None] = lambda _: None,
) -> TrainedSAE:
    """Train on the texts in their order; stops at `total_tokens` or when the texts run out.

    With `checkpoint` (a folder) the run saves itself there and takes up where it left off; a
    checkpoint of another configuration is refused, save that `total_tokens` may change.
    """
    digest = hashlib.sha256()

    def hashed(source: Iterable[str]) -> Iterable[str]:
        for text in source:
            digest.update(len(text.encode()).to_bytes(8, "big") + text.encode())
            yield text

    generator = torch.Generator().manual_seed(config.seed)
    buffer = ActivationBuffer(
        token_contexts(hashed(texts), tokenizer, config.context_tokens),
        forward,
        capacity=config.buffer_tokens,
        forward_tokens=config.forward_tokens,
        generator=generator,
        n_workers=config.n_workers,
    )
    saved = _read_checkpoint(checkpoint, config) if checkpoint else None
    if saved is None:
        sample = buffer.peek()
        trainer = BatchTopK(config, InputTransform.fit(sample, config.tempering))
        seconds_before = 0.0
    else:
        tensors, facts = saved
        trainer = BatchTopK.from_state(config, tensors)
        buffer.skip_contexts(int(facts["n_contexts"]))
        seconds_before = float(facts["seconds"])
    started = last_saved = time.monotonic()
    tokens_before = trainer.n_tokens
    while trainer.n_tokens < config.total_tokens:
        rows = buffer.take(config.batch_tokens)
        if rows is None:
            break
        stats = trainer.step(rows)
        now = time.monotonic()
        rate = (trainer.n_tokens - tokens_before) / max(now - started, 1e-9)
        progress(
            TrainProgress(
                n_tokens=trainer.n_tokens,
                total_tokens=config.total_tokens,
                fvu=stats.fvu,
                l0=stats.l0,
                dead_share=stats.dead_share,
                tokens_per_second=rate,
                seconds_left=max(0.0, config.total_tokens - trainer.n_tokens) / max(rate, 1e-9),
            )
        )
        if checkpoint and now - last_saved > config.checkpoint_seconds:
            _write_checkpoint(checkpoint, config, trainer, buffer, seconds_before + now - started)
            last_saved = now
    buffer.close()
    seconds = seconds_before + time.monotonic() - started
    if trainer.n_tokens == 0:
        raise TrainingError(f"the texts gave fewer than {config.batch_tokens} tokens")
    if checkpoint:
        _write_checkpoint(checkpoint, config, trainer, buffer, seconds)
    W_enc, b_enc, W_dec, b_dec, threshold = trainer.raw_weights()
    return TrainedSAE(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        threshold=threshold,
        n_tokens=trainer.n_tokens,
        n_contexts=buffer.n_contexts,
        seconds=seconds,
        data_digest=digest.hexdigest(),
        dead_share=float((trainer.tokens_since_fired >= config.dead_after_tokens).double().mean()),
    )


def _identity(config: SAETrainConfig) -> dict[str, object]:
    facts = dataclasses.asdict(config)
    for name in ("total_tokens", "checkpoint_seconds", "forward_tokens", "n_workers"):
        del facts[name]
    return facts


def _write_checkpoint(
    folder: Path,
    config: SAETrainConfig,
    trainer: BatchTopK,
    buffer: ActivationBuffer,
    seconds: float,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in trainer.state().items()},
        folder / "state.safetensors.new",
        metadata={
            "config": json.dumps(_identity(config), sort_keys=True),
            "n_contexts": str(buffer.n_contexts),
            "seconds": str(seconds),
        },
    )
    (folder / "state.safetensors.new").replace(folder / "state.safetensors")


def _read_checkpoint(
    folder: Path, config: SAETrainConfig
) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    path = folder / "state.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        facts = dict(file.metadata())
    if json.loads(facts["config"]) != json.loads(json.dumps(_identity(config))):
        raise TrainingError(
            f"checkpoint {path} was made with {facts['config']}, "
            f"expected {json.dumps(_identity(config), sort_keys=True)}"
        )
    return load_file(path), facts


def train_sae(
    config: SAETrainConfig,
    texts: Iterable[str],
    held_out: Iterable[str],
    model_folder: Path,
    out: Path,
    *,
    model_name: str,
    checkpoint: Path | None = None,
    held_out_tokens: int = 60_000,
    progress: Callable[[TrainProgress], None] = lambda _: None,
) -> SAEReport:
    """Train an SAE on a model folder's residual stream and write it to `out` as SAELens has it.

    The threshold is set on one half of the held-out activations so that L0 is `config.k`; FVU,
    L0, dead share and firing rates are measured in float32 on the other half, with the weights
    as stored (bfloat16), and kept in cfg.json.
    """
    hook_point = parse_hook_point(config.hook_point)
    model = load_language_model(model_folder, [hook_point])
    tokenizer = load_tokenizer(model_folder)
    trained = train_sae_on(
        config,
        texts,
        tokenizer,
        language_model_forward(model, hook_point, mixed_precision=config.dtype == "bfloat16"),
        checkpoint=checkpoint,
        progress=progress,
    )
    exact = language_model_forward(model, hook_point, mixed_precision=False)
    resid = held_out_activations(held_out, tokenizer, exact, config.context_tokens, held_out_tokens)
    return write_trained(trained, config, resid, out, model_name=model_name)


def held_out_activations(
    texts: Iterable[str],
    tokenizer: TextEncoder,
    forward: ContextForward,
    context_tokens: int,
    n_tokens: int,
) -> Float[Tensor, "total d_in"]:
    """Activations of about `n_tokens` tokens of the texts, in their order."""
    parts: list[Tensor] = []
    found = 0
    for context in token_contexts(texts, tokenizer, context_tokens):
        parts.append(forward([context]))
        found += len(parts[-1])
        if found >= n_tokens:
            break
    if not parts:
        raise TrainingError("the held-out texts gave no context of at least four tokens")
    return torch.cat(parts)


def write_trained(
    trained: TrainedSAE,
    config: SAETrainConfig,
    resid: Float[Tensor, "total d_in"],
    out: Path,
    *,
    model_name: str,
) -> SAEReport:
    """Round, set the threshold, measure, and write the SAELens folder; returns what it measured."""
    d_in, d_sae = trained.W_enc.shape

    def sae_with(threshold: float, metadata: dict[str, object]) -> SAE:
        return SAE(
            SAEConfig(
                architecture="jumprelu",
                d_in=d_in,
                d_sae=d_sae,
                apply_b_dec_to_input=True,
            ),
            SAEWeights(
                W_enc=trained.W_enc.bfloat16().float(),
                b_enc=trained.b_enc,
                W_dec=trained.W_dec.bfloat16().float(),
                b_dec=trained.b_dec,
                threshold=torch.full((d_sae,), threshold),
            ),
            SAECard(hook_point=config.hook_point, model_name=model_name, facts=metadata),
        )

    half = len(resid) // 2
    threshold = threshold_for_l0(sae_with(trained.threshold, {}), resid[:half], float(config.k))
    report = measure_sae(sae_with(threshold, {}), resid[half:])
    metadata: dict[str, object] = {
        "training_architecture": "batchtopk",
        "prepend_bos": True,
        "exclude_special_tokens": True,
        "context_size": config.context_tokens,
        "training": {
            **dataclasses.asdict(config),
            "tokens_seen": trained.n_tokens,
            "contexts_seen": trained.n_contexts,
            "seconds": round(trained.seconds, 1),
            "data_digest": trained.data_digest,
            "dead_share": trained.dead_share,
        },
        "held_out": report.to_json(),
    }
    save_saelens(sae_with(threshold, metadata), out, dtype="bfloat16")
    return report
