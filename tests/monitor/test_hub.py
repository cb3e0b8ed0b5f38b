from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from monitor.errors import SAEStoreError
from monitor.hub import HubAccess, Snapshot, cached, download, siblings

REPO = "someone/saes"
COMMIT = "3f" * 20
FILES = {
    "layer_1/cfg.json": b"{}",
    "layer_1/sae_weights.safetensors": bytes(300_000),
    "layer_2/sae_weights.safetensors": bytes(10),
    "README.md": b"text",
}


@pytest.fixture
def access(fake_hub: Any, tmp_path: Path) -> HubAccess:
    fake_hub.add(REPO, COMMIT, FILES)
    return HubAccess(cache=tmp_path / "cache", endpoint=fake_hub.endpoint)


def fetch(
    access: HubAccess,
    *,
    repo: str = REPO,
    revision: str = "main",
    is_local_only: bool = False,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> Snapshot:
    return download(
        repo,
        revision,
        allow=["layer_1/*"],
        ignore=[],
        access=access,
        is_local_only=is_local_only,
        progress=progress,
    )


def test_only_matching_files_are_downloaded(fake_hub: Any, access: HubAccess) -> None:
    snapshot = fetch(access)
    assert snapshot.commit == COMMIT
    for name in ("layer_1/cfg.json", "layer_1/sae_weights.safetensors"):
        assert (snapshot.folder / name).read_bytes() == FILES[name]
    base = f"/{REPO}/resolve/{COMMIT}/layer_1"
    assert fake_hub.downloaded() == [f"{base}/cfg.json", f"{base}/sae_weights.safetensors"]


def test_progress_names_the_repository_and_ends_at_one(access: HubAccess) -> None:
    seen: list[tuple[str, float]] = []
    fetch(access, progress=lambda what, share: seen.append((what, share)))
    assert {what for what, _ in seen} == {f"downloading {REPO}"}
    assert all(0 <= share <= 1 for _, share in seen)
    assert seen[-1][1] == 1.0


def test_nothing_is_drawn(access: HubAccess, capfd: pytest.CaptureFixture[str]) -> None:
    fetch(access)
    assert capfd.readouterr() == ("", "")


def test_second_download_fetches_nothing(fake_hub: Any, access: HubAccess) -> None:
    fetch(access)
    n_before = len(fake_hub.downloaded())
    fetch(access)
    assert len(fake_hub.downloaded()) == n_before


def test_cache_serves_when_the_hub_is_gone(
    fake_hub: Any, tmp_path: Path, fill_cache: Callable[..., None]
) -> None:
    cache = tmp_path / "cache"
    fill_cache(cache, REPO, COMMIT, FILES)
    fake_hub.stop()
    snapshot = fetch(HubAccess(cache=cache, endpoint=fake_hub.endpoint))
    assert snapshot.commit == COMMIT
    assert (snapshot.folder / "layer_1/cfg.json").read_bytes() == b"{}"


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_cache_serves_offline(
    access: HubAccess,
    fill_cache: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    revision: str,
) -> None:
    assert access.cache is not None
    fill_cache(access.cache, REPO, COMMIT, FILES)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(access, revision=revision).commit == COMMIT


def test_unreachable_and_not_cached_says_what_to_do(fake_hub: Any, tmp_path: Path) -> None:
    fake_hub.stop()
    access = HubAccess(cache=tmp_path, endpoint=fake_hub.endpoint)
    with pytest.raises(SAEStoreError, match=f"{REPO}@main: not complete .*cannot be reached") as e:
        fetch(access)
    assert "sae-monitor bundle fetch" in str(e.value)
    assert str(tmp_path) in str(e.value)


def test_offline_and_not_cached_names_the_variable(
    fake_hub: Any, access: HubAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SAEStoreError, match="HF_HUB_OFFLINE is set"):
        fetch(access)
    assert fake_hub.requests == []


def test_local_only_asks_nobody(fake_hub: Any, access: HubAccess) -> None:
    with pytest.raises(SAEStoreError, match="the hub was not asked"):
        fetch(access, is_local_only=True)
    assert fake_hub.requests == []


def test_interrupted_download_is_not_taken_for_whole(
    access: HubAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = fetch(access)
    (snapshot.folder / "layer_1/sae_weights.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SAEStoreError, match="not complete in the hub's cache"):
        fetch(access)


def test_unknown_repository_is_named(access: HubAccess) -> None:
    with pytest.raises(SAEStoreError, match="someone/sae@main: found no such repository"):
        fetch(access, repo="someone/sae")


def test_gated_repository_says_how_to_get_access(fake_hub: Any, access: HubAccess) -> None:
    fake_hub.gated.add(REPO)
    with pytest.raises(SAEStoreError, match="gated repository.*accept its terms"):
        fetch(access)


def test_unknown_revision_names_the_branches(access: HubAccess) -> None:
    with pytest.raises(SAEStoreError, match="without revision 'mian'.*it has main"):
        fetch(access, revision="mian")


def test_impossible_repository_name_is_an_error_of_ours(access: HubAccess) -> None:
    with pytest.raises(SAEStoreError, match="not to be had from the hub"):
        fetch(access, repo="a--b/c..d")


def test_cached_wants_every_file(tmp_path: Path, fill_cache: Callable[..., None]) -> None:
    access = HubAccess(cache=tmp_path)
    fill_cache(tmp_path, REPO, COMMIT, FILES)
    found = cached(REPO, COMMIT, ["layer_1/cfg.json", "README.md"], access)
    assert found is not None
    assert (found.folder / "README.md").read_bytes() == b"text"
    assert cached(REPO, COMMIT, ["layer_1/cfg.json", "layer_3/cfg.json"], access) is None
    assert cached(REPO, "4" * 40, ["README.md"], access) is None


def test_siblings_are_of_the_deepest_folder_that_exists(access: HubAccess) -> None:
    assert siblings(REPO, COMMIT, "layer_1/nothing/here", access) == [
        "layer_1/cfg.json",
        "layer_1/sae_weights.safetensors",
    ]
    assert "layer_2" in siblings(REPO, COMMIT, "layer_7", access)


def test_siblings_are_not_known_offline(access: HubAccess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert siblings(REPO, COMMIT, "layer_7", access) == []
