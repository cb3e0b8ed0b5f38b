"""What a model folder holds, as sha256: a digest to bind results to, checksums to verify.

Only files that decide what the model computes count: config, tokenizer, chat template, weights.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sae_core.errors import ModelLoadError

CHECKSUMS = "SHA256SUMS.json"
"""Name -> sha256 of every counted file, written by a conversion as its last act."""

_NAMES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_PATTERNS = ("*.safetensors", "*.safetensors.index.json")


def digest_folder(folder: str | Path) -> str:
    """One sha256, hex, over the sorted names and hashes of the counted files, read now.

    Raises:
        ModelLoadError: The folder has no config.json, or a file cannot be read.
    """
    folder = Path(folder)
    names = _counted(folder)
    if "config.json" not in names:
        raise ModelLoadError(f"model folder {folder}: found no config.json")
    return _digest(_hashes(folder, names))


def write_checksums(folder: Path) -> None:
    """Writes the folder's checksums, to be verified from then on."""
    text = json.dumps(_hashes(folder, _counted(folder)), indent=2, sort_keys=True) + "\n"
    (folder / CHECKSUMS).write_text(text, encoding="utf-8")


def verify_folder(folder: str | Path) -> str:
    """Compares every file with the folder's checksums; returns the digest, as `digest_folder`.

    Raises:
        ModelLoadError: The checksums are missing, or name a file that is missing or damaged, or
            a counted file is not among them.
    """
    folder = Path(folder)
    path = folder / CHECKSUMS
    try:
        expected = json.loads(path.read_text(encoding="utf-8"))
        names = sorted(expected.items())
    except (OSError, ValueError, AttributeError) as error:
        raise ModelLoadError(f"{path}: cannot be read ({error})") from error
    for extra in sorted(set(_counted(folder)) - set(expected)):
        raise ModelLoadError(f"{folder / extra}: found a file that {CHECKSUMS} does not name")
    found = _hashes(folder, [name for name, _ in names])
    for name, digest in names:
        if found[name] != digest:
            raise ModelLoadError(
                f"{folder / name}: damaged, found sha256 {found[name][:16]}, "
                f"expected {str(digest)[:16]}"
            )
    return _digest(found)


def _counted(folder: Path) -> list[str]:
    found = {path.name for pattern in _PATTERNS for path in folder.glob(pattern)}
    return sorted(found | {name for name in _NAMES if (folder / name).exists()})


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter lock
        return dict(zip(names, pool.map(lambda name: _sha256(folder / name), names), strict=True))


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read ({error.strerror})") from error


def _digest(hashes: dict[str, str]) -> str:
    lines = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode("utf-8")).hexdigest()
