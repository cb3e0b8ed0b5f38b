"""An exported folder as something to call: arrays in, arrays out, in the graph's own names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort
import torch

from sae_core.errors import ExportError
from sae_core.language_model.checkpoint import one_line
from sae_core.onnx.manifest import GRAPH, Manifest, read_manifest

Device = Literal["cpu", "cuda"]

_PROVIDERS: Mapping[Device, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_NO_MEMORY = ("Failed to allocate memory", "is smaller than requested bytes", "bad_alloc")
"""What its arenas and the C++ library say (1.32, core/framework/bfc_arena.cc)."""


class GraphSession:
    """One loaded graph.

    Args:
        folder: As `export_onnx` writes it; every file is compared with its sha256.
        device: `cuda` needs onnxruntime's CUDA execution provider.
        n_threads: Threads of one operator, as many as torch has where it is None. They sleep
            where there is no work: spinning would take the cores from the rest of the process.

    Raises:
        ExportError: The folder is damaged, or the runtime cannot load the graph or lacks the
            execution provider.
    """

    def __init__(self, folder: Path, *, device: Device, n_threads: int | None = None) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        provider = _PROVIDERS[device]
        available = ort.get_available_providers()
        if provider not in available:
            raise ExportError(
                f"onnxruntime: found {', '.join(available)}, expected {provider} for {device} "
                "(pip install 'sae-monitor[onnx-gpu]')"
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = n_threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        providers = list(dict.fromkeys((provider, _PROVIDERS["cpu"])))
        try:
            self._session = ort.InferenceSession(folder / GRAPH, options, providers=providers)
        except Exception as error:  # the runtime has no common root for its errors
            raise ExportError(
                f"{folder / GRAPH}: onnxruntime cannot load it ({one_line(error)})"
            ) from error
        _check_names(self._session, self.manifest, folder)

    def run(self, names: Sequence[str], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs of these names.

        Raises:
            MemoryError: The runtime finds no memory for them; it has no class for that.
        """
        try:
            found = self._session.run(names, inputs)
        except Exception as error:
            if any(words in str(error) for words in _NO_MEMORY):
                raise MemoryError(f"onnxruntime: {one_line(error)}") from None
            raise
        return dict(zip(names, found, strict=True))


def _check_names(session: ort.InferenceSession, manifest: Manifest, folder: Path) -> None:
    found = {output.name for output in session.get_outputs()}
    layers = range(len(manifest.layers))
    expected = {"logits", "latent_acts"}
    expected |= {f"resid.{name}" for name in manifest.hook_points}
    expected |= {f"{what}.{layer}" for what in ("keys", "values") for layer in layers}
    if found != expected:
        missing = ", ".join(sorted(expected ^ found))
        raise ExportError(f"{folder / GRAPH}: outputs differ from its manifest's in {missing}")
