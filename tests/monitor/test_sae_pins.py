from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from monitor.bundle import load_bundle, seal
from monitor.errors import BundleError, SAEStoreError
from monitor.hub import HubAccess
from monitor.sae_pins import Pin, pin_saes, with_pins

REPO = "someone/saes"
COMMIT, LATER = "3f" * 20, "4a" * 20
FILES = {"l1/cfg.json": b"{}", "l1/w.safetensors": b"weights"}
LISTED = {name.removeprefix("l1/"): hashlib.sha256(FILES[name]).hexdigest() for name in FILES}

REST = """\
clusters:
- {id: harm, title: Harm, severity: critical, latents: [{sae: l1, id: 3, weight: 0.5}],
   thresholds: {flag: 1, alert: 2, clear: 0.5}}
policies: {default: {}}   # the only one
"""
BLOCK = """\
# Written by hand.
name: small
version: 1
model: {id: tiny}

saes:
    l1:   # after the ninth layer
        hub:
            repo: someone/saes   # ours
            path: 'l1'
        # what it reads
        hook_point: blocks.0.hook_resid_post   # residual

"""
FLOW = """\
name: small
version: 1
model: {id: tiny}
saes:
  l1: {hub: {repo: someone/saes, revision: main, path: l1}, hook_point: blocks.0.hook_resid_post}
"""
PIN = Pin(commit=COMMIT, files={"cfg.json": "a" * 64, "w.safetensors": "b" * 64})


def pinned(text: str, **pins: Pin) -> tuple[str, Any]:
    edited = with_pins(text + REST, pins or {"l1": PIN})
    return edited, yaml.safe_load(edited)["saes"]


def test_block_style_keeps_comments_and_every_other_line() -> None:
    edited, _ = pinned(BLOCK)
    assert (
        edited
        == """\
# Written by hand.
name: small
version: 1
model: {id: tiny}

saes:
    l1:   # after the ninth layer
        hub:
            repo: someone/saes   # ours
            revision: 3f3f3f3f3f3f3f3f3f3f3f3f3f3f3f3f3f3f3f3f
            path: 'l1'
        # what it reads
        hook_point: blocks.0.hook_resid_post   # residual
        files: {cfg.json: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa,
                w.safetensors: bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb}

"""
        + REST
    )


def test_flow_style_stays_on_its_line() -> None:
    edited, saes = pinned(FLOW)
    assert edited.count("\n") == (FLOW + REST).count("\n")
    assert saes["l1"]["hub"] == {"repo": REPO, "revision": COMMIT, "path": "l1"}
    assert saes["l1"]["files"] == PIN.files


@pytest.mark.parametrize("text", [BLOCK, FLOW])
def test_pinning_the_same_again_changes_nothing(text: str) -> None:
    once = with_pins(text + REST, {"l1": PIN})
    assert with_pins(once, {"l1": PIN}) == once


@pytest.mark.parametrize("text", [BLOCK, FLOW])
def test_pins_are_replaced(text: str) -> None:
    once = with_pins(text + REST, {"l1": PIN})
    other = Pin(commit=LATER, files={"x.npz": "c" * 64})
    saes = yaml.safe_load(with_pins(once, {"l1": other}))["saes"]
    assert saes["l1"]["hub"]["revision"] == LATER
    assert saes["l1"]["files"] == other.files


def test_block_list_of_files_is_replaced_and_what_follows_stays() -> None:
    listed = BLOCK.rstrip("\n") + "\n        files:\n            old.json: " + "d" * 64
    edited, saes = pinned(listed + "   # stale\n\n# clusters come next\n")
    assert saes["l1"]["files"] == PIN.files
    assert "# clusters come next\nclusters:" in edited


def test_line_ends_of_windows_are_kept() -> None:
    edited = with_pins((BLOCK + REST).replace("\n", "\r\n"), {"l1": PIN})
    assert edited.count("\r\n") == edited.count("\n")
    assert yaml.safe_load(edited)["saes"]["l1"]["files"] == PIN.files


def test_digits_are_quoted_so_that_they_stay_text() -> None:
    _, saes = pinned(BLOCK, l1=Pin(commit="1" * 40, files={"a b.npz": "2" * 64}))
    assert saes["l1"]["hub"]["revision"] == "1" * 40
    assert saes["l1"]["files"] == {"a b.npz": "2" * 64}


def test_release_is_pinned_after_its_id() -> None:
    text = BLOCK.replace("hub:", "saelens:").replace("repo: someone/saes", "release: r")
    _, saes = pinned(text.replace("path: 'l1'", "id: 'x'"))
    assert saes["l1"]["saelens"] == {"release": "r", "id": "x", "revision": COMMIT}


