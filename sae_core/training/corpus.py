"""Reads the texts that training is fed: JSON lines, plain or gzipped, in a reproducible mixture."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sae_core.errors import TrainingError

SUFFIXES = (".jsonl", ".jsonl.gz")


def corpus_files(places: Sequence[Path]) -> tuple[Path, ...]:
    """The files given, and those of the folders by name; TrainingError where one is missing."""
    files: list[Path] = []
    for place in places:
        if place.is_dir():
            found = sorted(p for suffix in SUFFIXES for p in place.glob("*" + suffix))
            if not found:
                raise TrainingError(f"data: {place} has no *.jsonl or *.jsonl.gz file")
            files += found
        elif place.is_file():
            files.append(place)
        else:
            raise TrainingError(f"data: found no file or folder {place}")
    if not files:
        raise TrainingError("data: found none, expected at least one file of JSON lines")
    return tuple(files)


def corpus_digests(places: Sequence[Path]) -> dict[str, str]:
    """sha256 of each file, by its name."""
    digests = {}
    for path in corpus_files(places):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def corpus_texts(
    places: Sequence[Path],
    *,
    keep: Mapping[str, float] | None = None,
    default_keep: float = 1.0,
    held_out_share: float = 0.01,
    held_out: bool = False,
) -> Iterator[str]:
    """Texts of the files and folders in their order.

    `keep` gives for a `source` the share of its documents that are used, `default_keep` that of
    all others. Which documents, and which are held out, is decided by a hash of the text, so the
    choice does not depend on order.
    """
    for path in corpus_files(places):
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rt", encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    text, source = _row(line, f"{path.name} line {number}")
                    digest = hashlib.sha256(text.encode()).digest()
                    is_held_out = int.from_bytes(digest[:4], "big") / 2**32 < held_out_share
                    draw = int.from_bytes(digest[4:8], "big") / 2**32
                    share = default_keep if keep is None else keep.get(source, default_keep)
                    if is_held_out == held_out and draw < share:
                        yield text
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise TrainingError(f"data: {path.name} cannot be read ({error})") from error


def _row(line: str, where: str) -> tuple[str, str]:
    """Text and source of one line."""
    try:
        row = json.loads(line)
        text, source = row["text"], row.get("source", "")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(f"data: {where} is no JSON object with a text") from error
    if not isinstance(text, str):
        raise TrainingError(f"data: {where}: text: found {text!r:.40}, expected a string")
    return text, str(source)
