"""Where the exported graph of a bundle and its model is on this machine; exported where it is not.

The operator's own folder, or one in the user's cache under everything that the graph depends on.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from monitor import __version__
from monitor.errors import SettingsError
from sae_core.errors import ExportError
from sae_core.heads import ClusterHeads
from sae_core.hook_points import HookPoint
from sae_core.language_model.tokenizer import Tokenizer
from sae_core.sae import SAE
from sae_core.scorer import Scorer

if TYPE_CHECKING:
    from sae_core.onnx.session import GraphSession

Progress = Callable[[str, float], None]

_NEEDED = ("onnx", "onnx_ir", "onnxruntime", "onnxscript")


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphPlace:
    """Which exported graph is wanted."""

    cache: Path
    """Where exports are kept, in `onnx/`."""
    folder: Path | None = None
    """The operator's own export; used as it is, never written."""


def graph_identity(bundle_digest: str, model_digest: str) -> dict[str, str]:
    """What a graph must have been made of to be served."""
    return {
        "bundle_digest": bundle_digest,
        "model_digest": model_digest,
        "sae_monitor": __version__,
    }


def require_onnx() -> None:
    """Raises SettingsError where a package of the extra is missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(
            f"backend: onnx needs {', '.join(missing)}, which is not installed; "
            "expected pip install 'sae-monitor[onnx]' (or [onnx-gpu])"
        )


def open_graph(
    place: GraphPlace,
    load: Callable[[], Scorer],
    *,
    identity: Mapping[str, str],
    device: str,
    dtype: str,
    progress: Progress = lambda what, share: None,
) -> GraphSession:
    """The graph made of `identity`, in `dtype`; exported on first use, which takes a minute or two.

    Args:
        load: Gives the scorer to export, on the CPU in float32; called only where it is needed.

    Raises:
        SettingsError: A package is missing, or the operator's folder is not what is served.
        ExportError: The model cannot be exported, or the runtime cannot load the graph.
    """
    require_onnx()
    from sae_core.onnx.manifest import check_identity
    from sae_core.onnx.session import GraphSession

    folder = place.folder
    if folder is None:
        folder = _exported(place.cache / "onnx", load, identity, dtype, progress)
    progress("loading the graph", 0.9)
    session = GraphSession(folder, device="cuda" if device == "cuda" else "cpu")
    if session.manifest.dtype != dtype:
        raise SettingsError(
            f"onnx: found {session.manifest.dtype} weights in {folder}, expected dtype {dtype}"
        )
    try:
        check_identity(session.manifest, identity, folder)
    except ExportError as error:
        raise SettingsError(f"onnx: {error}") from error
    return session


def on_graph(
    session: GraphSession,
    model_folder: Path,
    tokenizer: Tokenizer,
    saes: Mapping[str, tuple[HookPoint, SAE]],
    heads: ClusterHeads,
) -> Scorer:
    """A scorer whose own forward passes run in the graph."""
    from sae_core.onnx.scorer import OnnxLanguageModel, OnnxScorer

    return OnnxScorer(OnnxLanguageModel(session, model_folder), tokenizer, saes, heads)


def _exported(
    cache: Path,
    load: Callable[[], Scorer],
    identity: Mapping[str, str],
    dtype: str,
    progress: Progress,
) -> Path:
    from sae_core.onnx.export import export_onnx
    from sae_core.onnx.manifest import MANIFEST, VERSION
    from sae_core.onnx.quantize import quantize

    named = "\n".join((str(VERSION), *(f"{k}={v}" for k, v in sorted(identity.items()))))
    key = hashlib.sha256(named.encode()).hexdigest()[:32]
    folder = cache / key
    if not (folder / MANIFEST).is_file():
        try:
            export_onnx(load(), folder, identity=identity, progress=progress)
        except ExportError:
            if not (folder / MANIFEST).is_file():  # else another process was first
                raise
    if dtype != "int8":
        return folder
    quantized = cache / f"{key}-int8"
    if not (quantized / MANIFEST).is_file():
        progress("quantizing the model's matrices", 0.8)
        try:
            quantize(folder, quantized)
        except ExportError:
            if not (quantized / MANIFEST).is_file():
                raise
    return quantized
