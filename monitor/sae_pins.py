"""Writes into bundle.yaml what its SAEs elsewhere are now: the commit, and the sha256 of each file.

Comments and layout stay as they are: only the places that change are cut out of the text and
replaced, and the result is read back and compared before it is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from monitor.bundle import load_unsealed
from monitor.bundle_spec import SAERef, parse_spec
from monitor.errors import BundleError, SAEStoreError
from monitor.hash_cache import HashCache
from monitor.hub import HubAccess
from monitor.model_store import Progress
from monitor.sae_store import HASHES, hash_file, locate, verify

SPEC = "bundle.yaml"
_PLAIN = re.compile(r"[A-Za-z0-9_./-]+")
_LIKE_A_NUMBER = re.compile(r"[0-9]+([eE][0-9]+)?")


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
    expected = _unshared(yaml.safe_load(text))
    saes = _value(yaml.compose(text, Loader=yaml.SafeLoader), "saes")
    edits: list[tuple[int, int, str]] = []
    for sae_id, pin in pins.items():
        entry = _value(saes, sae_id)
        if pin.commit is not None:
            place = "hub" if "hub" in expected["saes"][sae_id] else "saelens"
            after = "repo" if place == "hub" else "id"
            edits.append(_set(text, _value(entry, place), "revision", [_scalar(pin.commit)], after))
            expected["saes"][sae_id][place]["revision"] = pin.commit
        files = [f"{_scalar(name)}: {_scalar(digest)}" for name, digest in pin.files.items()]
        edits.append(_set(text, entry, "files", files, "hook_point", is_mapping=True))
        expected["saes"][sae_id]["files"] = dict(pin.files)
    edited = text
    for start, end, replacement in sorted(edits, reverse=True):
        edited = edited[:start] + replacement + edited[end:]
    if not _says(edited, expected):
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


def _set(
    text: str,
    mapping: yaml.Node,
    key: str,
    items: list[str],
    after: str,
    *,
    is_mapping: bool = False,
) -> tuple[int, int, str]:
    """The edit (start, end, replacement) that gives `key` of `mapping` the written `items`.

    A key that is not there comes after the key `after`, on a line of its own in block style.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    old = _find(mapping, key)
    if old is not None:
        column = old.start_mark.column
        written = _written(items, mapping, newline, column + 1) if is_mapping else items[0]
        return old.start_mark.index, _end(old), written
    neighbour = _value(mapping, after)
    if _is_flow(mapping):
        written = _written(items, mapping, newline, 0) if is_mapping else items[0]
        return _end(neighbour), _end(neighbour), f", {key}: {written}"
    column = mapping.start_mark.column
    written = items[0]
    if is_mapping:
        written = _written(items, mapping, newline, column + len(key) + len(": {"))
    line_end = text.find(newline, _end(neighbour))
    line_end = len(text) if line_end < 0 else line_end
    return line_end, line_end, f"{newline}{' ' * column}{key}: {written}"


def _written(items: list[str], parent: yaml.Node, newline: str, column: int) -> str:
    separator = ", " if _is_flow(parent) else f",{newline}{' ' * column}"
    return "{" + separator.join(items) + "}"


def _is_flow(node: yaml.Node) -> bool:
    return bool(getattr(node, "flow_style", False))


def _end(node: yaml.Node) -> int:
    """Where the node's text ends; a block mapping's own mark lies behind what follows it."""
    if isinstance(node, yaml.MappingNode) and node.value and not _is_flow(node):
        return _end(node.value[-1][1])
    return int(node.end_mark.index)


def _find(node: yaml.Node | None, key: str) -> yaml.Node | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    return next((value for name, value in node.value if name.value == key), None)


def _value(node: yaml.Node | None, key: str) -> yaml.Node:
    found = _find(node, key)
    if found is None:
        raise BundleError(f"{SPEC}: found no {key} written out, expected it where the SAE is named")
    return found


def _scalar(text: str) -> str:
    if _PLAIN.fullmatch(text) and not _LIKE_A_NUMBER.fullmatch(text):
        return text
    return json.dumps(text)


def _says(text: str, expected: object) -> bool:
    try:
        return bool(_unshared(yaml.safe_load(text)) == expected)
    except yaml.YAMLError:
        return False


def _unshared(value: Any) -> Any:
    """A copy in which nothing that YAML wrote once and named twice is one object."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _by_hand(pins: Mapping[str, Pin]) -> str:
    return "; ".join(
        f"saes.{sae_id}: "
        + ("" if pin.commit is None else f"revision: {pin.commit}, ")
        + f"files: {json.dumps(dict(pin.files))}"
        for sae_id, pin in pins.items()
    )
