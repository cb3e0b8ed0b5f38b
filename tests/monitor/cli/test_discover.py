from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from monitor.bundle import load_bundle, seal
from monitor.cli.app import app
from monitor.errors import SettingsError
from monitor.label_endpoint import LabelEndpoint
from sae_core.testing.planted import PLANTED_LATENT

USUAL = ("the", "model", "reads", "a", "prompt", "and", "bakes", "bread", "with", "flour")
LABEL = "the planted word <b>"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Harmful texts have the word that the planted latent fires on, in three data sets of five."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(200):
        words = rng.choice(USUAL, int(rng.integers(8, 16))).tolist()
        is_harmful = index % 5 < 3 and rng.random() < 0.6
        if is_harmful:
            words[int(rng.integers(1, 6))] = "danger"
        rows.append(
            {
                "text": " ".join(words),
                "label": "harmful" if is_harmful else "benign",
                "category": "peril" if is_harmful else "benign_hard",
                "source": f"s{index % 5}",
            }
        )
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class _Endpoint(BaseHTTPRequestHandler):
    """Names every latent LABEL; keeps what it was asked."""

    asked: list[tuple[str | None, str]] = []
    content: object = LABEL

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.headers["Authorization"], body["messages"][1]["content"]))
        answer = json.dumps({"choices": [{"message": {"content": self.content}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Endpoint)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def found(
    tiny_bundle: Path, labelled: Path, endpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("found")
    (root / "key").write_text("secret\n")
    result = _run(
        tiny_bundle,
        labelled,
        root / "out",
        *("--endpoint", endpoint, "--endpoint-key", str(root / "key")),
    )
    assert result[0] == 0, result[1]
    return root / "out"


def _run(bundle: Path, data: Path, out: Path, *more: str) -> tuple[int, str]:
    arguments = ["discover", "--bundle", str(bundle), "--data", str(data), "--out", str(out), *more]
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def test_the_planted_latent_is_found_for_its_category_and_any_harm(found: Path) -> None:
    content = json.loads((found / "findings.json").read_text())
    for risk in content["saes"]["l1"]:
        used = [x["latent_id"] for x in risk["latents"] if x["weight"] > 0]
        assert used[0] == PLANTED_LATENT
    assert [risk["plan"]["id"] for risk in content["saes"]["l1"]] == ["any_harm", "peril"]


def test_the_bundle_loads_scores_and_claims_no_calibration(found: Path, labelled: Path) -> None:
    bundle = load_bundle(found / "bundle")
    assert [c.id for c in bundle.spec.clusters] == ["any_harm", "peril"]
    assert not bundle.calibration
    measured = CliRunner().invoke(app, ["bundle", "measure", str(found / "bundle"), "--force"])
    assert measured.exit_code == 0, measured.output
    verdicts = {}
    for text in ("the model reads danger and bread", "the model reads a prompt and bread"):
        result = CliRunner().invoke(
            app, ["score", "--bundle", str(found / "bundle"), "--text", text, "--json"]
        )
        assert result.exit_code == 0, result.output
        verdicts[text] = json.loads(result.stdout)["verdict"]
    assert list(verdicts.values()) == ["alert", "pass"]


def test_the_endpoint_names_used_latents_and_gets_the_key(found: Path) -> None:
    spec = yaml.safe_load((found / "bundle" / "bundle.yaml").read_text())
    labels = {latent["label"] for cluster in spec["clusters"] for latent in cluster["latents"]}
    assert labels == {LABEL}
    assert all(key == "Bearer secret" for key, _ in _Endpoint.asked)
    assert any("[[" in text and "danger" in text for _, text in _Endpoint.asked)


def test_the_page_escapes_what_others_wrote_and_loads_nothing(found: Path) -> None:
    page = (found / "review.html").read_text()
    assert "the planted word &lt;b&gt;" in page
    assert "<mark>" in page
    assert "<script" not in page
    assert "src=" not in page


def test_a_second_run_reads_the_activations_that_are_there(
    found: Path, tiny_bundle: Path, labelled: Path
) -> None:
    before = (found / "work" / "resid_l1" / "resid.npy").stat().st_mtime_ns
    assert _run(tiny_bundle, labelled, found, "--risk", "only=peril")[0] == 0
    assert (found / "work" / "resid_l1" / "resid.npy").stat().st_mtime_ns == before
    assert [c.id for c in load_bundle(found / "bundle").spec.clusters] == ["only"]


@pytest.mark.parametrize(
    ("risk", "problem"),
    [
        ("peril", "expected id=category"),
        ("a=nothing", "found category 'nothing', the harmful texts have: peril"),
    ],
)
def test_a_wrong_risk_is_refused(
    tiny_bundle: Path, labelled: Path, tmp_path: Path, risk: str, problem: str
) -> None:
    code, output = _run(tiny_bundle, labelled, tmp_path / "out", "--risk", risk)
    assert code == 2
    assert problem in " ".join(output.split())


def test_a_sealed_bundle_is_not_written_over(
    tiny_bundle: Path, labelled: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "out" / "bundle")
    seal(tmp_path / "out" / "bundle")
    code, output = _run(tiny_bundle, labelled, tmp_path / "out", "--risk", "peril=peril")
    assert code == 2
    assert "expected no sealed bundle" in output


def test_what_goes_silent_is_shown_and_not_registered(
    tiny_bundle: Path, labelled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flag = ("--silent", "calm=benign_hard:peril")
    code, output = _run(tiny_bundle, labelled, out, *flag)
    assert code == 0, output
    (silence,) = json.loads((out / "findings.json").read_text())["silent"]["l1"]
    first = silence["latents"][0]
    assert first["found"]["latent_id"] == PLANTED_LATENT
    assert first["fires_on_reference"] == 1.0
    assert first["fires_on_event"] == 0.0
    assert "calm in l1" in output
    assert "Silent in benign_hard" in (out / "review.html").read_text()
    assert [c.id for c in load_bundle(out / "bundle").spec.clusters] == ["any_harm", "peril"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("calm=benign_hard", "expected id=event:reference"),
        ("calm=benign_hard:crime", "found category 'crime', the texts have: benign_hard, peril"),
        ("calm=peril:peril", "found 'peril' on both sides"),
    ],
)
def test_a_wrong_silence_is_refused(
    flag: str, message: str, tiny_bundle: Path, labelled: Path, tmp_path: Path
) -> None:
    code, output = _run(tiny_bundle, labelled, tmp_path / "out", "--silent", flag)
    assert code == 2
    assert message in " ".join(output.split())


def test_an_endpoint_without_a_scheme_is_refused() -> None:
    with pytest.raises(SettingsError, match="'localhost:1', expected an http"):
        LabelEndpoint("localhost:1", "m")
