"""Writes into bundle.yaml what its SAEs elsewhere are now: the commit, and the sha256 of each file.

Comments and layout stay as they are: only the places that change are cut out of the text and
replaced, and the result is read back and compared before it is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from monitor.bundle import load_unsealed
from monitor.bundle_spec import SAERef, parse_spec
from monitor.errors import BundleError, SAEStoreError
from monitor.hash_cache import HashCache
from monitor.hub import HubAccess
from monitor.model_store import Progress
from monitor.sae_store import HASHES, hash_file, locate, verify
from monitor.yaml_edit import SPEC, Edit, says, scalar, set_key, unshared, value_of, with_edits


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """What is written for one SAE."""

    commit: str | None
    """None for a path."""
    files: Mapping[str, str]
    """Name -> sha256."""


def pin_saes(
    folder: Path,
    *,
    cache: Path,
    hub: HubAccess | None = None,
    progress: Progress = lambda what, share: None,
) -> None:
    """Pins every SAE of the bundle that is not in its folder; writes nothing where one fails.

    A revision that is no commit becomes the commit that it means now, and the files are listed
    anew. Where commit and files are there already, the files are compared with them instead.

    Raises:
        BundleError: the folder is not a valid bundle, or its YAML cannot be edited in place.
        SAEStoreError: an SAE is nowhere to be found, or is not what was pinned before.
    """
    bundle = load_unsealed(folder)
    hashes = HashCache(cache / HASHES)
    pins = {}
    for sae_id, ref in bundle.spec.saes.items():
        if ref.is_inside(folder):
            continue
        try:
            pins[sae_id] = _pin(ref, folder, hashes, hub or HubAccess(), progress)
        except SAEStoreError as error:
            raise SAEStoreError(f"saes.{sae_id}: {error}") from error
    text = (folder / SPEC).read_bytes().decode("utf-8")
    edited = with_pins(text, pins)
    if edited != text:
        part = folder / (SPEC + ".part")
        part.write_bytes(edited.encode("utf-8"))
        part.replace(folder / SPEC)


def with_pins(text: str, pins: Mapping[str, Pin]) -> str:
    """The text of bundle.yaml with the pins in it, otherwise the same.

    Raises:
        BundleError: the edited text would not say what it should, as where two SAEs share an
            anchor.
    """
    expected = unshared(yaml.safe_load(text))
    saes = value_of(yaml.compose(text, Loader=yaml.SafeLoader), "saes")
    edits: list[Edit] = []
    for sae_id, pin in pins.items():
        entry = value_of(saes, sae_id)
        if pin.commit is not None:
            place = "hub" if "hub" in expected["saes"][sae_id] else "saelens"
            after = "repo" if place == "hub" else "id"
            edits.append(
                set_key(text, value_of(entry, place), "revision", [scalar(pin.commit)], after)
            )
            expected["saes"][sae_id][place]["revision"] = pin.commit
        files = [f"{scalar(name)}: {scalar(digest)}" for name, digest in pin.files.items()]
        edits.append(set_key(text, entry, "files", files, "hook_point", is_mapping=True))
        expected["saes"][sae_id]["files"] = dict(pin.files)
    edited = with_edits(text, edits)
    if not says(edited, expected):
        raise BundleError(
            f"{SPEC}: saes: cannot be edited in place (expected each SAE written out, without "
            f"anchors and multi-line text); by hand: {_by_hand(pins)}"
        )
    parse_spec(edited, SPEC)
    return edited


def _pin(ref: SAERef, folder: Path, hashes: HashCache, hub: HubAccess, progress: Progress) -> Pin:
    found = locate(ref, folder, hub=hub, progress=progress)
    if ref.is_fixed and ref.files:
        verify(ref, found, hashes, progress=progress)
        return Pin(commit=found.commit, files=ref.files)
    return Pin(
        commit=found.commit,
        files={
            name: hash_file(file, hashes, progress=progress) for name, file in found.files.items()
        },
    )


def _by_hand(pins: Mapping[str, Pin]) -> str:
    return "; ".join(
        f"saes.{sae_id}: "
        + ("" if pin.commit is None else f"revision: {pin.commit}, ")
        + f"files: {json.dumps(dict(pin.files))}"
        for sae_id, pin in pins.items()
    )
