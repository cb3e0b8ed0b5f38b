from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper

from sae_core.errors import ExportError
from sae_core.heads import Cluster, ClusterHeads, LatentTerm
from sae_core.hook_points import HookPoint
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import Segment
from sae_core.language_model.tokenizer import load_tokenizer
from sae_core.onnx.export import OPSET, export_onnx
from sae_core.onnx.manifest import GRAPH, MANIFEST, WEIGHTS, check_identity, read_manifest
from sae_core.onnx.quantize import quantize
from sae_core.onnx.scorer import OnnxLanguageModel, OnnxScorer
from sae_core.onnx.session import GraphSession
from sae_core.sae import SAE
from sae_core.sae_config import SAEConfig
from sae_core.sae_weights import SAEWeights
from sae_core.scorer import Scorer
from sae_core.testing.models import D_MODEL, tiny_model_folder
from sae_core.testing.planted import planted_sae

Pair = Callable[[str], tuple[Scorer, OnnxScorer]]
AT = HookPoint(1, "resid_post")


@pytest.fixture
def exported(scorers: Pair, graphs: Path) -> Path:
    scorers("llama")
    return graphs / "llama"


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def small_scorer(path: Path, family: str, saes: Mapping[str, SAE]) -> Scorer:
    folder = tiny_model_folder(path / family, family)
    latents = tuple(
        LatentTerm(sae=name, latent_id=i, weight=1.0)
        for name, sae in saes.items()
        for i in range(0, sae.config.d_sae, 3)
    )
    heads = ClusterHeads([Cluster(id="c", latents=latents)], list(saes))
    places = {name: (AT, sae) for name, sae in saes.items()}
    return Scorer(load_language_model(folder, [AT]), load_tokenizer(folder), places, heads)


def test_the_file_holds_standard_operators_and_functions_of_them(exported: Path) -> None:
    model = onnx.load(exported / GRAPH, load_external_data=False)
    known = {(f.domain, f.name) for f in model.functions}

    def foreign(nodes: list[onnx.NodeProto]) -> set[tuple[str, str]]:
        found = {(n.domain, n.op_type) for n in nodes if n.domain}
        for node in nodes:
            for attribute in node.attribute:
                found |= foreign(list(attribute.g.node))
        return found

    assert foreign(list(model.graph.node)) <= known
    for function in model.functions:
        assert not foreign(list(function.node))


def test_the_file_tells_nothing_of_the_machine_that_made_it(exported: Path) -> None:
    content = (exported / GRAPH).read_bytes()
    for word in (b"stack_trace", b"site-packages", str(Path.home()).encode(), b".py"):
        assert word not in content


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_mixtures_of_experts_are_refused_by_name(tmp_path: Path, family: str) -> None:
    sae = planted_sae(D_MODEL, 30, architecture="relu", seed=1)
    scorer = small_scorer(tmp_path, family, {"s": sae})
    with pytest.raises(ExportError, match=f"model type {family}: a mixture of experts"):
        export_onnx(scorer, tmp_path / "graph", identity={})
    assert not (tmp_path / "graph").exists()


def test_a_model_that_onednn_has_packed_is_refused(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model", "llama")
    model = load_language_model(folder, [AT], products="onednn")
    if model.config.products != "onednn":
        pytest.skip("this torch has no oneDNN")
    scorer = Scorer(model, load_tokenizer(folder), {}, ClusterHeads([], []))
    with pytest.raises(ExportError, match="found products by onednn, expected torch"):
        export_onnx(scorer, tmp_path / "graph", identity={})


def test_a_taken_folder_is_refused_and_left_alone(scorers: Pair, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="found something there"):
        export_onnx(scorers("llama")[0], tmp_path, identity={})
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_changed_file_is_refused_by_name(copied: Path) -> None:
    folder = copied
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    with pytest.raises(ExportError, match=f"{WEIGHTS}: found sha256 .* expected"):
        GraphSession(folder, device="cpu")


def test_a_run_that_finds_no_memory_is_a_memory_error(exported: Path) -> None:
    zeros = helper.make_node("ConstantOfShape", ["shape"], ["zeros"])
    shape = helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, [1])
    result = helper.make_tensor_value_info("zeros", onnx.TensorProto.FLOAT, [None])
    model = helper.make_model(
        helper.make_graph([zeros], "zeros", [shape], [result]),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=10,
    )
    session, quiet = GraphSession(exported, device="cpu", n_threads=1), ort.SessionOptions()
    quiet.log_severity_level = 4
    session._session = ort.InferenceSession(model.SerializeToString(), quiet)
    assert session.run(["zeros"], {"shape": np.array([3])})["zeros"].tolist() == [0.0] * 3
    with pytest.raises(MemoryError, match="Failed to allocate memory"):
        session.run(["zeros"], {"shape": np.array([1 << 44])})


