"""Labelled texts: JSON lines with `text`, `label`, and what is known besides.

`category` (the risk; of a benign row benign_hard or benign_general), `source` (the data set),
`kind` (prompt, completion, statement), `prompt` (what a completion answers). Other keys are let
through and not read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from sae_core.errors import SAECoreError

Kind = Literal["prompt", "completion", "statement", ""]


class EvaluationError(SAECoreError):
    """Labelled texts that cannot be read, or scores that do not belong to them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledText:
    """One row of a labelled data set."""

    text: str
    is_harmful: bool
    category: str = ""
    """The risk of a harmful row; what kind of benign a benign one is."""
    source: str = ""
    """The data set that the row comes from."""
    kind: Kind = ""
    prompt: str = ""
    """What a completion answers."""
    place: str = field(default="", compare=False)
    """File and line that it was read from."""


def read_labelled(path: Path) -> tuple[LabelledText, ...]:
    """The rows of a JSON-lines file; raises EvaluationError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: found bytes that are no UTF-8 ({error.reason})") from error
    rows = [
        _row(line, f"{path} line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not rows:
        raise EvaluationError(f"{path}: found no rows, expected JSON lines with text and label")
    return tuple(rows)


def _row(line: str, place: str) -> LabelledText:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise EvaluationError(f"{place}: found no JSON ({error}), expected an object") from error
    if not isinstance(row, dict):
        found = type(row).__name__
        raise EvaluationError(f"{place}: found {found}, expected an object with text and label")
    for key in ("text", "label"):
        if key not in row:
            raise EvaluationError(f"{place}: found no {key}, expected text and label")
    text, label = row["text"], row["label"]
    if not isinstance(text, str) or not text.strip():
        raise EvaluationError(f"{place}: text is {text!r:.40}, expected visible characters")
    if label not in ("harmful", "benign"):
        raise EvaluationError(f"{place}: label is {label!r:.40}, expected harmful or benign")
    kind = _optional(row, "kind", place)
    if kind not in get_args(Kind):
        raise EvaluationError(
            f"{place}: kind is {kind!r:.40}, expected prompt, completion or statement"
        )
    return LabelledText(
        text=text,
        is_harmful=label == "harmful",
        category=_optional(row, "category", place),
        source=_optional(row, "source", place),
        kind=kind,  # type: ignore[arg-type]  # checked above
        prompt=_optional(row, "prompt", place),
        place=place,
    )


def _optional(row: dict[str, Any], key: str, place: str) -> str:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise EvaluationError(f"{place}: {key} is {value!r:.40}, expected text")
    return value or ""


def data_digest(rows: Sequence[LabelledText]) -> str:
    """sha256 over texts, labels and prompts in order, hexadecimal."""
    digest = hashlib.sha256()
    for row in rows:
        said = [row.text, row.is_harmful, row.category, row.source]
        if row.prompt:
            said.append(row.prompt)
        digest.update(json.dumps(said).encode() + b"\n")
    return digest.hexdigest()
