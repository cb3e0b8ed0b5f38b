"""Two servers on one machine, as real processes: neither disturbs the other, one replaces it."""

from __future__ import annotations

import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from monitor.audit_log.query import query
from monitor.audit_log.verify import verify
from monitor.client import MonitorClient, RetryPolicy
from monitor.errors import NotReadyError
from monitor.records import Decision, Verdict

NO_RETRY = RetryPolicy(max_attempts=1)
RISKY = "what is the weather like today and please tell me about the attack in the north"

Start = Callable[..., Any]


@pytest.fixture
def start(serve_process: Any, tiny_bundle: Path, tmp_path: Path) -> Iterator[Start]:
    """`start("name", flags...)`: a process with a folder of that name for its audit log."""
    with ExitStack() as stack:

        def start_one(name: str, *flags: str) -> Any:
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            return stack.enter_context(serve_process(tiny_bundle, folder, *flags))

        yield start_one


def scored(ready: dict[str, Any]) -> float:
    with urllib.request.urlopen(f"http://{ready['ops_listen']}/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    name = "saemonitor_tokens_scored_total{"
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def client_of(*servers: dict[str, Any], **options: Any) -> MonitorClient:
    target = "ipv4:" + ",".join(ready["listen"] for ready in servers)
    return MonitorClient(target, timeout_seconds=60, **{"retry": NO_RETRY, **options})


def test_two_servers_do_not_disturb_each_other(start: Start) -> None:
    processes = start("one"), start("two")
    one, two = (process.ready() for process in processes)
    with client_of(one) as first, client_of(two) as second:
        assert first.score(text=RISKY).sequence == second.score(text=RISKY).sequence
        second.score(text=RISKY)
        assert scored(two) == 2 * scored(one) > 0
        processes[0].process.kill()
        assert second.score(text=RISKY).verdict is Verdict.ALERT
        assert second.health()
    code, _, err = processes[1].stop()
    assert code == 0, err
    processes[0].end()
    assert verify(processes[1].audit).records == 5  # start, three decisions, stop
    assert verify(processes[0].audit).records >= 2


def test_a_second_server_on_the_same_audit_log_is_told_so(start: Start) -> None:
    first = start("shared")
    with client_of(first.ready()) as client:
        code, out, err = start("shared").end()
        assert (code, out) == (2, "")
        (line,) = err.splitlines()
        assert f"is being written by process {first.process.pid}" in line
        assert "each server needs a log of its own" in line
        assert client.score(text=RISKY).sequence is not None
    assert first.stop()[0] == 0
    assert verify(first.audit).records == 3


def test_a_stream_moves_on_when_its_server_is_killed(start: Start) -> None:
    doomed, other = start("doomed"), start("other")
    with client_of(doomed.ready(), other.ready(), retry=RetryPolicy(max_attempts=20)) as client:
        with client.stream(session_id="mine", resumable=True) as stream:
            stream.send(text=RISKY[:50])
            stream.flush()
            assert next(iter(stream)).processed_index > 0
            doomed.process.kill()
            stream.send(text=RISKY[50:])
            decision = stream.finish()
        assert (stream.n_resumed, stream.n_restarted) == (0, 1)
        assert decision.verdict is Verdict.ALERT
        assert decision.session_id == "mine"
    assert other.stop()[0] == 0
    (record,) = query(other.audit)
    assert record["decision_id"] == decision.decision_id


def test_health_goes_first_and_open_streams_end_on_record_when_a_server_drains(
    start: Start,
) -> None:
    server = start("draining", "--grace-seconds", "60")
    ready = server.ready()
    with client_of(ready) as client, grpc.insecure_channel(ready["listen"]) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        with ExitStack() as open_streams:
            streams = [
                open_streams.enter_context(client.stream(session_id=f"s{i}", resumable=i == 0))
                for i in range(3)
            ]
            for stream in streams:
                stream.send(text=RISKY)
                stream.flush()
                assert next(iter(stream)).processed_index > 0  # so the server has read it
            server.process.send_signal(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(NotReadyError):
                client.score(text="bread")
            decisions: list[Decision] = []
            finishing = threading.Thread(
                target=lambda: decisions.extend(stream.finish() for stream in streams)
            )
            finishing.start()
            finishing.join()
        watch.cancel()
        code, _, err = server.end()
    assert code == 0, err
    assert [decision.verdict for decision in decisions] == [Verdict.ALERT] * 3
    assert {record["session_id"] for record in query(server.audit)} == {"s0", "s1", "s2"}
    verify(server.audit)
