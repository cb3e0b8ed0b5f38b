from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_core.errors import TrainingError, TrainingStopped
from sae_core.training.activation_buffer import ActivationBuffer
from sae_core.training.activations import token_contexts
from sae_core.training.pace import Pace
from sae_core.training.sae_checkpoint import has_checkpoint
from sae_core.training.sae_train_config import SAETrainConfig, planned_saes
from sae_core.training.sae_trainer import SAETrainer, TrainedRun, TrainProgress

HOOK_POINT = "blocks.0.hook_resid_post"


def _weights(run: TrainedRun) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, one in run.saes.items()
        for key, tensor in one.weights._asdict().items()
        if tensor is not None
    }


def _same(a: TrainedRun, b: TrainedRun) -> bool:
    ours, theirs = _weights(a), _weights(b)
    return all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


@pytest.mark.parametrize(
    ("architecture", "least"),
    [("batchtopk", 0.9), ("topk", 0.9), ("jumprelu", 0.85), ("relu", 0.85)],
)
def test_planted_directions_are_recovered(
    architecture: str,
    least: float,
    planted_config: SAETrainConfig,
    planted_texts: list[str],
    tokenizer: Any,
    planted_forward: Any,
) -> None:
    config = dataclasses.replace(planted_config, architecture=architecture)
    run = SAETrainer(config, planted_texts * 2, tokenizer, planted_forward).train()
    assert run.n_tokens >= config.total_tokens
    W_dec = run.saes[HOOK_POINT].weights.W_dec
    assert W_dec is not None
    decoder = W_dec / W_dec.norm(dim=1, keepdim=True)
    best = (planted_forward.directions[HOOK_POINT] @ decoder.T).max(dim=1).values
    assert float(best.mean()) > least  # random directions give 0.6


@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "jumprelu", "relu"])
@pytest.mark.parametrize("moment", [2_048, 3_072])
def test_stopped_run_goes_on_with_the_same_bits(
    architecture: str,
    moment: int,
    short_config: SAETrainConfig,
    planted_texts: list[str],
    tokenizer: Any,
    forward_of_two: Any,
    tmp_path: Path,
) -> None:
    config = dataclasses.replace(short_config, architecture=architecture)
    whole = SAETrainer(config, planted_texts, tokenizer, forward_of_two).train()
    seen: list[TrainProgress] = []
    stopped = SAETrainer(
        config,
        planted_texts,
        tokenizer,
        forward_of_two,
        checkpoint=tmp_path / "checkpoint",
        progress=seen.append,
        should_stop=lambda: seen[-1].n_tokens >= moment,
    )
    with pytest.raises(TrainingStopped, match=f"stopped after {moment:,} of 6,144 tokens; resume"):
        stopped.train()
    again = SAETrainer(
        config, planted_texts, tokenizer, forward_of_two, checkpoint=tmp_path / "checkpoint"
    ).train()
    assert _same(whole, again)
    assert whole.data_digest == again.data_digest
    assert (whole.n_tokens, whole.n_contexts) == (again.n_tokens, again.n_contexts)


def test_run_stopped_while_reading_goes_on_with_the_same_bits(
    short_config: SAETrainConfig,
    planted_texts: list[str],
    tokenizer: Any,
    planted_forward: Any,
    tmp_path: Path,
) -> None:
    whole = SAETrainer(short_config, planted_texts, tokenizer, planted_forward).train()
    seen: list[TrainProgress] = []
    with pytest.raises(TrainingStopped, match="resume from"):
        SAETrainer(
            short_config,
            planted_texts,
            tokenizer,
            planted_forward,
            checkpoint=tmp_path / "checkpoint",
            progress=seen.append,
            should_stop=lambda: seen[-1].n_tokens > 0 and seen[-1].n_read > 300,
        ).train()
    again = SAETrainer(
        short_config, planted_texts, tokenizer, planted_forward, checkpoint=tmp_path / "checkpoint"
    ).train()
    assert _same(whole, again)


