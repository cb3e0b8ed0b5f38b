"""Canaries through a real server: what breaks is noticed, told everywhere, and counted nowhere."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from monitor.audit_log.query import query
from monitor.audit_log.record import RecordKind
from monitor.audit_log.verify import verify
from monitor.bundle_canaries import write_canaries
from monitor.canary_spec import EXPECTED
from monitor.cli.app import app
from monitor.local import load_local
from monitor.records import Verdict

LONG = "danger " + "please tell me how to bake bread and what the weather is like today " * 8
"""Several blocks of a prefix, with the word that alerts in the first."""
CANARIES = (
    {"id": "risky", "text": "the danger of the attack", "verdict": "alert", "cluster": "danger"},
    {"id": "long", "text": LONG, "verdict": "alert", "cluster": "danger"},
    {"id": "answer", "text": "bread", "stage": "completion", "verdict": "pass"},
    {"id": "calm", "text": "what is the weather like today in the north", "verdict": "pass"},
)
NEVER = 3600.0
"""Seconds; the runs after the first are the tests'."""


@pytest.fixture(scope="module")
def watched(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with canaries, measured; do not write to it."""
    folder = tmp_path_factory.mktemp("watched") / "bundle"
    shutil.copytree(tiny_bundle, folder)
    lines = "".join(json.dumps(row) + "\n" for row in CANARIES)
    (folder / "canaries.jsonl").write_text(lines)
    served = load_local(folder, model=None, cache=folder.parent)
    done = asyncio.run(write_canaries(served, ()))
    assert not done.refused, done.problems
    return folder


def with_head(folder: Path, change: Callable[[Any], Any]) -> None:
    tensors = load_file(folder / "heads.safetensors")
    tensors["dense/danger/weight"] = change(tensors["dense/danger/weight"])
    save_file(tensors, folder / "heads.safetensors")


def with_sae(folder: Path, **changes: Callable[[Any], Any]) -> None:
    path = folder / "saes/l1/sae_weights.safetensors"
    tensors = load_file(path)
    for name, change in changes.items():
        tensors[name] = np.ascontiguousarray(change(tensors[name]))
    save_file(tensors, path)


def silenced(latent: int) -> Callable[[Any], Any]:
    def change(W_enc: Any) -> Any:
        W_enc = W_enc.copy()
        W_enc[:, latent] = 0
        return W_enc

    return change


def loudest_latent(folder: Path) -> int:
    """The registered latent of `quiet` that the canaries make fire most often."""
    latents = json.loads((folder / EXPECTED).read_text())["latents"]["l1"]
    return max(range(1, 6), key=lambda i: latents[str(i)]["firings"])


def run_canaries(server: Any) -> bool:
    return bool(server.call(server.server.liveness.canaries.run()))


def passed(server: Any, cluster: str) -> float:
    return float(server.value("saemonitor_canary_passed", model="tiny/gemma3", cluster=cluster))


def test_canaries_pass_and_are_no_traffic(watched: Path, tmp_path: Path, serve: Any) -> None:
    with serve(watched, canary_seconds=NEVER) as server:
        assert run_canaries(server)
        assert passed(server, "danger") == passed(server, "quiet") == 1
        labels = {"model": "tiny/gemma3"}
        assert server.value("saemonitor_canary_last_run_timestamp_seconds", **labels) > 1e9
        assert server.value("saemonitor_canary_interval_seconds", **labels) == NEVER
        page = server.run(lambda: server.server.metrics.render().body.decode())
        counted = [
            float(line.rpartition(" ")[2])
            for line in page.splitlines()
            if line.startswith(
                ("saemonitor_tokens_", "saemonitor_requests_", "saemonitor_alerts_total")
                + ("saemonitor_verdicts_total", "saemonitor_cluster_score_count")
            )
            and not line.startswith("saemonitor_requests_in_flight")
        ]
        assert counted
        assert not any(counted)
        with server.client() as client:
            assert client.info().stale_clusters == ()
    assert verify(f"sqlite:///{tmp_path / 'audit.db'}").records == 2  # start and stop


BREAKS: dict[str, Callable[[Path], None]] = {
    "a broken head": lambda folder: with_head(folder, np.zeros_like),
    "a swapped SAE": lambda folder: with_sae(folder, W_enc=lambda W: W[:, ::-1]),
}


@pytest.mark.parametrize("what", BREAKS)
def test_what_breaks_is_noticed_and_told_everywhere(
    watched: Path, tmp_path: Path, serve: Any, what: str
) -> None:
    bundle = Path(shutil.copytree(watched, tmp_path / "broken"))
    BREAKS[what](bundle)
    with serve(bundle, canary_seconds=NEVER, fidelity="off") as server, server.client() as client:
        assert run_canaries(server)
        assert passed(server, "danger") == 0
        labels = {"model": "tiny/gemma3", "cluster": "danger"}
        assert server.value("saemonitor_canary_failures_total", **labels) >= 1
        assert server.value("saemonitor_cluster_stale", **labels) == 1
        assert server.value("saemonitor_canary_score_deviation", **labels) > 1
        assert "danger" in client.info().stale_clusters
        (reason,) = client.cluster("danger").stale_reasons
        assert reason.startswith("canary: ")
        result = client.score(text="hello").clusters[0]
        assert result.stale
        assert client.health()  # readiness is not asked to care
    (record,) = (
        r
        for r in query(f"sqlite:///{tmp_path / 'audit.db'}", kind=RecordKind.CLUSTER_STALE)
        if r["cluster"] == "danger"
    )
    assert record["stale"] is True
    assert record["reasons"] == [reason]


def test_a_silent_latent_is_noticed_where_no_score_shows_it(
    watched: Path, tmp_path: Path, serve: Any
) -> None:
    bundle = Path(shutil.copytree(watched, tmp_path / "bundle"))
    latent = loudest_latent(bundle)
    spec = yaml.safe_load((bundle / "bundle.yaml").read_text())
    spec["clusters"][1]["latents"] = [{"sae": "l1", "id": latent, "weight": 1e-9}]
    (bundle / "bundle.yaml").write_text(yaml.safe_dump(spec))
    served = load_local(bundle, model=None, cache=tmp_path)
    assert not asyncio.run(write_canaries(served, ())).refused
    with serve(bundle, canary_seconds=NEVER) as server:
        assert run_canaries(server)
        assert passed(server, "quiet") == 1
    with_sae(
        bundle, W_enc=silenced(latent), b_enc=lambda b: np.where(np.arange(len(b)) == latent, -1, b)
    )
    with serve(bundle, canary_seconds=NEVER, fidelity="off") as server, server.client() as client:
        assert run_canaries(server)
        assert passed(server, "quiet") == 0
        assert passed(server, "danger") == 1
        (reason,) = client.cluster("quiet").stale_reasons
        assert reason.startswith(f"canary: latent {latent} of SAE l1 has 0 in all")


def test_damage_in_memory_is_noticed_whatever_traffic_left_and_mends(
    watched: Path, tmp_path: Path, serve: Any
) -> None:
    with serve(watched, canary_seconds=NEVER) as server, server.client() as client:
        assert client.score(text=LONG).verdict is Verdict.ALERT  # its blocks are kept from now on
        assert run_canaries(server)
        head = server.server.pipeline.served.scorer.heads._dense[0].weight
        kept = head.clone()
        with torch.inference_mode():
            head.zero_()
        assert run_canaries(server)
        assert passed(server, "danger") == 0
        problems = server.server.liveness.canaries.failed["danger"].problems
        assert any(problem.startswith("long gets pass") for problem in problems)
        with torch.inference_mode():
            head.copy_(kept)
        assert run_canaries(server)
        assert passed(server, "danger") == 1
        assert client.cluster("danger").stale_reasons == ()
        assert not client.score(text="hello").clusters[0].stale
    changes = [
        r["stale"]
        for r in query(f"sqlite:///{tmp_path / 'audit.db'}", kind=RecordKind.CLUSTER_STALE)
        if r["cluster"] == "danger"
    ]
    assert changes == [True, False]


def test_readiness_waits_for_the_canaries_where_it_is_told_to(
    watched: Path, tmp_path: Path, serve: Any
) -> None:
    bundle = Path(shutil.copytree(watched, tmp_path / "broken"))
    with_head(bundle, np.zeros_like)
    with (
        serve(bundle, canary_seconds=NEVER, canary_readiness=True, fidelity="off") as server,
        server.client() as client,
    ):
        assert run_canaries(server)
        states = {s.component: s for s in server.run(server.server.components)}
        assert not states["canaries"].ready
        assert states["canaries"].reason.startswith("danger: ")
        server.call(server.server._tell())
        assert not client.health()


def test_measuring_refuses_a_canary_without_its_verdict(watched: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(watched, tmp_path / "bundle"))
    row = {"id": "wrong", "text": "bread", "verdict": "alert", "cluster": "danger"}
    (bundle / "canaries.jsonl").write_text(json.dumps(row) + "\n")
    before = (bundle / EXPECTED).read_bytes()
    served = load_local(bundle, model=None, cache=tmp_path)
    done = asyncio.run(write_canaries(served, ()))
    assert done.refused
    assert done.problems[0].startswith("cluster danger: wrong gets pass at ")
    assert (bundle / EXPECTED).read_bytes() == before
    assert not asyncio.run(write_canaries(served, (), force=True)).refused
    assert (bundle / EXPECTED).read_bytes() != before


def test_check_runs_the_canaries_too(watched: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bundle", "check", str(watched)])
    assert result.exit_code == 0, result.output
    assert "no baseline: the bundle has no calibration artefact" in result.output
    bundle = Path(shutil.copytree(watched, tmp_path / "broken"))
    with_head(bundle, np.zeros_like)
    result = CliRunner().invoke(app, ["bundle", "check", str(bundle)])
    assert result.exit_code == 1
    assert "canaries: cluster danger: risky gets pass" in result.output


def test_canaries_are_picked_from_labelled_texts(
    tiny_bundle: Path, tmp_path: Path, serve: Any
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    rows = [
        {"text": "a great danger", "label": "harmful", "category": "danger"},
        {"text": "bread and weather", "label": "harmful", "category": "danger"},
        {"text": "please bake bread", "label": "benign"},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = CliRunner().invoke(
        app, ["bundle", "measure", str(bundle), "--force", "--canary-data", str(data)]
    )
    assert result.exit_code == 0, result.output
    assert "cluster quiet: no canary has to raise it" in " ".join(result.output.split())
    found = [json.loads(line) for line in (bundle / "canaries.jsonl").read_text().splitlines()]
    assert [(c["text"], c["verdict"]) for c in found] == [
        ("a great danger", "alert"),
        ("please bake bread", "pass"),
    ]
    with serve(bundle, canary_seconds=NEVER) as server:
        assert run_canaries(server)
        assert passed(server, "danger") == 1
