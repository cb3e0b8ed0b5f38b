"""A scorer -> a folder with one ONNX graph: embedding to layer, encoders, heads.

Hugging Face's module is traced as it is; attention and ranking stand in the trace as operators of
our own domain and are written into the file as functions of standard operators, so that any ONNX
runtime can run it.

Inputs: input_ids [n], position_ids [n], for every distinct window `blocks.WINDOW` (see `attention`;
`blocks.all` where there is none), per layer `past_keys.L` and `past_values.L` [n_kv_heads, n_past,
dim] of all segments one behind the other. Outputs: logits [n, n_clusters, 3], latent_acts
[n, n_latents], `resid.HOOK_POINT` [n, width], per layer `keys.L` and `values.L` of the new tokens.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn

from sae_core.errors import ExportError
from sae_core.language_model.checkpoint import one_line
from sae_core.language_model.traced import AttentionCall, TracedModel
from sae_core.onnx.attention import (
    BLOCK_COLUMNS,
    DOMAIN,
    OPERATOR,
    attention_function,
    blocks_name,
    function_name,
)
from sae_core.onnx.encoders import AMONG_TOP_K, among_top_k_function, encode
from sae_core.onnx.manifest import GRAPH, VERSION, WEIGHTS, LayerLayout, Manifest, sha256
from sae_core.scorer import Scorer

OPSET = 23
"""The first with RMSNormalization and RotaryEmbedding, which take many small operators' place."""
MODEL_PART = "model"
"""Nodes whose names begin so belong to the language model, the others to what reads it."""

_PACKAGES = ("torch", "transformers", "onnx", "onnxscript")
_MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")

Progress = Callable[[str, float], None]