def test_run_stopped_before_its_first_step_leaves_nothing(
    short_config: SAETrainConfig,
    planted_texts: list[str],
    tokenizer: Any,
    planted_forward: Any,
    tmp_path: Path,
) -> None:
    with pytest.raises(TrainingStopped, match="after 0 of 6,144 tokens; nothing was saved"):
        SAETrainer(
            short_config,
            planted_texts,
            tokenizer,
            planted_forward,
            checkpoint=tmp_path / "checkpoint",
            should_stop=lambda: True,
        ).train()
    assert not has_checkpoint(tmp_path / "checkpoint")


def test_widths_of_one_run_have_the_bits_of_runs_of_their_own(
    short_config: SAETrainConfig,
    planted_texts: list[str],
    tokenizer: Any,
    forward_of_two: Any,
    tmp_path: Path,
) -> None:
    d_saes = (16, 40)
    seen: list[TrainProgress] = []
    given = (short_config, planted_texts, tokenizer, forward_of_two)
    with pytest.raises(TrainingStopped, match="resume from"):
        SAETrainer(
            *given,
            d_saes=d_saes,
            checkpoint=tmp_path / "checkpoint",
            progress=seen.append,
            should_stop=lambda: seen[-1].n_tokens >= 2_048,
        ).train()
    together = SAETrainer(*given, d_saes=d_saes, checkpoint=tmp_path / "checkpoint").train()
    hook_points = list(forward_of_two.widths)
    assert list(together.saes) == [f"{place}/{n}" for place in hook_points for n in d_saes]
    assert list(seen[-1].stats) == list(together.saes)
    for d_sae in d_saes:
        config = dataclasses.replace(short_config, d_sae=d_sae)
        alone = SAETrainer(config, *given[1:]).train()
        for place in hook_points:
            ours, theirs = together.saes[f"{place}/{d_sae}"].weights, alone.saes[place].weights
            assert ours.W_enc.shape[1] == d_sae
            assert torch.equal(ours.W_enc, theirs.W_enc)
            assert torch.equal(ours.b_dec, theirs.b_dec)
    with pytest.raises(TrainingError, match="was made with saes "):
        SAETrainer(*given, d_saes=(16, 41), checkpoint=tmp_path / "checkpoint").train()


def test_width_that_the_rest_does_not_allow_is_refused(short_config: SAETrainConfig) -> None:
    with pytest.raises(TrainingError, match="l0_target: found 2.0, expected above 0 and below"):
        planned_saes(short_config, [HOOK_POINT], (16, 2))


def test_estimate_counts_what_is_read_and_what_is_trained_on() -> None:
    pace = Pace()
    assert pace.tokens_per_second == 0
    pace.read(1000, 10.0)
    assert pace.seconds_left(2000, 3000) is None
    pace.trained(100, 3.0)
    assert pace.seconds_left(2000, 2900) == pytest.approx(20.0 + 87.0)
    assert pace.tokens_per_second == pytest.approx(1 / (0.01 + 0.03))
    assert pace.seconds_left(0, 0) == 0


def test_resumed_run_has_no_estimate_before_it_has_read() -> None:
    pace = Pace()
    pace.trained(100, 3.0)
    assert pace.seconds_left(50, 100) is None
    assert pace.seconds_left(0, 100) == pytest.approx(3.0)


def test_buffer_on_disk_gives_the_bits_of_one_in_memory(
    short_config: SAETrainConfig,
    planted_texts: list[str],
    tokenizer: Any,
    planted_forward: Any,
    tmp_path: Path,
) -> None:
    in_memory = SAETrainer(short_config, planted_texts, tokenizer, planted_forward).train()
    on_disk = SAETrainer(
        short_config, planted_texts, tokenizer, planted_forward, buffer_folder=tmp_path / "rows"
    ).train()
    assert _same(in_memory, on_disk)
    (file,) = (tmp_path / "rows").iterdir()
    assert file.stat().st_size == 4 * 16 * short_config.buffer_tokens


