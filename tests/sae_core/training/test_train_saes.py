from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_core.errors import TrainingError
from sae_core.formats import load_sae
from sae_core.hook_points import parse_hook_point
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.tokenizer import load_tokenizer
from sae_core.testing.models import tiny_model_folder
from sae_core.training.activations import LanguageModelForward
from sae_core.training.loss_recovered import LossRecovered
from sae_core.training.sae_train_config import SAETrainConfig
from sae_core.training.train_saes import (
    SAEOutcome,
    SAETrainInputs,
    activations_of,
    check_device,
    held_out_contexts,
    train_saes,
)

HOOK_POINTS = tuple(map(parse_hook_point, ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")))
TEXTS = [
    f"the model reads {n} prompts and never shares the password of {n % 7}" for n in range(300)
]
STORED = {"batchtopk": "jumprelu", "jumprelu": "jumprelu", "topk": "topk", "relu": "relu"}


def _inputs(root: Path, architecture: str, **changes: Any) -> SAETrainInputs:
    config = SAETrainConfig(
        architecture=architecture,
        d_sae=64,
        l0_target=6.0,
        total_tokens=4_096,
        batch_tokens=128,
        buffer_tokens=1024,
        context_tokens=24,
        learning_rate=5e-3,
        l1_coefficient=0.5,
    )
    given = {
        "config": config,
        "folders": {hook_point: root / str(hook_point) for hook_point in HOOK_POINTS},
        "model_folder": tiny_model_folder(root / "model", "gemma3"),
        "model_name": "tiny",
        "texts": TEXTS[20:],
        "held_out": TEXTS[:20],
        "checkpoint": root / "checkpoint",
    }
    return SAETrainInputs(**given | changes)


@pytest.fixture(scope="module", params=list(STORED))
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, SAETrainInputs, dict[str, SAEOutcome]]:
    inputs = _inputs(tmp_path_factory.mktemp("run"), request.param)
    return request.param, inputs, train_saes(inputs)


Trained = tuple[str, SAETrainInputs, dict[str, SAEOutcome]]


def test_folders_load_with_their_facts(trained: Trained) -> None:
    architecture, inputs, outcomes = trained
    assert list(outcomes) == [str(hook_point) for hook_point in HOOK_POINTS]
    for name, outcome in outcomes.items():
        sae = load_sae(outcome.folder)
        assert sae.config.architecture == STORED[architecture]
        assert sae.card.hook_point == name and sae.card.model_name == "tiny"
        facts = sae.card.facts
        assert facts["training"]["tokens_seen"] == 4_096
        assert facts["training_architecture"] == architecture
        assert len(facts["training"]["data_digest"]) == len(facts["model_digest"]) == 64
        assert sum(facts["held_out"]["firing_rate_histogram"].values()) == 64
        assert name in (outcome.folder / "CARD.md").read_text()
    assert not inputs.checkpoint.exists()


def test_reported_numbers_are_those_of_the_files(trained: Trained) -> None:
    _, inputs, outcomes = trained
    model = load_language_model(inputs.model_folder, HOOK_POINTS)
    contexts = held_out_contexts(TEXTS[:20], load_tokenizer(inputs.model_folder), 24, 100_000)
    acts = activations_of(contexts, LanguageModelForward(model, mixed_precision=False), 4096)
    for name, (folder, report, _, _) in outcomes.items():
        rows = acts[name][len(acts[name]) // 2 :]
        sae = load_sae(folder)
        found = sae.encode(rows)
        fvu = (rows - sae.decode(found)).square().sum() / (rows - rows.mean(0)).square().sum()
        assert float(fvu) == pytest.approx(report.fvu, rel=1e-3)
        assert float((found > 0).sum(1).float().mean()) == pytest.approx(report.l0, rel=1e-3)


def test_numbers_are_those_of_a_trained_sae(trained: Trained) -> None:
    architecture, _, outcomes = trained
    for _, report, loss, _ in outcomes.values():
        assert report.fvu < 0.6
        if architecture != "relu":
            assert report.l0 == pytest.approx(6, rel=0.35)
        assert isinstance(loss, LossRecovered)
        assert loss.zero_loss != loss.loss
        assert loss.n_tokens > 100


def test_run_in_bfloat16_is_stored_in_it(tmp_path: Path) -> None:
    outcomes = train_saes(_inputs(tmp_path, "batchtopk", store_dtype="bfloat16", loss_tokens=0))
    (first, _) = outcomes.values()
    cfg = json.loads((first.folder / "cfg.json").read_text())
    assert cfg["dtype"] == "bfloat16"
    assert first.loss_recovered == "not asked for"
    assert "not measured: not asked for" in (first.folder / "CARD.md").read_text()
    W_dec = load_sae(first.folder).weights.W_dec
    assert W_dec is not None and torch.equal(W_dec, W_dec.bfloat16().float())


def test_each_width_has_a_folder_and_its_own_numbers(tmp_path: Path) -> None:
    outcomes = train_saes(_inputs(tmp_path, "batchtopk", d_saes=(32, 64), loss_tokens=256))
    assert list(outcomes) == [f"{place}/{d_sae}" for place in HOOK_POINTS for d_sae in (32, 64)]
    for name, outcome in outcomes.items():
        hook_point, d_sae = name.split("/")
        assert outcome.folder == tmp_path / hook_point / d_sae
        sae = load_sae(outcome.folder)
        assert sae.config.d_sae == sae.card.facts["training"]["d_sae"] == int(d_sae)
        assert sae.card.hook_point == hook_point
        assert sum(outcome.report.rate_histogram) == int(d_sae)
        assert isinstance(outcome.loss_recovered, LossRecovered)
    losses = [outcome.loss_recovered for outcome in outcomes.values()]
    assert len({loss.spliced_loss for loss in losses if not isinstance(loss, str)}) == 4
    assert len({loss.zero_loss for loss in losses if not isinstance(loss, str)}) == 2


def test_unfit_place_says_why_no_loss_was_measured(tmp_path: Path) -> None:
    mid = parse_hook_point("blocks.1.hook_resid_mid")
    (outcome,) = train_saes(_inputs(tmp_path, "topk", folders={mid: tmp_path / "sae"})).values()
    assert isinstance(outcome.loss_recovered, str)
    assert "also passes beside it" in outcome.loss_recovered


def test_too_little_held_out_text_is_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="held-out texts: found 6 tokens, expected at least"):
        train_saes(_inputs(tmp_path, "topk", held_out=["the model reads"]))


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta"])
def test_missing_device_is_refused(device: str) -> None:
    with pytest.raises(TrainingError, match=f"device: found '{device}'"):
        check_device(device)
