"""Changes of bundle.yaml in place: comments and layout stay, only what changes is cut out.

Each change is an `Edit` of the text; `says` reads the result back, so that nothing is written which
means something else than was meant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, TypeAlias

import yaml

from monitor.errors import BundleError

SPEC = "bundle.yaml"
Edit: TypeAlias = tuple[int, int, str]
"""Start and end in the text, and what comes in their place."""
_PLAIN = re.compile(r"[A-Za-z0-9_./-]+")
_LIKE_A_NUMBER = re.compile(r"[0-9]+([eE][0-9]+)?")


def with_edits(text: str, edits: Iterable[Edit]) -> str:
    """The text with every edit made; they may not overlap."""
    for start, end, replacement in sorted(edits, reverse=True):
        text = text[:start] + replacement + text[end:]
    return text


def set_key(
    text: str,
    mapping: yaml.Node,
    key: str,
    items: list[str],
    after: str,
    *,
    is_mapping: bool = False,
) -> Edit:
    """The edit (start, end, replacement) that gives `key` of `mapping` the written `items`.

    A key that is not there comes after the key `after`, on a line of its own in block style.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    old = find(mapping, key)
    if old is not None:
        column = old.start_mark.column
        written = _written(items, mapping, newline, column + 1) if is_mapping else items[0]
        return old.start_mark.index, _end(old), written
    neighbour = value_of(mapping, after)
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


def find(node: yaml.Node | None, key: str) -> yaml.Node | None:
    """What stands at `key` of a mapping; None where it is not there or not a mapping."""
    if not isinstance(node, yaml.MappingNode):
        return None
    return next((value for name, value in node.value if name.value == key), None)


def value_of(node: yaml.Node | None, key: str) -> yaml.Node:
    """The same; BundleError where it is not there."""
    found = find(node, key)
    if found is None:
        raise BundleError(f"{SPEC}: found no {key} written out, expected it where it is used")
    return found


def scalar(text: str) -> str:
    """A text as YAML writes it, in quotes where it needs them."""
    if _PLAIN.fullmatch(text) and not _LIKE_A_NUMBER.fullmatch(text):
        return text
    return json.dumps(text)


def says(text: str, expected: object) -> bool:
    """Whether the text, read as YAML, is `expected`."""
    try:
        return bool(unshared(yaml.safe_load(text)) == expected)
    except yaml.YAMLError:
        return False


def unshared(value: Any) -> Any:
    """A copy in which nothing that YAML wrote once and named twice is one object."""
    if isinstance(value, dict):
        return {key: unshared(item) for key, item in value.items()}
    return [unshared(item) for item in value] if isinstance(value, list) else value
