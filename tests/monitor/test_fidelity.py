"""The gate on the real model and the default bundle: right as it is, and each mistake caught."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from monitor.bundle import load_bundle
from monitor.cli.common import bundle_folder
from monitor.fidelity import SAEFidelity, check_fidelity
from monitor.sae_store import find_saes
from monitor.served import Served, load_served
from sae_core.sae import SAE

HOOK_POINT = "blocks.8.hook_resid_post"


def served(folder: Path, model: Path, cache: Path) -> Served:
    bundle = load_bundle(folder)
    return load_served(bundle, model, "unknown", find_saes(bundle, cache=cache))


def judged(found: Served, sae: SAE | None = None) -> SAEFidelity:
    """Of the middle SAE, or of another in its place."""
    if sae is not None:
        found = replace(found, saes={"l9": (found.saes["l9"][0], sae)})
    return next(one for one in check_fidelity(found) if one.sae == "l9")


@pytest.fixture(scope="module")
def right(gemma_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return served(bundle_folder("default"), gemma_folder, tmp_path_factory.mktemp("cache"))


def test_default_bundle_fits(right: Served) -> None:
    for one in check_fidelity(right):
        assert one.fits, one.message
        assert one.measured.fvu == pytest.approx(one.bands.fvu, rel=1e-3)
        assert one.measured.l0 == pytest.approx(one.bands.l0, rel=1e-3)
        assert one.causes == ()


def test_off_by_one_layer_is_caught_and_the_right_one_named(
    gemma_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bundle_folder("default"), tmp_path / "moved"))
    (folder / "MANIFEST.json").unlink()
    spec = yaml.safe_load((folder / "bundle.yaml").read_text())
    spec["saes"]["l9"]["hook_point"] = "blocks.7.hook_resid_post"
    (folder / "bundle.yaml").write_text(yaml.safe_dump(spec))
    one = judged(served(folder, gemma_folder, tmp_path))
    assert not one.fits
    assert one.causes[0].what == f"wrong layer: it fits {HOOK_POINT}"
    assert [cause.what for cause in one.causes if cause.explains] == [one.causes[0].what]
    assert f"(1) wrong layer: it fits {HOOK_POINT}" in one.message
    assert "\n" not in one.message


def test_missing_b_dec_and_wrong_threshold_are_caught_and_named(right: Served) -> None:
    sae = right.saes["l9"][1].replaced()
    without = sae.replaced(config=replace(sae.config, apply_b_dec_to_input=False))
    message = judged(right, without).message
    assert "b_dec: it fits inputs with b_dec taken off" in message
    assert "wrong model or revision: its weights have digest unknown" in message
    assert sae.weights.threshold is not None
    low = SAE(sae.config, sae.weights._replace(threshold=sae.weights.threshold / 3), sae.card)
    assert "unscaled threshold: it fits thresholds times 2.9" in judged(right, low).message