class ScoringGraph(nn.Module):
    """Everything that one step computes, as a function of tensors alone."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.model = TracedModel(scorer.language_model)
        self.model_type = scorer.language_model.config.model_type
        self._scorer = scorer
        self.windows: list[int | None] = list(dict.fromkeys(c.window for c in self.model.calls))
        self.variants: list[AttentionCall] = list(dict.fromkeys(self.model.calls))

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        blocks: list[Tensor],
        past_keys: list[Tensor],
        past_values: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Outputs in the order of `output_names`."""

        def attend(
            layer: int, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor
        ) -> Tensor:
            seen = blocks[self.windows.index(call.window)]
            return torch.onnx.ops.symbolic(
                f"{DOMAIN}::{OPERATOR}",
                [query, key, value, past_keys[layer], past_values[layer], seen],
                {"variant": self.variants.index(call)},
                dtype=query.dtype,
                shape=(1, query.shape[2], call.n_heads, call.value_dim),
                version=1,
            )

        traced = self.model(input_ids, position_ids, attend)
        acts = {
            sae_id: encode(reading.encode, x if reading.shift is None else reading.shift(x))
            for sae_id, reading in self._scorer.readings.items()
            for x in [traced.resid[reading.hook_point]]
        }
        logits = self._scorer.heads({str(h): x for h, x in traced.resid.items()}, acts)
        stacked = torch.stack((logits.fused, logits.dense, logits.sae), dim=-1)
        latent_acts = torch.cat([*acts.values(), stacked.new_empty(input_ids.shape[0], 0)], dim=-1)
        resid = [traced.resid[h].clone() for h in self.model.hook_points]
        keys_values = [t.clone() for t in (*traced.keys, *traced.values)]
        return (stacked, latent_acts, *resid, *keys_values)

    def input_names(self) -> list[str]:
        """In the order of `forward`'s tensors."""
        layers = range(len(self.model.calls))
        return [
            *("input_ids", "position_ids"),
            *(blocks_name(window) for window in self.windows),
            *(f"past_keys.{layer}" for layer in layers),
            *(f"past_values.{layer}" for layer in layers),
        ]

    def output_names(self) -> list[str]:
        """In the order of what `forward` gives."""
        layers = range(len(self.model.calls))
        return [
            *("logits", "latent_acts"),
            *(f"resid.{hook_point}" for hook_point in self.model.hook_points),
            *(f"keys.{layer}" for layer in layers),
            *(f"values.{layer}" for layer in layers),
        ]

    def example(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Arguments of `forward` of some size, and which of their axes vary."""
        calls, varies = self.model.calls, torch.export.Dim.DYNAMIC
        ids = torch.zeros(7, dtype=torch.long)
        blocks = [torch.zeros(3, BLOCK_COLUMNS, dtype=torch.long) for _ in self.windows]
        keys = [torch.zeros(c.n_kv_heads, 11, c.key_dim) for c in calls]
        values = [torch.zeros(c.n_kv_heads, 11, c.value_dim) for c in calls]
        past = [{1: varies} for _ in calls]
        return (
            (ids, ids.clone(), blocks, keys, values),
            ({0: varies}, {0: varies}, [{0: varies} for _ in self.windows], past, past),
        )


def export_onnx(
    scorer: Scorer,
    folder: Path,
    *,
    identity: Mapping[str, str],
    progress: Progress = lambda what, share: None,
) -> Manifest:
    """Writes the graph, its weights and its manifest to `folder`, all of it or nothing.

    Args:
        scorer: Loaded on the CPU in float32, with products by torch.
        folder: Must not exist, or be empty.
        identity: What the graph is made of, by names of the caller's; checked when it is opened.

    Raises:
        ExportError: The folder is taken, or the model or an encoder cannot be exported; says why.
    """
    config = scorer.language_model.config
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder}: found something there, expected no folder or an empty one")
    if config.model_type in _MIXTURES:
        raise ExportError(
            f"model type {config.model_type}: a mixture of experts chooses its matrices token by "
            "token, which the graph cannot do without computing or copying all of them; expected "
            "a dense model (use the torch backend)"
        )
    if config.dtype != torch.float32 or torch.device(config.device).type != "cpu":
        raise ExportError(
            f"model: found {config.dtype} on {config.device}, expected torch.float32 on cpu"
        )
    if config.products != "torch":
        raise ExportError(f"model: found products by {config.products}, expected torch")
    progress("tracing the model", 0.1)
    graph = ScoringGraph(scorer).eval()
    model = _trace(graph, progress)
    _name(model, graph)
    _add_functions(model, graph)
    progress("writing the graph", 0.8)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        onnx_ir.save(model, part / GRAPH, external_data=WEIGHTS)
        manifest = Manifest(
            version=VERSION,
            identity=dict(identity),
            model_type=config.model_type,
            d_model=config.d_model,
            n_layers=config.n_layers,
            n_layers_total=config.n_layers_total,
            vocab_size=config.vocab_size,
            max_positions=config.max_positions,
            hook_points={str(h): n for h, n in scorer.language_model.widths.items()},
            layers=tuple(
                LayerLayout(
                    n_kv_heads=c.n_kv_heads,
                    key_dim=c.key_dim,
                    value_dim=c.value_dim,
                    window=c.window,
                )
                for c in graph.model.calls
            ),
            dtype="float32",
            opset=OPSET,
            versions={name: version(name) for name in _PACKAGES},
            files={path.name: sha256(path) for path in sorted(part.iterdir())},
        )
        manifest.write(part)
        part.chmod(0o755)  # mkdtemp makes it private
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    except OSError as error:
        raise ExportError(f"{folder}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return manifest


def _trace(graph: ScoringGraph, progress: Progress) -> onnx_ir.Model:
    arguments, dynamic = graph.example()
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(graph, arguments, dynamic_shapes=dynamic, strict=False)
            progress("translating the model to ONNX", 0.4)
            exported = torch.onnx.export(
                program, arguments, dynamo=True, opset_version=OPSET, optimize=True, verbose=False
            )
    except ExportError:
        raise
    except Exception as error:  # whatever tracing and translation trip over
        raise ExportError(
            f"model type {graph.model_type}: cannot be exported ({type(error).__name__}: "
            f"{one_line(error)})"
        ) from error
    assert exported is not None
    return exported.model


def _name(model: onnx_ir.Model, graph: ScoringGraph) -> None:
    """Names inputs, outputs and nodes by what they are; drops notes with paths of this machine."""
    for values, names in (
        (model.graph.inputs, graph.input_names()),
        (model.graph.outputs, graph.output_names()),
    ):
        assert len(values) == len(names), f"found {len(values)} values, expected {len(names)}"
        for value, name in zip(values, names, strict=True):
            value.name = name
    for number, node in enumerate(model.graph):
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        part = MODEL_PART if f"'{MODEL_PART}'" in scopes else "scorer"
        node.name = f"{part}/{number}_{node.op_type}"
        node.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "sae-monitor", ""
    model.graph.name = "sae_monitor"


def _add_functions(model: onnx_ir.Model, graph: ScoringGraph) -> None:
    """Gives the operators of our domain their meaning."""
    for number, node in enumerate(n for n in model.graph if n.domain == DOMAIN):
        attributes = {name: value.value for name, value in node.attributes.items()}
        if node.op_type == OPERATOR:
            variant = attributes["variant"]
            name = function_name(variant)
            function = attention_function(name, graph.variants[variant], OPSET)
        else:
            name = f"{AMONG_TOP_K}{number}"
            function = among_top_k_function(
                name,
                attributes["k"],
                attributes["lowest"],
                bool(attributes["is_absolute"]),
                OPSET,
            )
        node.op_type = name
        node.attributes.clear()
        added = onnx_ir.from_proto(function)
        model.functions[added.identifier()] = added
    model.graph.opset_imports[DOMAIN] = 1


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's notes about itself away from the operator."""
    names: Sequence[str] = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