def test_two_saes_that_share_an_anchor_are_refused_with_the_lines_to_write() -> None:
    text = FLOW.replace("hub: {", "hub: &same {")
    text += "  l2: {hub: *same, hook_point: blocks.1.hook_resid_post}\n"
    with pytest.raises(BundleError, match=f"cannot be edited in place.*revision: {COMMIT}"):
        with_pins(text + REST, {"l1": PIN})


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "bundle.yaml").write_text(BLOCK + REST)
    return folder


@pytest.fixture
def access(fake_hub: Any, tmp_path: Path) -> HubAccess:
    fake_hub.add(REPO, COMMIT, FILES)
    return HubAccess(cache=tmp_path / "hub", endpoint=fake_hub.endpoint)


def pin(bundle: Path, access: HubAccess | None = None) -> None:
    pin_saes(bundle, cache=bundle.parent / "cache", hub=access)


def test_commit_and_hashes_are_written(bundle: Path, access: HubAccess) -> None:
    pin(bundle, access)
    ref = load_bundle(bundle).spec.saes["l1"]
    assert (ref.revision, ref.is_fixed) == (COMMIT, True)
    assert ref.files == LISTED
    seal(bundle)
    assert load_bundle(bundle).sealed


def test_seal_works_offline_with_a_cached_snapshot(
    bundle: Path,
    tmp_path: Path,
    fill_cache: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill_cache(tmp_path / "hub", REPO, COMMIT, FILES)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pin(bundle, HubAccess(cache=tmp_path / "hub"))
    assert load_bundle(bundle).spec.saes["l1"].files == LISTED


def test_pinned_again_it_stays_at_its_commit(
    bundle: Path, access: HubAccess, fake_hub: Any
) -> None:
    pin(bundle, access)
    text = (bundle / "bundle.yaml").read_text()
    fake_hub.add(REPO, LATER, {"l1/w.safetensors": b"other"})
    pin(bundle, access)
    assert (bundle / "bundle.yaml").read_text() == text


def test_revision_set_back_to_a_branch_is_pinned_anew(
    bundle: Path, access: HubAccess, fake_hub: Any
) -> None:
    pin(bundle, access)
    fake_hub.add(REPO, LATER, {"l1/w.safetensors": b"other"})
    path = bundle / "bundle.yaml"
    path.write_text(path.read_text().replace(COMMIT, "main"))
    pin(bundle, access)
    ref = load_bundle(bundle).spec.saes["l1"]
    assert ref.revision == LATER
    assert ref.files == {"w.safetensors": hashlib.sha256(b"other").hexdigest()}


def test_changed_file_is_not_sealed_over(bundle: Path, access: HubAccess) -> None:
    pin(bundle, access)
    assert access.cache is not None
    blob = next(access.cache.rglob("w.safetensors")).resolve()
    blob.write_bytes(b"tampered")
    with pytest.raises(SAEStoreError, match=r"saes\.l1: .*w\.safetensors: found sha256"):
        pin(bundle, access)


def test_unresolvable_reference_changes_nothing(bundle: Path, access: HubAccess) -> None:
    both = (
        BLOCK.rstrip("\n") + "\n    l2: {hub: {repo: a/b}, hook_point: blocks.0.hook_resid_pre}\n"
    )
    (bundle / "bundle.yaml").write_text(both + REST)
    (bundle / "MANIFEST.json").write_text("old")
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    with pytest.raises(SAEStoreError, match=r"saes\.l2: a/b@main: found no such repository"):
        pin(bundle, access)
    with pytest.raises(BundleError, match=r"saes\.l1: found revision main, expected the 40"):
        seal(bundle)
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before


def test_invalid_bundle_is_not_pinned(bundle: Path, access: HubAccess, fake_hub: Any) -> None:
    text = (BLOCK + REST).replace("title: Harm", "titel: Harm")
    (bundle / "bundle.yaml").write_text(text)
    with pytest.raises(BundleError, match="titel"):
        pin(bundle, access)
    assert (bundle / "bundle.yaml").read_text() == text
    assert fake_hub.requests == []


def test_sae_in_the_bundle_is_left_to_the_manifest(bundle: Path) -> None:
    (bundle / "l1").mkdir()
    text = BLOCK.replace(
        "hub:\n            repo: someone/saes   # ours\n            path: 'l1'", "path: l1"
    )
    (bundle / "bundle.yaml").write_text(text + REST)
    pin(bundle)
    assert (bundle / "bundle.yaml").read_text() == text + REST


def test_sae_at_a_shared_path_gets_its_hashes(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "w.npz").write_bytes(b"weights")
    text = BLOCK.replace(
        "hub:\n            repo: someone/saes   # ours\n            path: 'l1'", "path: ../shared"
    )
    (bundle / "bundle.yaml").write_text(text + REST)
    with pytest.raises(BundleError, match=r"saes\.l1: found no files"):
        seal(bundle)
    pin(bundle)
    seal(bundle)
    files = load_bundle(bundle).spec.saes["l1"].files
    assert files == {"w.npz": hashlib.sha256(b"weights").hexdigest()}
