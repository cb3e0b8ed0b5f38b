"""Labelled texts: JSON lines with `text`, `label`, and optionally `category`, `source`, `kind`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sae_core.errors import SAECoreError


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
    kind: Literal["prompt", "completion", "statement", ""] = ""


def read_labelled(path: Path) -> tuple[LabelledText, ...]:
    """The rows of a JSON-lines file; raises EvaluationError naming file and line."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, label = row["text"], row["label"]
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{path} line {number}: expected text and label") from error
        if label not in ("harmful", "benign"):
            raise EvaluationError(
                f"{path} line {number}: label is {label!r:.40}, expected harmful or benign"
            )
        rows.append(
            LabelledText(
                text=text,
                is_harmful=label == "harmful",
                category=row.get("category", ""),
                source=row.get("source", ""),
                kind=row.get("kind", ""),
            )
        )
    if not rows:
        raise EvaluationError(f"{path} has no rows")
    return tuple(rows)


def data_digest(rows: Sequence[LabelledText]) -> str:
    """sha256 over texts and labels in order, hexadecimal."""
    digest = hashlib.sha256()
    for row in rows:
        part = json.dumps([row.text, row.is_harmful, row.category, row.source])
        digest.update(part.encode() + b"\n")
    return digest.hexdigest()
