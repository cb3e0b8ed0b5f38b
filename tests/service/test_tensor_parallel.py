"""A server whose model is split over two processes, up to the death of one."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from monitor.client import MonitorClient
from monitor.errors import ModelStoreError, NotReadyError
from monitor.records import Verdict
from monitor.testing import write_tiny_bundle

TEXTS = ("please tell me how to bake bread", "the danger of an attack", "attack")


def reasons(server: Any, path: str) -> dict[str, str]:
    try:
        with urllib.request.urlopen(f"http://{server.ready.ops_listen}{path}", timeout=30) as reply:
            answer = json.loads(reply.read())
    except urllib.error.HTTPError as refused:
        with refused:
            answer = json.loads(refused.read())
    return {c["component"]: c["reason"] for c in answer["components"] if not c["ready"]}


def test_it_scores_as_one_process_does_and_says_when_a_rank_has_died(
    client: MonitorClient, serve: Any
) -> None:
    with serve(tensor_parallel=2) as server, server.client() as split_client:
        assert split_client.info().provenance.backend == "torch-cpu-tp2"
        for text in TEXTS:
            expected, found = client.score(text=text), split_client.score(text=text)
            assert found.verdict is expected.verdict
            for a, b in zip(found.clusters, expected.clusters, strict=True):
                assert a.fused == pytest.approx(b.fused, rel=1e-5, abs=1e-5)
        with split_client.stream() as stream:
            for word in ("bread", " and", " an attack"):
                stream.send(text=word)
            assert stream.finish().verdict is Verdict.ALERT
        assert reasons(server, "/readyz") == {}
        [other] = multiprocessing.active_children()
        other.kill()
        while split_client.health():
            time.sleep(0.01)
        why = "rank 1 of 2 ended with exit code -9"
        assert reasons(server, "/readyz") == {"model": why}
        assert reasons(server, "/livez") == {"engine": why}
        with pytest.raises(NotReadyError, match=f"{why}, .* started again"):
            split_client.score(text="bread")
    assert not multiprocessing.active_children()


def test_a_model_that_cannot_be_split_ends_the_start(serve: Any, tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "gpt2", "gpt2")
    with (
        pytest.raises(ModelStoreError, match="found a gpt2 model, for which transformers has no"),
        serve(bundle=bundle, tensor_parallel=2),
    ):
        pass
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("ending", ["everybody is told to stop", "the server is killed"])
def test_no_process_outlives_the_server(tiny_bundle: Path, tmp_path: Path, ending: str) -> None:
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "monitor", "serve", "--bundle", str(tiny_bundle)),
            *("--listen", "127.0.0.1:0", "--ops-listen", "off", "--device", "cpu"),
            *("--tensor-parallel", "2", "--audit", f"sqlite:///{tmp_path / 'audit.db'}"),
        ],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    group = server.pid
    try:
        assert server.stdout is not None
        ready = json.loads(server.stdout.readline())
        with MonitorClient(ready["listen"], timeout_seconds=60) as client:
            assert client.score(text="an attack").verdict is Verdict.ALERT
        if ending == "the server is killed":
            server.kill()
            assert server.wait(60) == -signal.SIGKILL
        else:
            os.killpg(group, signal.SIGTERM)
            assert server.wait(60) == 0
        # Every process of the server has this pipe's other end: it closes with the last one.
        assert server.stdout.read() == ""
    finally:
        if server.poll() is None:
            os.killpg(group, signal.SIGKILL)
        server.communicate()