def test_checkpoint_of_another_run_is_refused(
    short_config: SAETrainConfig,
    planted_texts: list[str],
    tokenizer: Any,
    planted_forward: Any,
    tmp_path: Path,
) -> None:
    place = tmp_path / "checkpoint"
    SAETrainer(short_config, planted_texts, tokenizer, planted_forward, checkpoint=place).train()
    other = dataclasses.replace(short_config, l0_target=3.0)
    for config, texts, message in (
        (other, planted_texts, r"was made with l0_target 2.0, expected 3.0$"),
        (short_config, [*planted_texts[1:], "z" * 500], "was made from other texts"),
        (short_config, planted_texts[:2], r"data: found fewer than the \d+ contexts"),
    ):
        with pytest.raises(TrainingError, match=message):
            SAETrainer(config, texts, tokenizer, planted_forward, checkpoint=place).train()


def test_damaged_checkpoint_is_refused(
    short_config: SAETrainConfig,
    planted_texts: list[str],
    tokenizer: Any,
    planted_forward: Any,
    tmp_path: Path,
) -> None:
    place = tmp_path / "checkpoint"
    SAETrainer(short_config, planted_texts, tokenizer, planted_forward, checkpoint=place).train()
    (place / "learner-0.safetensors").write_bytes(b"torn")
    with pytest.raises(TrainingError, match="is damaged"):
        SAETrainer(
            short_config, planted_texts, tokenizer, planted_forward, checkpoint=place
        ).train()


def test_too_little_text_is_said(
    short_config: SAETrainConfig, tokenizer: Any, planted_forward: Any
) -> None:
    with pytest.raises(TrainingError, match="fewer than the 256 tokens of one batch"):
        SAETrainer(short_config, ["hello world"], tokenizer, planted_forward).train()
    with pytest.raises(TrainingError, match="found no text of at least four tokens"):
        SAETrainer(short_config, ["a"], tokenizer, planted_forward).train()


def test_progress_tells_tokens_numbers_and_time(
    short_config: SAETrainConfig, planted_texts: list[str], tokenizer: Any, forward_of_two: Any
) -> None:
    seen: list[TrainProgress] = []
    SAETrainer(short_config, planted_texts, tokenizer, forward_of_two, progress=seen.append).train()
    steps = [p for p in seen if p.what == "training"]
    assert [p.n_tokens for p in steps] == list(range(256, 6_145, 256))
    assert seen[0].what == "reading activations" and seen[0].seconds_left is None
    assert steps[-1].seconds_left == 0
    assert set(steps[-1].stats) == set(forward_of_two.widths)
    assert steps[-1].stats[HOOK_POINT].l0 == pytest.approx(2, rel=0.01)


def test_contexts_begin_with_bos_and_cover_the_text(tokenizer: Any) -> None:
    contexts = list(token_contexts(["a" * 25, "bcd"], tokenizer, 11))
    assert [len(context) for context in contexts] == [11, 11, 6]
    assert all(context[0] == 0 for context in contexts)


class _Numbers:
    """The token itself is its activation."""

    widths = {HOOK_POINT: 1}

    def __call__(self, contexts: Any) -> dict[str, torch.Tensor]:
        return {HOOK_POINT: torch.tensor([[float(i)] for c in contexts for i in c[1:]])}


def _contexts() -> Iterator[list[int]]:
    return iter([[0, *range(10 * n, 10 * n + 10)] for n in range(1, 21)])


def _buffer(total_tokens: int) -> ActivationBuffer:
    return ActivationBuffer(
        _contexts(),
        _Numbers(),
        capacity=60,
        forward_tokens=25,
        total_tokens=total_tokens,
        seed=0,
    )


def test_buffer_hands_every_row_out_once_in_another_order() -> None:
    buffer = _buffer(1_000)
    seen: list[float] = []
    while (rows := buffer.take(20)) is not None:
        seen += rows[HOOK_POINT][:, 0].tolist()
    assert sorted(seen) == [float(i) for i in range(10, 210)]
    assert seen != sorted(seen)


def test_buffer_computes_no_more_than_is_wanted() -> None:
    buffer = _buffer(80)
    while buffer.take(20) is not None:
        pass
    assert buffer.n_contexts == 8