def test_a_missing_file_and_another_layout_are_refused(copied: Path, tmp_path: Path) -> None:
    folder = copied
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(ExportError, match="found layout version 99, expected 1"):
        read_manifest(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest | {"surplus": 1}))
    with pytest.raises(ExportError, match="not a manifest of an exported graph"):
        read_manifest(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / GRAPH).unlink()
    with pytest.raises(ExportError, match=f"{GRAPH}: cannot be read"):
        read_manifest(folder)
    with pytest.raises(ExportError, match="cannot be read"):
        read_manifest(tmp_path / "nowhere")


def test_a_graph_of_something_else_is_named(exported: Path) -> None:
    manifest = read_manifest(exported)
    check_identity(manifest, manifest.identity, exported)
    with pytest.raises(ExportError, match="model_digest is cccc.*, expected other"):
        check_identity(manifest, {**manifest.identity, "model_digest": "other"}, exported)


def test_a_missing_execution_provider_is_named(exported: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("the runtime has its CUDA execution provider")
    with pytest.raises(ExportError, match="expected CUDAExecutionProvider for cuda"):
        GraphSession(exported, device="cuda")


def random_sae(architecture: str, **config: object) -> SAE:
    """An SAE of a formula that the planted ones do not have."""
    generator = torch.Generator().manual_seed(3)
    d_sae = 48

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    is_gated = architecture == "gated"
    weights = SAEWeights(
        W_enc=some(D_MODEL, d_sae),
        b_enc=None if is_gated else some(d_sae) * 0.1,
        W_dec=some(d_sae, D_MODEL),
        b_dec=some(D_MODEL) * 0.1,
        threshold=torch.rand(d_sae, generator=generator) if architecture == "jumprelu" else None,
        b_gate=some(d_sae) * 0.1 if is_gated else None,
        r_mag=some(d_sae) * 0.1 if is_gated else None,
        b_mag=some(d_sae) * 0.1 if is_gated else None,
    )
    given = {"architecture": architecture, "d_in": D_MODEL, "d_sae": d_sae, **config}
    return SAE(SAEConfig(**given), weights)  # type: ignore[arg-type]


GATES: Mapping[str, Mapping[str, object]] = {
    "gated": {},
    "tanh_relu": {"apply_b_dec_to_input": True},
    "jumprelu": {"decoder_norms": "gate", "normalize": "layer_norm"},
    "abstopk": {"k": 7, "normalize": "unit_norm"},
    "topk": {"k": 5, "signed": True, "decoder_norms": "acts", "input_scale": 0.5},
    "groupmax": {"k": 12},
}


def test_every_gate_gives_what_torch_gives(tmp_path: Path) -> None:
    saes = {name: random_sae(name, **config) for name, config in GATES.items()}
    in_torch = small_scorer(tmp_path, "gpt2", saes)
    export_onnx(in_torch, tmp_path / "graph", identity={})
    folder = in_torch.language_model.config.folder
    model = OnnxLanguageModel(GraphSession(tmp_path / "graph", device="cpu"), folder)
    text = list(range(100, 170))
    found = model.score([Segment(model.open_stream(), text)]).scores
    expected = in_torch.step([Segment(in_torch.open_stream(), text)]).segments[0].latent_acts
    assert found is not None
    for number, name in enumerate(saes):
        columns = slice(number * 16, number * 16 + 16)
        acts, wanted = found.latent_acts[:, columns], expected[:, columns]
        assert (wanted != 0).mean() > 0.02, name
        same = ((acts != 0) == (wanted != 0)).all(axis=1)
        assert same.mean() > 0.95, name  # rounding alone may move one over its gate
        assert np.abs(acts - wanted)[same].max() <= 1e-5 * np.abs(wanted).max(), name


def test_int8_changes_the_model_and_not_what_reads_it(
    scorers: Pair, exported: Path, tmp_path: Path
) -> None:
    source = exported
    manifest = quantize(source, tmp_path / "int8")
    assert manifest.dtype == "int8"
    assert manifest.identity == read_manifest(source).identity
    assert (tmp_path / "int8" / WEIGHTS).stat().st_size < (source / WEIGHTS).stat().st_size
    nodes = onnx.load(tmp_path / "int8" / GRAPH, load_external_data=False).graph.node
    quantized = {n.name.split("/")[0] for n in nodes if n.op_type == "MatMulInteger"}
    assert quantized == {"model"}
    plain = {n.name.split("/")[0] for n in nodes if n.op_type == "MatMul"}
    assert plain == {"scorer"}

    model = OnnxLanguageModel(GraphSession(tmp_path / "int8", device="cpu"), source)
    in_torch = scorers("llama")[0]
    text = list(range(50, 80))
    found = model.score([Segment(model.open_stream(), text)]).resid
    expected = in_torch.language_model.step([Segment(in_torch.open_stream(), text)])
    for hook_point, x in expected.items():
        gap = float((found[hook_point] - x).norm() / x.norm())
        assert 0 < gap < 0.4, hook_point  # matrices of 32 columns round coarsely
    with pytest.raises(ExportError, match="found int8 weights, expected float32"):
        quantize(tmp_path / "int8", tmp_path / "again")
