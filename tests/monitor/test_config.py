from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from monitor.config import (
    ENV_PREFIX,
    ListenAddress,
    ServeSettings,
    load_settings,
    parse_listen,
    unknown_variables,
)
from monitor.errors import SettingsError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):  # noqa: TID251 - it clears what the tests set
        if name.startswith(ENV_PREFIX):
            monkeypatch.delenv(name)
    yield


def written(folder: Path, text: str) -> Path:
    path = folder / "monitor.yaml"
    path.write_text(text)
    return path


def test_flag_beats_environment_beats_file_beats_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = written(tmp_path, "max_streams: 3\nmax_step_tokens: 30\ngrace_seconds: 4\n")
    monkeypatch.setenv("SAEMONITOR_MAX_STREAMS", "2")
    monkeypatch.setenv("SAEMONITOR_MAX_STEP_TOKENS", "20")
    settings = load_settings({"max_streams": 1, "grace_seconds": None}, config)
    assert settings.max_streams == 1
    assert settings.max_step_tokens == 20
    assert settings.grace_seconds == 4
    assert settings.max_queue_tokens == ServeSettings.model_fields["max_queue_tokens"].default


def test_the_config_file_may_be_named_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEMONITOR_CONFIG", str(written(tmp_path, "bundle: /srv/bundle\n")))
    assert load_settings().bundle == "/srv/bundle"
    other = tmp_path / "other.yaml"
    other.write_text("bundle: /srv/other\n")
    assert load_settings(config=other).bundle == "/srv/other"


def test_several_addresses_from_a_list_or_with_commas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = written(tmp_path, "listen: ['127.0.0.1:0', 'unix:/tmp/m.sock']\n")
    expected = (ListenAddress(host="127.0.0.1"), ListenAddress(unix_path="/tmp/m.sock"))
    assert load_settings(config=config).listen_addresses() == expected
    monkeypatch.setenv("SAEMONITOR_LISTEN", "127.0.0.1:0, unix:/tmp/m.sock")
    assert load_settings().listen_addresses() == expected


def test_an_empty_variable_is_not_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEMONITOR_MAX_STREAMS", "")
    assert load_settings().max_streams == ServeSettings.model_fields["max_streams"].default


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"max_streams": "many"},
            "max_streams (--max-streams): found 'many', expected a valid integer",
        ),
        ({"max_streams": 0}, "max_streams (--max-streams): found 0, expected greater than or"),
        ({"device": "tpu"}, "device (--device): found 'tpu', expected 'auto', 'cpu' or 'cuda'"),
        ({"listen": "50051"}, "listen (--listen): found '50051', expected HOST:PORT"),
        ({"listen": "host:99999"}, "listen (--listen): found 'host:99999', expected HOST:PORT"),
        ({"listen": ","}, "listen (--listen): found ',', expected at least one address"),
        ({"listen": "unix:" + "x" * 108}, "expected unix:PATH of 1 to 107 bytes"),
        ({"ops_listen": "unix:/tmp/ops"}, "ops_listen (--ops-listen): found 'unix:/tmp/ops',"),
        ({"max_queue_tokens": 10}, "max_request_tokens: found 32768, expected at most max_queue"),
        ({"ops_listen": "127.0.0.1:50051"}, "found 127.0.0.1:50051 twice, expected once"),
        ({"gpus": 2, "device": "cpu"}, "gpus: found 2 with device cpu, expected 1"),
        ({"gpus": 2, "tensor_parallel": 2}, "gpus, tensor_parallel: found 2 and 2, expected 1"),
        ({"tensor_parallel": 0}, "tensor_parallel (--tensor-parallel): found 0, expected greater"),
        (
            {"audit_level": "everything"},
            "audit_level (--audit-level): found 'everything', expected",
        ),
    ],
)
def test_an_impossible_setting_is_named_with_found_and_expected(
    flags: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(flags)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_message_says_where_a_value_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEMONITOR_GRACE_SECONDS", "-1")
    config = written(tmp_path, "max_streams: several\n")
    with pytest.raises(SettingsError) as caught:
        load_settings(config=config)
    assert "grace_seconds (SAEMONITOR_GRACE_SECONDS): found '-1'" in str(caught.value)
    assert f"max_streams ({config}): found 'several'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_stream: 3\n", "found unknown key 'max_stream', expected bundle, model"),
        ("- a\n- b\n", "found list, expected a mapping"),
        ("a: [1\n", "cannot be read"),
    ],
)
def test_a_bad_config_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(config=written(tmp_path, text))
    assert message in str(caught.value)
    assert "monitor.yaml" in str(caught.value)


def test_a_missing_config_file_is_refused_and_an_empty_one_is_not(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"config .*nowhere\.yaml: cannot be read"):
        load_settings(config=tmp_path / "nowhere.yaml")
    assert load_settings(config=written(tmp_path, "")) == load_settings()


def test_unknown_variables_are_told_but_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEMONITOR_PORT", "tcp://10.0.0.1:50051")
    monkeypatch.setenv("SAEMONITOR_MAX_STREAMS", "9")
    monkeypatch.setenv("SAEMONITOR_CONFIG", "")
    assert load_settings().max_streams == 9
    assert unknown_variables() == ["SAEMONITOR_PORT"]


@pytest.mark.parametrize("text", ["127.0.0.1:0", "[::1]:50051", "unix:/run/m.sock", "0.0.0.0:80"])
def test_an_address_reads_back_as_it_was_written(text: str) -> None:
    assert str(parse_listen(text)) == text
    assert parse_listen(text).is_local == (text != "0.0.0.0:80")


def test_every_setting_is_described() -> None:
    undescribed = [n for n, field in ServeSettings.model_fields.items() if not field.description]
    assert not undescribed


def test_the_log_is_json_on_standard_error_and_hides_local_variables() -> None:
    program = """
import logging, structlog
from monitor.config import configure_logging
configure_logging("info", True)
def fail(prompt):
    raise RuntimeError("it broke")
try:
    fail("secret words of a user")
except RuntimeError:
    structlog.get_logger("monitor.x").exception("failed", error_id="e-1")
logging.getLogger("other").warning("from %s", "elsewhere")
structlog.get_logger("monitor.x").debug("not shown")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["failed", "from elsewhere"]
    assert lines[0]["error_id"] == "e-1"
    assert lines[0]["level"] == "error"
    assert "it broke" in str(lines[0]["exception"])
    assert "secret words" not in done.stderr


def test_the_text_log_hides_local_variables_too() -> None:
    program = """
import structlog
from monitor.config import configure_logging
configure_logging("info", False)
def fail(prompt):
    raise RuntimeError("it broke")
try:
    fail("secret words" + " of a user")
except RuntimeError:
    structlog.get_logger("monitor.x").exception("failed")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "it broke" in done.stderr
    assert "secret words of a user" not in done.stderr
