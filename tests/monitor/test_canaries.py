"""What canaries.jsonl may say, and runs that the engine has no time for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from monitor.bundle import load_bundle
from monitor.canary_runner import CanaryWatch
from monitor.canary_spec import CANARIES, EXPECTED
from monitor.engine import Engine
from monitor.engine_steps import EngineResult
from monitor.errors import BundleError, DeadlineError, MonitorError, NotReadyError, QueueFullError
from monitor.inputs import InputReader
from monitor.local import load_local
from monitor.metrics import Metrics
from monitor.staleness import StaleBy, Staleness
from sae_core.scorer import Scorer


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"verdict": "maybe"}, "line 1: verdict: "),
        ({"text": ""}, "line 1: text: "),
        ({"cluster": "nobody"}, "line 1: cluster: found nobody, expected one of danger, quiet"),
        ({"cluster": None}, "line 1: cluster: found None, expected one with flag and alert"),
        ({"verdict": "pass"}, "line 1: cluster: found danger, expected one with flag and alert"),
        ({"note": "x"}, "line 1: note: "),
    ],
)
def test_a_line_that_is_no_canary_is_named(
    bundle: Path, changes: dict[str, Any], said: str
) -> None:
    row = {"id": "a", "text": "danger", "verdict": "alert", "cluster": "danger", **changes}
    (bundle / CANARIES).write_text(json.dumps(row) + "\n")
    with pytest.raises(BundleError) as raised:
        load_bundle(bundle)
    assert f"{CANARIES}: {said}" in str(raised.value)


def test_an_id_twice_is_named(bundle: Path) -> None:
    row = {"id": "a", "text": "bread", "verdict": "pass"}
    (bundle / CANARIES).write_text((json.dumps(row) + "\n") * 2)
    with pytest.raises(BundleError, match="line 2: id: found a twice, expected once"):
        load_bundle(bundle)


def test_an_expectation_of_another_form_is_named(bundle: Path) -> None:
    (bundle / EXPECTED).parent.mkdir()
    (bundle / EXPECTED).write_text('{"schema": 2}')
    with pytest.raises(BundleError, match=r"canaries/expected.json: schema: "):
        load_bundle(bundle)


class BusyEngine(Engine):
    """An engine that refuses everything."""

    def __init__(self, scorer: Scorer, error: MonitorError) -> None:
        super().__init__(scorer)
        self.error = error

    async def score(self, *args: object, **options: object) -> EngineResult:
        raise self.error


@pytest.mark.parametrize(
    "error", [QueueFullError("full", 1.0), DeadlineError("late"), NotReadyError("stopping")]
)
async def test_a_run_without_time_is_no_failure_and_no_run(
    bundle: Path, tmp_path: Path, error: MonitorError
) -> None:
    row = {"id": "a", "text": "bread", "verdict": "pass"}
    (bundle / CANARIES).write_text(json.dumps(row) + "\n")
    served = load_local(bundle, model=None, cache=tmp_path)
    metrics = Metrics("tiny", served.cluster_infos())
    reader = InputReader(served.tokenizer, vocab_size=served.vocab_size, max_request_tokens=64)
    watch = CanaryWatch(served, BusyEngine(served.scorer, error), reader, metrics, seconds=60)
    assert not await watch.run()
    assert watch.failed is None
    assert watch.problem == "the canaries have not run yet"
    name = "saemonitor_canary_last_run_timestamp_seconds"
    assert metrics.registry.get_sample_value(name, {"model": "tiny"}) == 0


def test_a_cluster_is_stale_for_as_long_as_anything_says_so() -> None:
    book, told = Staleness(), []
    book.on_change = lambda cluster, reasons: told.append((cluster, reasons))
    book.say("a", StaleBy.CANARY, "")
    assert told == []
    book.say("a", StaleBy.CANARY, "no alert")
    book.say("a", StaleBy.CANARY, "no alert at all")
    book.say("a", StaleBy.RATE, "too many")
    book.say("a", StaleBy.CANARY, "")
    assert "a" in book
    assert book.reasons("a") == ("rate: too many",)
    book.say("a", StaleBy.RATE, "")
    assert "a" not in book
    assert [len(reasons) for _, reasons in told] == [1, 2, 1, 0]
