"""The server on the backend onnx: same scores, named where a backend is named, and its refusals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from monitor.audit_log.query import query
from monitor.bundle import load_bundle
from monitor.cli.app import app
from monitor.config import load_settings
from monitor.errors import SettingsError
from monitor.fidelity import check_fidelity
from monitor.graph_store import GraphPlace
from monitor.local import load_local
from monitor.model_store import find_model
from monitor.parity import Parity, admit_quantized, compare
from monitor.records import Verdict
from monitor.sae_store import find_saes
from monitor.served import Served, load_served
from sae_core.heads import ClusterHeads
from sae_core.language_model import products
from sae_core.onnx.manifest import MANIFEST, Manifest, read_manifest
from sae_core.scorer import Scorer

RISKY = "what is the danger of the attack"
CALM = "please tell me how to bake bread"


@pytest.fixture(scope="module")
def graph(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, exported by the command line."""
    folder = tmp_path_factory.mktemp("exported") / "graph"
    code, output = run("export-onnx", "--bundle", str(tiny_bundle), "--out", str(folder))
    assert code == 0, output
    return folder


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def local(bundle: Path, graph: GraphPlace, dtype: str = "float32") -> Served:
    return load_local(bundle, model=None, cache=graph.cache, dtype=dtype, graph=graph)


def test_served_scores_equal_torch_and_name_their_backend(
    serve: Callable[..., Any], graph: Path, tmp_path: Path
) -> None:
    found = {}
    for name, changes in {"onnx": {"onnx": graph}, "torch": {}}.items():
        audit = tmp_path / f"{name}.db"
        with (
            serve(backend=name, audit=f"sqlite:///{audit}", **changes) as server,
            server.client() as client,
        ):
            risky, calm = client.score(text=RISKY, tokens=True), client.score(text=CALM)
            with client.stream() as stream:
                for word in RISKY.split():
                    stream.send(text=word + " ")
            assert (risky.verdict, calm.verdict) == (Verdict.ALERT, Verdict.PASS)
            assert risky.provenance.backend == f"{name}-cpu"
            found[name] = risky
            families = server.server.metrics.registry.collect()
            info = next(m for m in families if m.name == "saemonitor_model_info")
            assert info.samples[0].labels["backend"] == f"{name}-cpu"
        (record,) = query(f"sqlite:///{audit}", decision_id=risky.decision_id)
        assert record["provenance"]["backend"] == f"{name}-cpu"
    for a, b in zip(found["onnx"].tokens, found["torch"].tokens, strict=True):
        assert a.fused == pytest.approx(b.fused, rel=1e-5, abs=1e-4)


def test_a_model_is_exported_whatever_multiplies_its_matrices_here(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "WORTH_TIMING", 0)
    monkeypatch.setattr(products, "_seconds", lambda layers: (2.0, 1.0))
    folder = tmp_path / "graph"
    code, output = run("export-onnx", "--bundle", str(tiny_bundle), "--out", str(folder))
    assert code == 0, output
    assert (folder / MANIFEST).is_file()


def test_first_use_exports_into_the_cache_and_the_second_reads_it(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    place = GraphPlace(cache=tmp_path)
    assert local(tiny_bundle, place).provenance.backend == "onnx-cpu"
    (manifest,) = (tmp_path / "onnx").rglob(MANIFEST)
    written = manifest.stat().st_mtime_ns
    local(tiny_bundle, place)
    assert manifest.stat().st_mtime_ns == written
    assert list((tmp_path / "onnx").iterdir()) == [manifest.parent]


def test_a_graph_of_another_bundle_is_refused(
    tiny_bundle: Path, graph: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_bundle, tmp_path / "other"))
    text = (other / "bundle.yaml").read_text()
    (other / "bundle.yaml").write_text(text.replace("name: tiny", "name: other"))
    with pytest.raises(SettingsError, match="onnx: .*bundle_digest is .* expected .*export it"):
        local(other, GraphPlace(cache=tmp_path, folder=graph))
    with pytest.raises(SettingsError, match="found float32 weights in .*expected dtype int8"):
        local(tiny_bundle, GraphPlace(cache=tmp_path, folder=graph), "int8")
    with pytest.raises(SettingsError, match=f"backend: onnx: .*{MANIFEST}: cannot be read"):
        local(tiny_bundle, GraphPlace(cache=tmp_path, folder=tmp_path / "nowhere"))


def test_the_command_prints_its_manifest_and_refuses_a_taken_folder(
    tiny_bundle: Path, graph: Path, tmp_path: Path
) -> None:
    manifest: Manifest = read_manifest(graph)
    assert set(manifest.identity) == {"bundle_digest", "model_digest", "sae_monitor"}
    code, output = run("export-onnx", "--bundle", str(tiny_bundle), "--out", str(graph))
    assert code == 2
    assert "found something there" in " ".join(output.split())
    line = ("score", "--bundle", str(tiny_bundle), "--text", RISKY, "--json")
    code, output = run(*line, "--backend", "onnx", "--onnx", str(graph))
    assert code == 0, output
    assert json.loads(output.splitlines()[-1])["verdict"] == "alert"
    code, output = run(*line, "--onnx", str(graph))
    assert code == 2
    assert "expected backend onnx" in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dtype": "int8"}, "dtype: found 'int8' with backend torch"),
        ({"backend": "onnx", "dtype": "bfloat16"}, "with backend onnx, expected float32 or int8"),
        ({"onnx": Path("graph")}, "onnx: found graph with backend torch, expected backend onnx"),
    ],
)
def test_settings_that_no_backend_can_have_are_refused(
    flags: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(flags)


def test_the_environment_chooses_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEMONITOR_BACKEND", "onnx")
    monkeypatch.setenv("SAEMONITOR_ONNX", "some/graph")
    settings = load_settings()
    assert (settings.backend, settings.onnx) == ("onnx", Path("some/graph"))


def test_a_verdict_that_differs_is_told_with_its_numbers(tiny_bundle: Path, tmp_path: Path) -> None:
    served = load_local(tiny_bundle, model=None, cache=tmp_path)
    same = compare(served, served.scorer)
    assert same == Parity(n_texts=2, n_differing=0, first_differing="", largest_gap=0.0)
    louder = [replace(c, fusion_bias=c.fusion_bias + 100.0) for c in served.scorer.heads.clusters]
    heads = ClusterHeads(louder, served.scorer.heads.sae_ids)
    model = served.scorer.language_model
    differing = compare(served, Scorer(model, served.tokenizer, served.saes, heads))
    assert differing.n_differing == 2
    assert re.match(
        r"text 1: cluster danger is pass at -.*, alert at .* in float32", differing.first_differing
    )
    assert differing.largest_gap == pytest.approx(100.0, rel=1e-3)


def test_int8_is_admitted_only_where_it_decides_as_float32(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = load_bundle(tiny_bundle)
    found = find_model(bundle, override=None, cache=tmp_path)
    served = load_served(
        bundle,
        found.folder,
        found.digest,
        find_saes(bundle, cache=tmp_path),
        dtype="int8",
        graph=GraphPlace(cache=tmp_path),
    )
    assert (served.provenance.dtype, served.provenance.backend) == ("int8", "onnx-cpu")
    unfit = [one for one in check_fidelity(served, explain=False) if not one.fits]
    in_float32 = load_local(tiny_bundle, model=None, cache=tmp_path)
    parity = compare(served, in_float32.scorer)
    assert parity.largest_gap > 0
    if unfit or parity.n_differing:
        with pytest.raises(SettingsError, match="dtype: int8"):
            admit_quantized(served)
    else:
        admit_quantized(served)
