"""A server whose SAE does not fit stays up, is not ready, and says why everywhere."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from monitor.cli.app import app
from monitor.client import MonitorClient, RetryPolicy
from monitor.errors import BundleError, NotReadyError
from monitor.testing import HOOK_POINT
from sae_core.formats.saelens_writer import save_saelens
from sae_core.hook_points import parse_hook_point
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.tokenizer import load_tokenizer
from sae_core.probe_reader import ProbeReader
from sae_core.testing.principal import principal_sae
from sae_core.training.probes import PROBES

RIGHT = f"it fits {HOOK_POINT}"


@pytest.fixture(scope="module")
def fitted(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose SAE belongs where it reads, with bands that the command line wrote."""
    bundle = tmp_path_factory.mktemp("fitted") / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    shutil.rmtree(bundle / "fidelity")
    (bundle / "fidelity.jsonl").unlink()
    spec = yaml.safe_load((bundle / "bundle.yaml").read_text())
    folder, point = Path(spec["model"]["path"]), parse_hook_point(HOOK_POINT)
    model = load_language_model(folder, [point])
    reader = ProbeReader(model, lambda _: model, load_tokenizer(folder), PROBES)
    save_saelens(principal_sae(reader.read([HOOK_POINT], True)[HOOK_POINT]), bundle / "saes/l1")
    code, output = measure(bundle)
    assert code == 0, output
    return bundle


def measure(bundle: Path, *flags: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bundle", "measure", str(bundle), *flags])
    return result.exit_code, result.output


def check(bundle: Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bundle", "check", str(bundle)])
    return result.exit_code, " ".join(result.output.split())


def moved(bundle: Path, folder: Path, hook_point: str) -> Path:
    """The bundle with its SAE at another place; its heads stay."""
    copy = Path(shutil.copytree(bundle, folder / "moved"))
    spec = yaml.safe_load((copy / "bundle.yaml").read_text())
    spec["saes"]["l1"]["hook_point"] = hook_point
    (copy / "bundle.yaml").write_text(yaml.safe_dump(spec))
    return copy


def get(address: str, path: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=30) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, json.loads(refused.read())


def test_measured_bands_are_met_again(fitted: Path) -> None:
    assert json.loads((fitted / "fidelity/l1.json").read_text())["fvu"] < 0.5
    assert len((fitted / "fidelity.jsonl").read_text().splitlines()) == len(PROBES)
    code, output = check(fitted)
    assert code == 0
    assert "SAE l1 at blocks.1.hook_resid_post" in output
    assert "OUTSIDE" not in output


@pytest.mark.parametrize("place", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"])
def test_check_prints_what_is_off_and_what_was_tried(
    fitted: Path, tmp_path: Path, place: str
) -> None:
    code, output = check(moved(fitted, tmp_path, place))
    assert code == 1
    assert "OUTSIDE" in output
    assert RIGHT in output
    assert f"SAE l1 at {place}: FVU is" in output


def test_measuring_at_the_wrong_place_writes_nothing(fitted: Path, tmp_path: Path) -> None:
    bundle = moved(fitted, tmp_path, "blocks.0.hook_resid_post")
    before = (bundle / "fidelity/l1.json").read_bytes()
    code, output = measure(bundle)
    assert code == 1
    assert "at blocks.1.hook_resid_post, where it fits better" in " ".join(output.split())
    assert (bundle / "fidelity/l1.json").read_bytes() == before
    assert measure(bundle, "--force")[0] == 0
    assert (bundle / "fidelity/l1.json").read_bytes() != before


def test_a_sealed_bundle_is_not_measured(fitted: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(fitted, tmp_path / "sealed"))
    assert CliRunner().invoke(app, ["bundle", "seal", str(bundle)]).exit_code == 0
    code, output = measure(bundle)
    assert code == 2
    assert "found MANIFEST.json" in output


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def eventually(claim: Callable[[], bool]) -> bool:
    for _ in range(600):
        if claim():
            return True
        time.sleep(0.1)
    return False


def test_server_is_up_and_not_ready_and_says_why(fitted: Path, tmp_path: Path) -> None:
    bundle = moved(fitted, tmp_path, "blocks.0.hook_resid_post")
    ops, address = f"127.0.0.1:{free_port()}", f"unix:{tmp_path}/m.sock"
    command = [sys.executable, "-m", "monitor", "serve", "--bundle", str(bundle)]
    command += ["--listen", address, "--ops-listen", ops, "--audit", f"sqlite:///{tmp_path}/a.db"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def reason() -> str:
        try:
            code, answer = get(ops, "/readyz")
        except OSError:
            return ""
        assert code == 503
        return str({c["component"]: c["reason"] for c in answer["components"]}["sae"])

    try:
        assert eventually(lambda: RIGHT in reason())
        assert get(ops, "/livez")[0] == 200
        with urllib.request.urlopen(f"http://{ops}/metrics", timeout=30) as page:
            assert 'saemonitor_component_ready{component="sae"} 0.0' in page.read().decode()
        with MonitorClient(address, retry=RetryPolicy(max_attempts=1)) as client:
            assert not client.health()
            with pytest.raises(NotReadyError, match=RIGHT):
                client.score(text="hello")
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == ""
    assert RIGHT in err


def test_warn_serves_and_off_does_not_look(fitted: Path, tmp_path: Path, serve: Any) -> None:
    bundle = moved(fitted, tmp_path, "blocks.0.hook_resid_post")
    for fidelity in ("warn", "off"):
        with serve(bundle, fidelity=fidelity) as server, server.client() as client:
            assert client.score(text="hello").verdict


def test_score_refuses_too(fitted: Path, tmp_path: Path) -> None:
    bundle = moved(fitted, tmp_path, "blocks.0.hook_resid_post")
    command = [sys.executable, "-m", "monitor", "score", "--bundle", str(bundle), "--text", "hello"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stdout == ""
    assert RIGHT in result.stderr


def test_a_bundle_without_bands_is_refused_with_the_way_out(
    fitted: Path, tmp_path: Path, serve: Any
) -> None:
    bundle = Path(shutil.copytree(fitted, tmp_path / "bare"))
    shutil.rmtree(bundle / "fidelity")
    missing = r"found no fidelity/l1.json, .*bundle measure"
    with pytest.raises(BundleError, match=missing), serve(bundle):
        pass
    (bundle / "fidelity.jsonl").write_text('{"id": "x"}\n')
    malformed = "fidelity.jsonl: line 1: found .*, expected an object"
    with pytest.raises(BundleError, match=malformed), serve(bundle):
        pass
