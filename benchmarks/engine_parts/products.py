"""How fast this machine multiplies the matrices of the blocks in use, by the best library at hand.

One pass multiplies the rows of a step by every matrix of every needed block: distinct shapes have
one weight each, used as often as there are such matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from engine_parts.measuring import timed

Pass = Callable[[], float]
"""Seconds of one pass."""


def flops(shapes: Mapping[tuple[int, int], int], n_rows: int) -> int:
    """Two for every multiplication of one pass."""
    return 2 * n_rows * sum(n_in * n_out * count for (n_in, n_out), count in shapes.items())


def libraries(
    shapes: Mapping[tuple[int, int], int], n_rows: int, dtype: torch.dtype, threads: int
) -> tuple[dict[str, Pass], list[str]]:
    """A pass by each library that can do it here, and why others cannot."""
    found: dict[str, Pass] = {}
    missing: list[str] = []
    for name, make in (
        ("torch", _torch),
        ("oneDNN, packed weights", _onednn),
        ("ONNX Runtime", lambda *args: _onnx_runtime(*args, threads)),
    ):
        try:
            products = [
                (make(n_rows, n_in, n_out, dtype), count) for (n_in, n_out), count in shapes.items()
            ]
        except (RuntimeError, ImportError, _Unsupported) as error:
            reason = str(error).splitlines()[0][:160]
            missing.append(f"{name}, {str(dtype).removeprefix('torch.')}: left out, {reason}")
            continue
        found[name] = _pass(products)
    return found, missing


class _Unsupported(Exception):
    pass


def _pass(products: list[tuple[Callable[[], object], int]]) -> Pass:
    def run() -> None:
        with torch.inference_mode():
            for product, count in products:
                for _ in range(count):
                    product()

    return lambda: timed(run)


def _operands(
    n_rows: int, n_in: int, n_out: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, n_in, generator=generator)
    weight = torch.randn(n_out, n_in, generator=generator) / n_in**0.5
    return x.to(dtype), weight.to(dtype)


def _torch(n_rows: int, n_in: int, n_out: int, dtype: torch.dtype) -> Callable[[], object]:
    x, weight = _operands(n_rows, n_in, n_out, dtype)
    return lambda: torch.nn.functional.linear(x, weight)


def _onednn(n_rows: int, n_in: int, n_out: int, dtype: torch.dtype) -> Callable[[], object]:
    x, weight = _operands(n_rows, n_in, n_out, dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, n_rows)
    linear = torch.ops.mkldnn._linear_pointwise
    return lambda: linear(x, packed, None, "none", [], "")


def _onnx_runtime(
    n_rows: int, n_in: int, n_out: int, dtype: torch.dtype, threads: int
) -> Callable[[], object]:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    if dtype != torch.float32:
        raise _Unsupported("its CPU provider has no MatMul in this type")
    x, weight = _operands(n_rows, n_in, n_out, dtype)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [n_rows, n_in])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [n_rows, n_out])],
        [numpy_helper.from_array(weight.T.contiguous().numpy(), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = min(model.ir_version, onnx.IR_VERSION_2023_5_5)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # A pool that spins between calls would take the cores of the side that runs next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    rows = {"x": x.numpy()}
    return lambda: session.run(None, rows)
