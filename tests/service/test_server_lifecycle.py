"""The server from its first line to its exit code."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from monitor.audit_log.verify import verify
from monitor.client import MonitorClient, RetryPolicy
from monitor.errors import (
    AuditError,
    BundleError,
    ModelStoreError,
    MonitorError,
    NotReadyError,
    SettingsError,
)
from monitor.records import Verdict

NO_RETRY = RetryPolicy(max_attempts=1)


def test_a_process_says_it_is_ready_serves_and_ends_with_0(
    serve_process: Any, tiny_bundle: Path, tmp_path: Path
) -> None:
    config = tmp_path / "monitor.yaml"
    config.write_text("max_streams: 7\nmax_step_tokens: 99\n")
    with serve_process(
        *(tiny_bundle, tmp_path, "--config", str(config), "--grace-seconds", "60"),
        SAEMONITOR_MAX_STREAMS="5",
    ) as server:
        ready = server.ready()
        assert set(ready) == {"listen", "ops_listen", "bundle", "ready_seconds"}
        assert ready["bundle"] == "tiny@1"
        assert ready["ready_seconds"] > 0
        with MonitorClient(ready["listen"], timeout_seconds=60, retry=NO_RETRY) as client:
            assert client.info().limits.max_streams == 5
            assert client.score(text="the attack").verdict is Verdict.ALERT
            with client.stream() as stream:
                stream.send(text="please tell me about the attack")
                stream.flush()
                next(iter(stream))
                server.process.send_signal(signal.SIGTERM)
                for _ in stream:
                    pass
                with pytest.raises(NotReadyError, match="draining"):
                    stream.send(text="more")
                summary = stream.finish()
        assert summary.verdict is Verdict.ALERT
        code, out, err = server.end()
    assert code == 0, err
    assert out == ""
    events = [json.loads(line) for line in err.splitlines()]
    assert [e["event"] for e in events if e["event"] in ("ready", "stopping", "stopped")] == [
        *("ready", "stopping", "stopped")
    ]
    (how,) = [e for e in events if e["event"] == "computes_by"]
    parts = {"backend": "torch-cpu", "products": "torch", "attention": "torch", "rows": "torch"}
    assert parts.items() <= how.items()  # a tiny model is not worth anything else
    assert "attack" not in err
    # server_start, two decisions, the stream's alert, server_stop
    assert verify(server.audit).records == 5


def test_a_killed_server_has_every_alert_that_it_answered(
    serve_process: Any, tiny_bundle: Path, tmp_path: Path
) -> None:
    with serve_process(tiny_bundle, tmp_path) as server:
        ready = server.ready()
        with MonitorClient(ready["listen"], timeout_seconds=60, retry=NO_RETRY) as client:
            answered = [client.score(text="an attack").sequence for _ in range(5)]
        server.process.kill()
        server.end()
    assert None not in answered
    assert verify(server.audit).records >= max(number for number in answered if number)


@pytest.mark.parametrize("case", ["bundle", "port"])
def test_a_process_that_cannot_start_says_so_in_one_line(
    serve_process: Any, tiny_bundle: Path, tmp_path: Path, case: str
) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    bundle = tmp_path / "none" if case == "bundle" else tiny_bundle
    flags = () if case == "bundle" else ("--listen", f"127.0.0.1:{port}")
    expected = {
        "bundle": "bundle: found no folder",
        "port": f"listen: 127.0.0.1:{port} is in use",
    }[case]
    with taken, serve_process(bundle, tmp_path, *flags) as server:
        code, out, err = server.end()
    assert code == 2
    assert out == ""
    (line,) = err.splitlines()
    assert expected in line


def changed(bundle: Path, folder: Path, **changes: Any) -> Path:
    copy = folder / "changed"
    shutil.copytree(bundle, copy)
    spec = yaml.safe_load((copy / "bundle.yaml").read_text())
    (copy / "bundle.yaml").write_text(yaml.safe_dump({**spec, **changes}))
    return copy


def failure(serve: Any, *args: Any, **settings: Any) -> MonitorError:
    with pytest.raises(MonitorError) as caught, serve(*args, **settings):
        pass
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_damaged_bundle_is_refused_by_file_and_key(
    serve: Any, tiny_bundle: Path, tmp_path: Path
) -> None:
    error = failure(serve, changed(tiny_bundle, tmp_path, surprise=1))
    assert isinstance(error, BundleError)
    assert "surprise" in str(error)


def test_an_sae_of_another_width_is_refused(serve: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = changed(tiny_bundle, tmp_path)
    folder = bundle / "saes" / "l1"
    weights = load_file(folder / "sae_weights.safetensors")
    wide = {
        "W_enc": np.vstack([weights["W_enc"], weights["W_enc"][:1]]),
        "W_dec": np.hstack([weights["W_dec"], weights["W_dec"][:, :1]]),
        "b_dec": np.append(weights["b_dec"], weights["b_dec"][:1]),
    }
    save_file(
        {k: np.ascontiguousarray(v) for k, v in {**weights, **wide}.items()},
        folder / "sae_weights.safetensors",
    )
    config = json.loads((folder / "cfg.json").read_text())
    config["d_in"] += 1
    (folder / "cfg.json").write_text(json.dumps(config))
    error = failure(serve, bundle)
    assert isinstance(error, BundleError)
    assert "d_in" in str(error)
    assert "blocks.1.hook_resid_post is 32 wide" in str(error)


def test_a_model_folder_that_is_none_is_refused(serve: Any, tmp_path: Path) -> None:
    error = failure(serve, model=tmp_path)
    assert isinstance(error, ModelStoreError)
    assert str(tmp_path) in str(error)


def test_an_audit_log_that_cannot_be_opened_is_refused(serve: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    error = failure(serve, audit=f"sqlite:///{tmp_path}/file/audit.db")
    assert isinstance(error, AuditError)


def test_a_key_file_that_cannot_be_read_is_refused(serve: Any, tmp_path: Path) -> None:
    error = failure(serve, audit_hash_key_file=tmp_path / "no-key")
    assert isinstance(error, SettingsError)
    assert "no-key" in str(error)


@pytest.mark.parametrize("setting", ["listen", "ops_listen"])
def test_a_port_in_use_is_refused(serve: Any, setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        error = failure(serve, **{setting: (address,) if setting == "listen" else address})
    assert isinstance(error, SettingsError)
    assert str(error) == f"{setting}: {address} is in use, expected a free address"


def test_a_start_that_fails_lets_go_of_what_it_took(serve: Any, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    failure(serve, model=tmp_path, listen=(address,))
    with serve(listen=(address,)) as server, server.client() as client:
        assert client.health()


def test_two_servers_cannot_share_an_audit_log(serve: Any) -> None:
    with serve():
        assert isinstance(failure(serve), AuditError)


def test_a_socket_left_by_a_dead_server_is_replaced_and_a_live_one_is_not(
    serve: Any, tmp_path: Path
) -> None:
    path = tmp_path / "m.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert path.is_socket()
    with serve(listen=(f"unix:{path}",)) as server, server.client() as client:
        assert client.health()
        error = failure(serve, listen=(f"unix:{path}",))
        assert str(error) == f"listen: unix:{path} is in use, expected a free address"
        assert client.health()


@pytest.mark.parametrize(
    ("name", "message"),
    [("file", "found a file that is no socket at"), ("no/such/m.sock", "found no folder")],
)
def test_a_path_that_cannot_be_a_socket_is_refused(
    serve: Any, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "file").write_text("")
    error = failure(serve, listen=(f"unix:{tmp_path / name}",))
    assert isinstance(error, SettingsError)
    assert message in str(error)


def held_request(server: Any, client: MonitorClient) -> tuple[Any, Any, list[Any]]:
    """A request that waits in the engine until the event is set; its thread, and its answer."""
    engine = server.server.pipeline.engine
    score, answers = engine.score, []
    reached, release = threading.Event(), asyncio.Event()

    async def held(*args: Any, **named: Any) -> Any:
        reached.set()
        await release.wait()
        return await score(*args, **named)

    def ask() -> None:
        try:
            answers.append(client.score(text="the attack"))
        except MonitorError as error:
            answers.append(error)

    engine.score = held
    asking = threading.Thread(target=ask)
    asking.start()
    assert reached.wait(60)
    return release, asking, answers


def test_requests_in_progress_finish_within_the_grace(serve: Any) -> None:
    with serve() as server, server.client() as client:
        release, asking, answers = held_request(server, client)
        stopping = server.start(server.server.stop(60.0))
        server.run(release.set)
        asking.join()
        stopping.result(timeout=60)
    assert answers[0].verdict is Verdict.ALERT


def test_requests_that_outlast_the_grace_are_cut_off(serve: Any) -> None:
    with serve() as server, server.client() as client:
        _, asking, answers = held_request(server, client)
        server.start(server.server.stop(0.1)).result(timeout=60)
        asking.join()
    assert isinstance(answers[0], MonitorError)


def test_the_grace_can_be_cut_short(serve: Any) -> None:
    """What the process does at a second signal."""
    with serve() as server, server.client() as client:
        _, asking, answers = held_request(server, client)
        stopping = server.start(server.server.stop(3600.0))
        server.run(server.server.hurry)
        stopping.result(timeout=60)
        asking.join()
    assert isinstance(answers[0], MonitorError)
