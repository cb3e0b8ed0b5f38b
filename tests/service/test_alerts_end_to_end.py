"""A risky request, all the way to a pager: real server, real Prometheus, real Alertmanager.

The shipped rules and samples are used as they are, but for addresses and for waiting times.
"""

from __future__ import annotations

import http.client
import json
import queue
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from monitor.audit_log.query import query
from monitor.audit_log.verify import verify
from monitor.client import MonitorClient
from monitor.records import Verdict

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "deploy" / "prometheus"
PATIENCE_SECONDS = 120.0
"""For any one step, on a machine that does other things as well."""

Found = TypeVar("Found")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def eventually(what: str, look: Callable[[], Found | None]) -> Found:
    """What `look` finds, once it finds anything."""
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up_at:
        found = look()
        if found:
            return found
        time.sleep(0.1)
    pytest.fail(f"waited {PATIENCE_SECONDS:g} s for {what}")


@contextmanager
def process(
    name: str, command: Sequence[str | Path], folder: Path
) -> Iterator[subprocess.Popen[str]]:
    """A program that logs into `folder` and is ended with the context."""
    with (folder / f"{name}.log").open("w", encoding="utf-8") as log:
        started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield started
        finally:
            started.terminate()
            try:
                started.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                started.kill()
                started.communicate()


