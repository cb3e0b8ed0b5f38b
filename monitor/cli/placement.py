"""Where a command that loads a model runs it: the flags, and what they ask for together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypedDict

import typer

from monitor.config import check_backend, default_cache_dir
from monitor.errors import SettingsError

if TYPE_CHECKING:
    from monitor.graph_store import GraphPlace

Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Gpus = Annotated[int, typer.Option(help="CUDA devices to spread the model's blocks over.", min=1)]
TensorParallel = Annotated[
    int, typer.Option(help="Processes to split every block over, one a device.", min=1)
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or int8.")]
Backend = Annotated[str, typer.Option(help="torch or onnx.")]
Onnx = Annotated[Path | None, typer.Option(help="An export-onnx folder to run.")]


class Placement(TypedDict):
    """As `load_local` takes it."""

    device: str
    dtype: str
    gpus: int
    tensor_parallel: int
    graph: GraphPlace | None


def placement(
    device: str,
    dtype: str,
    gpus: int,
    tensor_parallel: int,
    backend: str,
    onnx: Path | None,
) -> Placement:
    """What the flags ask for.

    Raises:
        SettingsError: flags that contradict each other, as the server would refuse them.
    """
    from monitor.graph_store import GraphPlace

    try:
        check_backend(
            backend, dtype, onnx, device=device, gpus=gpus, tensor_parallel=tensor_parallel
        )
    except ValueError as error:
        raise SettingsError(str(error)) from None
    folder = None if onnx is None else onnx.resolve()
    return Placement(
        device=device,
        dtype=dtype,
        gpus=gpus,
        tensor_parallel=tensor_parallel,
        graph=None if backend == "torch" else GraphPlace(cache=default_cache_dir(), folder=folder),
    )
