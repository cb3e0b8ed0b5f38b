"""`sae-monitor export-onnx`: a bundle with its model as one ONNX graph in a folder."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from monitor.cli.common import bundle_folder, exit_on_error, out, progress_bar
from monitor.config import check_backend, default_cache_dir
from monitor.errors import SettingsError


def export_onnx(
    folder: Annotated[Path, typer.Option("--out", help="New or empty folder to write.")],
    bundle: Annotated[str, typer.Option(help="A bundle's folder, or default.")] = "default",
    model: Annotated[Path | None, typer.Option(help="The model's folder.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Weights: float32, or int8 for the model's.")
    ] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest.")] = False,
) -> None:
    """Writes model, SAE encoders and heads as one graph, for `--backend onnx --onnx DIR`.

    Plain ONNX operators and functions made of them, weights beside it, and a manifest with what it
    was made of and the sha256 of every file.
    """
    from monitor.graph_store import graph_identity, require_onnx
    from monitor.local import load_local

    with exit_on_error(), progress_bar() as progress:
        try:
            check_backend("onnx", dtype, None)
        except ValueError as error:
            raise SettingsError(str(error)) from None
        require_onnx()
        from sae_core.onnx import export, quantize
        from sae_core.onnx.manifest import MANIFEST

        served = load_local(
            bundle_folder(bundle),
            model=model,
            cache=default_cache_dir(),
            products="torch",  # what oneDNN has packed cannot be traced
            check_fit=False,
            progress=progress,
        )
        provenance = served.provenance
        identity = graph_identity(provenance.bundle_digest, provenance.model_digest)
        if dtype == "int8":
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                plain = Path(scratch) / "float32"
                export.export_onnx(served.scorer, plain, identity=identity, progress=progress)
                progress("quantizing the model's matrices", 0.9)
                quantize.quantize(plain, folder)
        else:
            export.export_onnx(served.scorer, folder, identity=identity, progress=progress)
    if as_json:
        sys.stdout.write((folder / MANIFEST).read_text(encoding="utf-8"))
    else:
        size = sum(path.stat().st_size for path in folder.iterdir())
        out.print(f"{folder}: {size / 1e6:.0f} MB", highlight=False, soft_wrap=True)
