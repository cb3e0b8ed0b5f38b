"""Reads the texts that training is fed: JSON lines, plain or gzipped, in a reproducible mixture."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from sae_core.training.activations import TrainingError


def corpus_files(folder: Path) -> tuple[Path, ...]:
    """The folder's *.jsonl and *.jsonl.gz files by name."""
    files = sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")])
    if not files:
        raise TrainingError(f"{folder} has no *.jsonl or *.jsonl.gz file")
    return tuple(files)


def corpus_texts(
    folder: Path,
    *,
    keep: Mapping[str, float] | None = None,
    default_keep: float = 1.0,
    held_out_share: float = 0.01,
    held_out: bool = False,
) -> Iterator[str]:
    """Texts of the folder in file order.

    `keep` gives for a `source` the share of its documents that are used, `default_keep` that of
    all others. Which documents, and which are held out, is decided by a hash of the text, so the
    choice does not depend on order.
    """
    for path in corpus_files(folder):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line)
                    text, source = row["text"], row.get("source", "")
                except (ValueError, KeyError, TypeError) as error:
                    raise TrainingError(
                        f"{path.name} line {number} is no JSON object with a text"
                    ) from error
                digest = hashlib.sha256(text.encode()).digest()
                is_held_out = int.from_bytes(digest[:4], "big") / 2**32 < held_out_share
                draw = int.from_bytes(digest[4:8], "big") / 2**32
                share = default_keep if keep is None else keep.get(source, default_keep)
                if is_held_out == held_out and draw < share:
                    yield text
