"""Telling formats apart, and saying what was found when none fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sae_core.errors import SAEFormatError
from sae_core.formats import LISTED_FILES, load_sae
from sae_core.formats.saelens_writer import save_saelens
from sae_core.testing.planted import planted_sae


def test_unknown_folder_lists_what_was_found_and_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "cfg.json").write_text("{}")
    (tmp_path / "layers.1").mkdir()
    with pytest.raises(SAEFormatError) as caught:
        load_sae(tmp_path)
    assert "found cfg.json, layers.1/; known: " in str(caught.value)
    assert "; saelens (a folder with cfg.json and " in str(caught.value)


def test_a_long_listing_is_cut(tmp_path: Path) -> None:
    for n in range(LISTED_FILES + 3):
        (tmp_path / f"shard-{n:02}").touch()
    with pytest.raises(SAEFormatError, match="shard-11 and 3 more"):
        load_sae(tmp_path)


def test_empty_folder_single_file_and_nothing_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(SAEFormatError, match="found an empty folder"):
        load_sae(tmp_path)
    (tmp_path / "x.bin").touch()
    with pytest.raises(SAEFormatError, match=r"found the file x\.bin"):
        load_sae(tmp_path / "x.bin")
    with pytest.raises(SAEFormatError, match="nowhere: does not exist"):
        load_sae(tmp_path / "nowhere")


def test_a_release_of_many_names_its_subfolders(tmp_path: Path) -> None:
    for name in (".cache/layers.0", "layers.1", "layers.2", "width/l0"):
        save_saelens(planted_sae(8, 16, architecture="relu", seed=0), tmp_path / name)
    (tmp_path / "features").mkdir()
    said = "each hold an SAE: layers.1, layers.2, width/l0; .* the hint `subfolder`"
    with pytest.raises(SAEFormatError, match=said):
        load_sae(tmp_path)
    assert load_sae(tmp_path, subfolder="width/l0").config.d_sae == 16


def test_a_hint_the_format_does_not_know_is_refused(tmp_path: Path) -> None:
    save_saelens(planted_sae(8, 16, architecture="relu", seed=0), tmp_path)
    with pytest.raises(SAEFormatError, match="saelens has no hint 'k', accepted hints: norm"):
        load_sae(tmp_path, k=3)


@pytest.mark.parametrize(
    ("hint", "said"),
    [
        ({"norm_scaling_factor": "2"}, "hint norm_scaling_factor: found '2', expected a number"),
        ({"norm_scaling_factor": True}, "hint norm_scaling_factor: found True, expected a number"),
        ({"processing": "folded"}, "hint processing: found 'folded', expected none or default"),
    ],
)
def test_a_hint_of_another_type_is_refused(tmp_path: Path, hint: dict[str, Any], said: str) -> None:
    save_saelens(planted_sae(8, 16, architecture="relu", seed=0), tmp_path)
    with pytest.raises(SAEFormatError, match=said):
        load_sae(tmp_path, **hint)


@pytest.mark.parametrize("part", ["/etc", "../other", "a/../../b"])
@pytest.mark.parametrize("hint", ["subfolder", "weights_file"])
def test_a_place_outside_is_refused(tmp_path: Path, hint: str, part: str) -> None:
    save_saelens(planted_sae(8, 16, architecture="relu", seed=0), tmp_path / "sae")
    with pytest.raises(SAEFormatError, match=f"hint {hint}: found .*, expected a place inside it"):
        load_sae(tmp_path / "sae", **{hint: part})


def test_a_file_of_a_folder_asks_for_the_folder(tmp_path: Path) -> None:
    save_saelens(planted_sae(8, 16, architecture="relu", seed=0), tmp_path / "sae")
    with pytest.raises(SAEFormatError, match="found a part of a saelens folder, expected its fold"):
        load_sae(tmp_path / "sae" / "sae_weights.safetensors")
