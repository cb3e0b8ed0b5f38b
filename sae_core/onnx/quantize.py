"""int8 weights for an exported graph: the model's matrices, never what reads its activations.

Weights become int8 with a scale per output channel; activations are quantized as they come, each
step by its own range. So a token's numbers depend a little on its company in the step.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir
from onnxruntime.quantization import QuantType, quantize_dynamic

from sae_core.errors import ExportError
from sae_core.onnx.export import MODEL_PART
from sae_core.onnx.manifest import GRAPH, WEIGHTS, Manifest, read_manifest, sha256


def quantize(source: Path, folder: Path) -> Manifest:
    """Writes the graph in `source` to `folder` with int8 matrices, all of it or nothing.

    Raises:
        ExportError: `source` is damaged or quantized already, or `folder` is taken.
    """
    manifest = read_manifest(source)
    if manifest.dtype != "float32":
        raise ExportError(f"{source}: found {manifest.dtype} weights, expected float32")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder}: found something there, expected no folder or an empty one")
    nodes = onnx.load(source / GRAPH, load_external_data=False).graph.node
    ours = [
        node.name
        for node in nodes
        if node.op_type == "MatMul" and node.name.startswith(f"{MODEL_PART}/")
    ]
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        logging.getLogger().addFilter(_is_not_advice)
        quantize_dynamic(
            source / GRAPH,
            part / "plain.onnx",
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=ours,
            per_channel=True,
            weight_type=QuantType.QInt8,
            reduce_range=True,  # 8 bits saturate in 16-bit sums without VNNI (LOG.md)
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True},
        )
        model = onnx_ir.load(part / "plain.onnx")
        onnx_ir.save(model, part / GRAPH, external_data=WEIGHTS)
        for path in part.iterdir():
            if path.name not in (GRAPH, WEIGHTS):
                path.unlink()
        files = {path.name: sha256(path) for path in sorted(part.iterdir())}
        quantized = replace(manifest, dtype="int8", files=files)
        quantized.write(part)
        part.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written ({error.strerror})") from error
    finally:
        logging.getLogger().removeFilter(_is_not_advice)
        shutil.rmtree(part, ignore_errors=True)
    return quantized


def _is_not_advice(record: logging.LogRecord) -> bool:
    """False for the quantizer's advice to shape-infer, which the exporter did."""
    return "pre-processing before quantization" not in record.getMessage()
