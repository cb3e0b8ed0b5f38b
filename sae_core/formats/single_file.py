"""Releases of one torch file per SAE: the file is given, or a folder that holds exactly one."""

from __future__ import annotations

from pathlib import Path

from sae_core.errors import SAEFormatError
from sae_core.formats.files import load_torch

SUFFIXES = (".pt", ".pth")
OTHER_FORMATS = (
    "cfg.json",
    "config.json",
    "hyperparams.json",
    "params.npz",
    "params.safetensors",
)
"""A folder with one of these is another format's, whatever torch files lie in it."""


def torch_file(path: Path) -> Path:
    """The file that `path` stands for.

    Raises SAEFormatError where it is a folder with none or several.
    """
    if not path.is_dir():
        return path
    files = _torch_files(path)
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise SAEFormatError(
            f"{path}: torch files: found {names}, expected one, or the hint `weights_file` to say "
            "which"
        )
    return files[0]


def names_in(path: Path) -> frozenset[str]:
    """Names of what the file at `path` holds; nothing where this is not a torch file's place.

    Raises SAEFormatError where `torch_file` does, and for a file that is not plain data.
    """
    if path.is_dir():
        if any((path / name).exists() for name in OTHER_FORMATS) or not _torch_files(path):
            return frozenset()
    elif path.suffix not in SUFFIXES:
        return frozenset()
    return frozenset(load_torch(torch_file(path)))


def checked_k(file: Path, k: int | None) -> int | None:
    """The hint `k`, which must be a whole number from 1 where it is given."""
    if k is not None and (type(k) is not int or k < 1):
        raise SAEFormatError(f"{file}: k: found the hint {k!r}, expected a whole number from 1")
    return k


def _torch_files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES and f.is_file())
