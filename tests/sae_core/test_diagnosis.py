"""Deliberate mistakes on tiny models: each is caught, and its cause found by trying."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_core.diagnosis import Cause, diagnose
from sae_core.fidelity import Bands, measure
from sae_core.hook_points import parse_hook_point
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import LanguageModel
from sae_core.language_model.tokenizer import load_tokenizer
from sae_core.probe_reader import ProbeReader
from sae_core.sae import SAE
from sae_core.testing.models import tiny_model_folder
from sae_core.testing.principal import principal_sae

PLACE = "blocks.1.hook_resid_post"
TEXTS = (
    "the quick brown fox jumps over the lazy dog and then it rests in the sun",
    "please tell me how to bake bread with flour and water and a little salt",
    "the model reads the prompt and writes the answer one token at a time",
    "what is the weather like today in the north and what about the south",
    "never share a password or a secret with anyone who asks for a password",
)


def reader(folder: Path, texts: tuple[str, ...] = TEXTS) -> ProbeReader:
    def load(points: object) -> LanguageModel:
        return load_language_model(folder, points)  # type: ignore[arg-type]

    return ProbeReader(load([parse_hook_point(PLACE)]), load, load_tokenizer(folder), texts)


@pytest.fixture(scope="module", params=["gemma3", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp(request.param), request.param)


@cache
def stream(folder: Path, place: str = PLACE, with_bos: bool = True) -> torch.Tensor:
    return reader(folder).read([place], with_bos)[place]


def bands_of(sae: SAE, folder: Path) -> Bands:
    bands = Bands.around(measure(sae, stream(folder), range(10)))
    assert bands.fvu is not None and 0 < bands.fvu < 0.5
    assert not bands.problems(measure(sae, stream(folder), range(10)))
    return bands


def caught(
    sae: SAE, bands: Bands, folder: Path, place: str = PLACE, with_bos: bool = True
) -> tuple[Cause, ...]:
    """Causes of a mistake that must not pass the gate."""
    x = stream(folder, place, with_bos)
    assert bands.problems(measure(sae, x, range(10)))
    return diagnose(sae, place, bands, reader(folder), with_bos=with_bos)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("blocks.0.hook_resid_post", f"wrong layer: it fits {PLACE}"),
        ("blocks.2.hook_resid_post", f"wrong layer: it fits {PLACE}"),
        ("blocks.1.hook_resid_pre", f"wrong site: it fits {PLACE}"),
        ("blocks.1.hook_resid_mid", f"wrong site: it fits {PLACE}"),
        ("blocks.1.hook_mlp_out", f"wrong site: it fits {PLACE}"),
        ("blocks.2.hook_attn_out", f"wrong layer and site: it fits {PLACE}"),
    ],
)
def test_wrong_place_is_caught_and_the_right_one_named(folder: Path, place: str, said: str) -> None:
    sae = principal_sae(stream(folder))
    causes = caught(sae, bands_of(sae, folder), folder, place)
    assert causes[0].what == said
    assert causes[0].explains
    assert causes[0].distance == pytest.approx(0, abs=1e-4)


def as_relu(sae: SAE) -> SAE:
    relu = replace(sae.config, architecture="relu", k=None)
    return SAE(relu, sae.weights._replace(threshold=None))


def with_k(k: int) -> Callable[[SAE], SAE]:
    return lambda sae: sae.replaced(config=replace(sae.config, k=k))


def as_abstopk(sae: SAE) -> SAE:
    return sae.replaced(config=replace(sae.config, architecture="abstopk"))


def without_b_dec(sae: SAE) -> SAE:
    return sae.replaced(config=replace(sae.config, apply_b_dec_to_input=False))


def thresholds_times(factor: float) -> Callable[[SAE], SAE]:
    def change(sae: SAE) -> SAE:
        assert sae.weights.threshold is not None
        weights = sae.weights._replace(threshold=sae.weights.threshold * factor)
        return SAE(sae.config, weights)

    return change


def unscaled(sae: SAE) -> SAE:
    return sae.replaced(config=replace(sae.config, input_scale=1.0, output_scale=1.0))


@pytest.mark.parametrize(
    ("made", "change", "said"),
    [
        ({"k": 10}, as_relu, "wrong gate: it fits TopK with k 10"),
        ({"k": 10}, with_k(5), "wrong k: it fits TopK with k 10"),
        ({"k": 10}, with_k(20), "wrong k: it fits TopK with k 10"),
        ({"k": 6}, as_abstopk, "wrong gate: it fits TopK with k 6"),
        ({}, without_b_dec, "b_dec: it fits inputs with b_dec taken off"),
        ({}, thresholds_times(5.0), "unscaled threshold: it fits thresholds times 0."),
        ({}, thresholds_times(0.1), "unscaled threshold: it fits thresholds times 9.99"),
    ],
)
def test_formula_read_wrongly_is_caught_and_named(
    folder: Path, made: dict[str, int], change: Callable[[SAE], SAE], said: str
) -> None:
    sae = principal_sae(stream(folder), **made)  # type: ignore[arg-type]
    causes = caught(change(sae), bands_of(sae, folder), folder)
    explaining = [cause.what for cause in causes if cause.explains]
    assert any(what.startswith(said) for what in explaining), explaining


def test_missing_input_scale_is_caught_and_named(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path, "gpt2")
    x = stream(folder)
    scale = x.shape[1] ** 0.5 / float(x.norm(dim=-1).mean())
    assert not 0.7 < scale < 1.4
    sae = principal_sae(x, input_scale=scale)
    causes = caught(unscaled(sae), bands_of(sae, folder), folder)
    assert causes[0].explains
    assert causes[0].what.startswith("missing normalisation: it fits inputs times")


def test_other_bos_habit_is_caught_and_named(folder: Path) -> None:
    sae = principal_sae(stream(folder))
    bands = bands_of(sae, folder)
    causes = caught(sae, bands, folder, with_bos=False)
    assert causes[0].explains
    assert causes[0].what == "BOS handled differently: it fits texts read with BOS"
    assert causes[0].tried == "BOS handled differently: texts read with BOS"


def test_weights_of_a_finetuned_model_are_caught_and_nothing_explains_them(
    folder: Path, tmp_path: Path
) -> None:
    """Chat weights for base weights: every matrix moved by a tenth of its spread."""
    sae = principal_sae(stream(folder))
    bands = bands_of(sae, folder)
    tuned = Path(shutil.copytree(folder, tmp_path / "tuned"))
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(tuned / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[name] = tensor + 0.1 * tensor.float().std() * noise.to(tensor.dtype)
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    other = reader(tuned)
    x = other.read([PLACE], True)[PLACE]
    assert bands.problems(measure(sae, x, range(10)))
    causes = diagnose(sae, PLACE, bands, other)
    assert causes
    assert not any(cause.explains for cause in causes)


def test_transcoder_at_the_wrong_layer_is_named(folder: Path) -> None:
    source, target = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
    x, y = stream(folder, source), stream(folder, target)
    plain = principal_sae(x)
    W_skip = torch.linalg.lstsq(x, y - plain.decode(plain.encode(x))).solution
    sae = SAE(
        replace(plain.config, predicts_another_place=True, apply_b_dec_to_input=False),
        plain.weights._replace(W_skip=W_skip),
    )
    bands = Bands.around(measure(sae, x, range(10), target=y))
    wrong, out = "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"
    measured = measure(sae, stream(folder, wrong), range(10), target=stream(folder, out))
    assert bands.problems(measured)
    causes = diagnose(sae, wrong, bands, reader(folder), out=out)
    assert causes[0].explains
    assert causes[0].what == f"wrong layer: it fits {source}"
    assert causes[0].measured.fvu == pytest.approx(bands.fvu, rel=1e-4)


def test_sae_that_only_encodes_is_diagnosed_without_a_decoder(folder: Path) -> None:
    plain = principal_sae(stream(folder))
    sae = SAE(plain.config, plain.weights._replace(W_dec=None))  # type: ignore[arg-type]
    bands = Bands.around(measure(sae, stream(folder), range(10)))
    assert bands.fvu is None
    place = "blocks.0.hook_resid_post"
    assert bands.problems(measure(sae, stream(folder, place), range(10)))
    causes = diagnose(sae, place, bands, reader(folder))
    assert causes[0].what == f"wrong layer: it fits {PLACE}"


def test_change_that_changes_nothing_is_no_cause(folder: Path) -> None:
    sae = principal_sae(stream(folder))
    bands = replace(bands_of(sae, folder), l0_max=0.0, l0_min=0.0)
    causes = diagnose(sae, PLACE, bands, reader(folder))
    assert not any(cause.what.startswith("decoder norms") for cause in causes)  # all are 1
