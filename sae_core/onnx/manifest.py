"""What an exported graph was made of, and how it is laid out: `manifest.json` beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sae_core.errors import ExportError

MANIFEST = "manifest.json"
GRAPH = "model.onnx"
WEIGHTS = "model.onnx.data"
VERSION = 1
"""Of the layout; a folder of another one is refused and must be exported again."""
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLayout:
    """The keys and values of one layer: [n_kv_heads, n, dim] each."""

    n_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    """Tokens that a token sees, itself included; None for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that must be known to run a graph, and to know that it is the right one."""

    version: int
    identity: Mapping[str, str]
    """Digests and names of what the graph was made of, as the exporter gave them."""
    model_type: str
    d_model: int
    n_layers: int
    n_layers_total: int
    vocab_size: int
    max_positions: int
    hook_points: Mapping[str, int]
    """Width by name; the graph gives them as `resid.NAME`."""
    layers: tuple[LayerLayout, ...]
    dtype: str
    """float32, or int8 where the model's matrices are."""
    opset: int
    versions: Mapping[str, str]
    """Of the packages that made it."""
    files: Mapping[str, str]
    """sha256 by name."""

    def write(self, folder: Path) -> None:
        """Writes manifest.json."""
        text = json.dumps(asdict(self), indent=1) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Reads manifest.json and compares the files beside it with their sha256.

    Raises:
        ExportError: A file is missing or differs, or the layout is another one.
    """
    path = folder / MANIFEST
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ExportError(f"{path}: not JSON ({error})") from error
    found = raw.get("version") if isinstance(raw, dict) else None
    if found != VERSION:
        raise ExportError(f"{path}: found layout version {found!r}, expected {VERSION}")
    try:
        layers = tuple(LayerLayout(**layer) for layer in raw.pop("layers"))
        manifest = Manifest(layers=layers, **raw)
    except (TypeError, KeyError) as error:
        raise ExportError(f"{path}: not a manifest of an exported graph ({error})") from error
    for name, expected in manifest.files.items():
        try:
            digest = sha256(folder / name)
        except OSError as error:
            raise ExportError(f"{folder / name}: cannot be read ({error.strerror})") from error
        if digest != expected:
            raise ExportError(f"{folder / name}: found sha256 {digest}, expected {expected}")
    return manifest


def check_identity(manifest: Manifest, expected: Mapping[str, str], folder: Path) -> None:
    """Raises ExportError where the graph was made of something else than is served."""
    for name, wanted in expected.items():
        found = manifest.identity.get(name)
        if found != wanted:
            raise ExportError(f"{folder}: {name} is {found}, expected {wanted}; export it again")


def sha256(path: Path) -> str:
    """Of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