class Webhook:
    """What Alertmanager notifies; keeps every alert it is told of."""

    def __init__(self) -> None:
        self.alerts: queue.Queue[dict[str, Any]] = queue.Queue()
        received = self.alerts

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                for alert in json.loads(body)["alerts"]:
                    received.put(alert)
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/alerts"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> Webhook:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def wait_for(self, name: str, **labels: str) -> dict[str, Any]:
        """The next firing alert of this name that has these labels."""

        def look() -> dict[str, Any] | None:
            while not self.alerts.empty():
                alert = self.alerts.get()
                found = alert["labels"]
                if (
                    alert["status"] == "firing"
                    and found["alertname"] == name
                    and labels.items() <= found.items()
                ):
                    return dict(alert)
            return None

        return eventually(f"{name} with {labels} at the webhook", look)


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus, asked over HTTP."""

    port: int

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant query; none while Prometheus is not up."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", f"/api/v1/query?query={urllib.parse.quote(expression)}")
            response = connection.getresponse()
            content = response.read()
            return list(json.loads(content)["data"]["result"]) if response.status == 200 else []
        except OSError:
            return []
        finally:
            connection.close()


def write_alertmanager_config(folder: Path, webhook: str) -> Path:
    config = yaml.safe_load((SHIPPED / "alertmanager.yml").read_text(encoding="utf-8"))
    config["receivers"][0]["webhook_configs"][0]["url"] = webhook
    for route in (config["route"], *config["route"]["routes"]):
        route["group_wait"] = "1s"
    config["route"]["group_interval"] = "1s"
    path = folder / "alertmanager.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def write_prometheus_config(folder: Path, target: str, alertmanager: str) -> Path:
    config = yaml.safe_load((SHIPPED / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [alertmanager]
    for name in config["rule_files"]:
        rules = (SHIPPED / name).read_text(encoding="utf-8")
        rules = re.sub(r"^( *for:) .*$", r"\1 1s", rules, flags=re.MULTILINE)
        (folder / name).write_text(rules, encoding="utf-8")
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Watched:
    """A server under the shipped rules, and where their alerts arrive."""

    server: subprocess.Popen[str]
    client: MonitorClient
    prometheus: Prometheus
    webhook: Webhook
    audit_url: str


@contextmanager
def watched(
    bundle: Path, prometheus_binary: Path, alertmanager_binary: Path, folder: Path, *flags: str
) -> Iterator[Watched]:
    """Server, Prometheus, Alertmanager and webhook, each a process or thread of its own."""
    audit_url = f"sqlite:///{folder / 'audit.db'}"
    alertmanager_port = free_port()
    prometheus = Prometheus(free_port())
    with ExitStack() as stack:
        webhook = stack.enter_context(Webhook())
        serve = [sys.executable, "-m", "monitor", "serve", "--bundle", str(bundle), *flags]
        serve += ["--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0", "--audit", audit_url]
        server = stack.enter_context(process("server", serve, folder))
        assert server.stdout is not None
        first_line = server.stdout.readline()
        assert first_line, (folder / "server.log").read_text(encoding="utf-8")
        ready = json.loads(first_line)
        config = write_alertmanager_config(folder, webhook.url)
        stack.enter_context(
            process(
                "alertmanager",
                [
                    alertmanager_binary,
                    f"--config.file={config}",
                    f"--storage.path={folder / 'alertmanager'}",
                    f"--web.listen-address=127.0.0.1:{alertmanager_port}",
                    "--cluster.listen-address=",
                ],
                folder,
            )
        )
        config = write_prometheus_config(
            folder, ready["ops_listen"], f"127.0.0.1:{alertmanager_port}"
        )
        stack.enter_context(
            process(
                "prometheus",
                [
                    prometheus_binary,
                    f"--config.file={config}",
                    f"--storage.tsdb.path={folder / 'prometheus'}",
                    f"--web.listen-address=127.0.0.1:{prometheus.port}",
                ],
                folder,
            )
        )
        client = stack.enter_context(MonitorClient(ready["listen"]))
        yield Watched(server, client, prometheus, webhook, audit_url)


@pytest.mark.timeout(600)
def test_a_risky_request_reaches_the_webhook_with_cluster_and_severity(
    tiny_bundle: Path, prometheus_binary: Path, alertmanager_binary: Path, tmp_path: Path
) -> None:
    with watched(tiny_bundle, prometheus_binary, alertmanager_binary, tmp_path) as all_of_it:
        client, prometheus, webhook = all_of_it.client, all_of_it.prometheus, all_of_it.webhook

        benign = client.score(text="please tell me how to bake bread", timeout=60)
        assert benign.verdict is Verdict.PASS
        eventually(
            "a scrape that shows the benign request",
            lambda: prometheus.ask('sum(saemonitor_requests_total{outcome="ok"}) == 1'),
        )
        alerts_so_far = 'saemonitor_alerts_total{cluster="danger",stage="prompt"}'
        eventually("the alert counter at 0", lambda: prometheus.ask(f"{alerts_so_far} == 0"))
        assert not prometheus.ask('ALERTS{alertname="SaeMonitorRiskClusterFiring"}')

        risky = client.score(text="please tell me how to attack the bread", timeout=60)
        assert risky.verdict is Verdict.ALERT
        alert = webhook.wait_for("SaeMonitorRiskClusterFiring")
        assert alert["labels"]["cluster"] == "danger"
        assert alert["labels"]["severity"] == "critical"
        assert alert["labels"]["model"] == "tiny/gemma3"
        assert alert["annotations"]["summary"] == "tiny/gemma3 shows danger"
        assert "#saemonitorriskclusterfiring" in alert["annotations"]["runbook_url"]

        all_of_it.server.terminate()
        assert all_of_it.server.wait(timeout=60) == 0
        webhook.wait_for("SaeMonitorDown", scope="job", severity="critical")

    assert verify(all_of_it.audit_url).records == 4  # start, two decisions, stop
    (record,) = query(all_of_it.audit_url, verdict=Verdict.ALERT)
    assert record["decision_id"] == risky.decision_id
    assert record["sequence"] == risky.sequence
    assert record["alerts"][0]["cluster"] == "danger"


@pytest.mark.timeout(600)
def test_a_head_that_broke_pages_without_any_traffic(
    tiny_bundle: Path, prometheus_binary: Path, alertmanager_binary: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    canary = {"id": "risky", "text": "attack", "verdict": "alert", "cluster": "danger"}
    (bundle / "canaries.jsonl").write_text(json.dumps(canary) + "\n")
    tensors = load_file(bundle / "heads.safetensors")
    tensors["dense/danger/weight"] = np.zeros_like(tensors["dense/danger/weight"])
    save_file(tensors, bundle / "heads.safetensors")
    with watched(bundle, prometheus_binary, alertmanager_binary, tmp_path) as all_of_it:
        alert = all_of_it.webhook.wait_for("SaeMonitorCanaryFailing", severity="critical")
        assert alert["labels"]["cluster"] == "danger"
        all_of_it.webhook.wait_for("SaeMonitorClusterStale", cluster="danger", severity="warning")
        assert not all_of_it.prometheus.ask("sum(saemonitor_requests_total) > 0")
