"""Torch files: which one is meant, and that none of them is ever run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_core.errors import SAEFormatError
from sae_core.formats import FORMATS, load_sae

TENSORS = {
    "goodfire": ("encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight"),
    "openai": ("pre_bias", "latent_bias", "encoder.weight", "decoder.weight"),
    "qwen_scope": ("W_enc", "W_dec", "b_enc", "b_dec"),
}


class Malicious:
    """Unpickled by an unguarded reader it creates a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


@pytest.mark.parametrize("container", ["zip", "legacy", "bare pickle"])
@pytest.mark.parametrize("format", [None, *TENSORS])
@pytest.mark.parametrize("as_folder", [True, False])
def test_malicious_file_is_refused_and_does_not_run(
    tmp_path: Path, as_folder: bool, format: str | None, container: str
) -> None:
    proof = tmp_path / "it-ran"
    file = tmp_path / "sae" / "layer3.sae.pt"
    file.parent.mkdir()
    content = {name: torch.zeros(2, 2) for name in TENSORS[format or "openai"]}
    content["more"] = Malicious(proof)  # type: ignore[assignment]
    if container == "bare pickle":
        file.write_bytes(pickle.dumps(Malicious(proof), protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(SAEFormatError, match="cannot be read as tensors and plain values only"):
        load_sae(file.parent if as_folder else file, format=format)
    assert not proof.exists()
    if container != "bare pickle":
        torch.load(file, weights_only=False)
        assert proof.exists()  # or the test would prove nothing


def test_malicious_llamascopium_file_is_refused_and_does_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "it-ran"
    folder = tmp_path / "sae"
    folder.mkdir()
    (folder / "config.json").write_text('{"sae_type": "sae", "act_fn": "relu"}')
    torch.save({"sae": {}, "version": Malicious(proof)}, folder / "sae_weights.pt")
    with pytest.raises(SAEFormatError, match=r"sae_weights\.pt: cannot be read as tensors and"):
        load_sae(folder)
    assert not proof.exists()


def formats_that_recognise(path: Path) -> list[str]:
    return [known.name for known in FORMATS if known.recognises(path)]


@pytest.mark.parametrize("format", TENSORS)
def test_each_is_told_by_its_keys_and_by_nothing_else(tmp_path: Path, format: str) -> None:
    file = tmp_path / "layer3.sae.pt"
    torch.save({name: torch.zeros(0) for name in TENSORS[format]}, file)
    assert formats_that_recognise(file) == formats_that_recognise(tmp_path) == [format]
    (tmp_path / "cfg.json").write_text("{}")  # another format's folder with a stray torch file
    assert formats_that_recognise(tmp_path) == []


def test_folder_of_several_lists_them_and_names_the_hint(tmp_path: Path) -> None:
    for name in ("layer0.sae.pt", "layer1.sae.pt", "notes.txt"):
        torch.save({}, tmp_path / name)
    for format in (None, *TENSORS):
        with pytest.raises(SAEFormatError) as caught:
            load_sae(tmp_path, format=format)
        assert (
            "found layer0.sae.pt, layer1.sae.pt, expected one, or the hint `weights_file`"
            in str(caught.value)
        )


def test_folder_without_one_says_so(tmp_path: Path) -> None:
    with pytest.raises(SAEFormatError, match="torch files: found none, expected one"):
        load_sae(tmp_path, format="openai")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "8.pt: found list, expected a mapping"),
        ({1: torch.zeros(2)}, "8.pt: found the key 1, expected names"),
        ({"weights": "none"}, "not a known SAE format: found the file 8.pt"),
    ],
)
def test_plain_values_of_another_kind_are_no_format(
    tmp_path: Path, content: object, said: str
) -> None:
    torch.save(content, tmp_path / "8.pt")
    with pytest.raises(SAEFormatError, match=said):
        load_sae(tmp_path / "8.pt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("is_zip", [True, False])
def test_damaged_torch_file_is_an_error_wherever_it_is_damaged(
    tmp_path: Path, is_zip: bool
) -> None:
    file = tmp_path / "8.pt"
    content = {name: torch.ones(2) for name in TENSORS["openai"]} | {"activation": "TopK"}
    torch.save(content, file, _use_new_zipfile_serialization=is_zip)
    data = file.read_bytes()
    for place in range(0, min(len(data), 900), 3):
        for damaged in (data[:place], data[:place] + b"\xaa" + data[place + 1 :]):
            file.write_bytes(damaged)
            with pytest.raises(SAEFormatError):
                load_sae(file)
