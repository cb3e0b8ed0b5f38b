"""Checkpoints on disk -> SAE: one module per format, and the one place that tells them apart.

saelens  cfg.json + sae_weights.safetensors, as SAELens 6 writes them

A format is told by the names of its files, never by the shapes of its tensors. To add one: its
module, and its row in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sae_core.errors import SAEFormatError
from sae_core.formats.saelens import is_saelens, read_saelens
from sae_core.sae import SAE


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One way in which SAEs are published."""

    name: str
    looks_like: str
    """Its files, for the message that says what would have been read."""
    recognises: Callable[[Path], bool]
    """By file names alone."""
    read: Callable[..., SAE]
    """Takes the path and, by name, any of `hints`."""
    hints: frozenset[str] = frozenset()
    """Facts that its files may lack and the caller may give."""


FORMATS: tuple[Format, ...] = (
    Format(
        name="SAELens",
        looks_like="a folder with cfg.json and sae_weights.safetensors",
        recognises=is_saelens,
        read=read_saelens,
    ),
)

LISTED_FILES = 12
"""Names of found files in a message; more would bury the sentence."""


def load_sae(path: str | Path, **hints: object) -> SAE:
    """The SAE at `path`, a folder or a file of any format in `FORMATS`.

    `hints` are facts that a format leaves out of its files; one that the format does not know is
    refused. Raises SAEFormatError, naming file, key, what was found and what was expected.
    """
    path = Path(path)
    if not path.exists():
        raise SAEFormatError(f"{path}: does not exist, expected an SAE checkpoint")
    for known in FORMATS:
        if known.recognises(path):
            for hint in sorted(hints.keys() - known.hints):
                accepted = ", ".join(sorted(known.hints)) or "none"
                raise SAEFormatError(
                    f"{path}: {known.name} has no hint {hint!r}, accepted hints: {accepted}"
                )
            return known.read(path, **hints)
    expected = "; ".join(f"{known.name} ({known.looks_like})" for known in FORMATS)
    raise SAEFormatError(f"{path}: not a known SAE format: found {_found(path)}; known: {expected}")


def _found(path: Path) -> str:
    if not path.is_dir():
        return f"the file {path.name}"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    if not names:
        return "an empty folder"
    more = len(names) - LISTED_FILES
    return ", ".join(names[:LISTED_FILES]) + (f" and {more} more" if more > 0 else "")
