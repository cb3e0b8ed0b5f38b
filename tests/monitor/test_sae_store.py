from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
import yaml
from huggingface_hub import constants

from monitor.bundle import load_bundle
from monitor.errors import BundleError, SAEStoreError
from monitor.hub import HubAccess
from monitor.local import load_local
from monitor.sae_pins import pin_saes
from monitor.sae_store import SAEFiles, find_saes, hub_place
from sae_core.formats import load_sae
from sae_core.formats.saelens_writer import save_saelens
from sae_core.testing.planted import planted_sae

REPO = "someone/saes"
COMMIT = "3f" * 20
HOOK_POINT = "blocks.1.hook_resid_post"


@pytest.fixture(scope="session")
def sae_files(tiny_bundle: Path) -> dict[str, bytes]:
    """The tiny bundle's SAE, as a repository holds it, with things beside it that nobody needs."""
    folder = tiny_bundle / "saes" / "l1"
    files = {f"sub/l1/{path.name}": path.read_bytes() for path in folder.iterdir()}
    return files | {"sub/l1/README.md": b"card", "sub/l2/sae_weights.safetensors": b"other"}


@pytest.fixture
def make(tiny_bundle: Path, tmp_path: Path) -> Callable[..., Path]:
    """`make(**reference)`: the folder of a tiny bundle whose SAE is where `reference` says."""

    def write(**reference: Any) -> Path:
        folder = tmp_path / "bundle"
        if not folder.exists():
            shutil.copytree(tiny_bundle, folder)
            shutil.rmtree(folder / "saes")
        spec = yaml.safe_load((tiny_bundle / "bundle.yaml").read_text())
        spec["saes"]["l1"] = {"hook_point": HOOK_POINT} | reference
        (folder / "bundle.yaml").write_text(yaml.safe_dump(spec))
        return folder

    return write


@pytest.fixture
def access(fake_hub: Any, sae_files: dict[str, bytes], tmp_path: Path) -> HubAccess:
    fake_hub.add(REPO, COMMIT, sae_files)
    return HubAccess(cache=tmp_path / "hub", endpoint=fake_hub.endpoint)


HUB = {"repo": REPO, "path": "sub/l1"}


def find(folder: Path, access: HubAccess | None = None, **options: Any) -> SAEFiles:
    found = find_saes(load_bundle(folder), cache=folder.parent / "cache", hub=access, **options)
    return found["l1"]


def test_path_is_relative_to_the_bundle(tiny_bundle: Path) -> None:
    found = find(tiny_bundle)
    assert found.path == tiny_bundle / "saes" / "l1"
    assert (found.commit, dict(found.hints)) == (None, {})


def test_path_may_be_absolute(make: Callable[..., Path], tiny_bundle: Path) -> None:
    shared = tiny_bundle / "saes" / "l1"
    assert find(make(path=str(shared))).path == shared


def test_only_the_folder_of_the_sae_is_downloaded(
    make: Callable[..., Path], fake_hub: Any, access: HubAccess
) -> None:
    found = find(make(hub=HUB), access)
    assert found.commit == COMMIT
    assert found.origin == f"{REPO}@{COMMIT}:sub/l1"
    assert sorted(found.files) == ["cfg.json", "sae_weights.safetensors"]
    base = f"/{REPO}/resolve/{COMMIT}/sub/l1"
    assert fake_hub.downloaded() == [f"{base}/cfg.json", f"{base}/sae_weights.safetensors"]


def test_sae_from_the_hub_is_the_one_that_was_put_there(
    make: Callable[..., Path], access: HubAccess, tiny_bundle: Path
) -> None:
    found = find(make(hub=HUB), access)
    here, there = load_sae(tiny_bundle / "saes/l1"), load_sae(found.path, **found.hints)
    for a, b in zip(here.weights, there.weights, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_bundle_on_the_hub_loads_and_serves(
    make: Callable[..., Path],
    fill_cache: Callable[..., None],
    sae_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill_cache(tmp_path / "hub", REPO, COMMIT, sae_files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    served = load_local(make(hub=HUB), model=None, cache=tmp_path / "cache")
    assert served.hook_points == (HOOK_POINT,)


def test_hint_that_the_format_does_not_take_is_named(
    make: Callable[..., Path], tiny_bundle: Path, tmp_path: Path
) -> None:
    folder = make(path=str(tiny_bundle / "saes" / "l1"), hints={"nonsense": 1})
    with pytest.raises(BundleError, match=r"saes\.l1: .*nonsense"):
        load_local(folder, model=None, cache=tmp_path / "cache")


def test_single_file_comes_with_its_config(
    make: Callable[..., Path], fake_hub: Any, access: HubAccess
) -> None:
    files = {"a/x_v4.pt": b"w", "a/x_v4_cfg.json": b"{}", "a/y.pt": b"v", "b.pt": b""}
    fake_hub.add("someone/files", COMMIT, files)
    found = find(make(hub={"repo": "someone/files", "path": "a/x_v4.pt"}), access)
    assert found.path.name == "x_v4.pt"
    assert sorted(found.files) == ["x_v4.pt", "x_v4_cfg.json"]
    assert len(fake_hub.downloaded()) == 2


def test_top_of_a_repository_is_not_the_whole_of_it(
    make: Callable[..., Path], fake_hub: Any, access: HubAccess
) -> None:
    fake_hub.add("someone/top", COMMIT, {"cfg.json": b"{}", "w.pt": b"w", "deep/w.pt": b"v"})
    found = find(make(hub={"repo": "someone/top", "path": "."}), access)
    assert sorted(found.files) == ["cfg.json", "w.pt"]
    assert len(fake_hub.downloaded()) == 2


def test_subfolder_is_all_that_is_downloaded(
    make: Callable[..., Path], fake_hub: Any, access: HubAccess
) -> None:
    files = {"layers.3/cfg.json": b"{}", "layers.3/sae.safetensors": b"w", "layers.30/x.pt": b""}
    fake_hub.add("someone/many", COMMIT, files)
    folder = make(hub={"repo": "someone/many"}, hints={"subfolder": "layers.3"})
    found = find(folder, access)
    assert found.hints == {"subfolder": "layers.3"}
    assert sorted(found.files) == ["layers.3/cfg.json", "layers.3/sae.safetensors"]
    assert len(fake_hub.downloaded()) == 2


def reference(folder: Path) -> Any:
    return load_bundle(folder).spec.saes["l1"]


def test_k_of_qwen_scope_comes_from_the_name_unless_the_bundle_says(
    make: Callable[..., Path],
) -> None:
    hub = {"repo": "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", "path": "layer1.sae.pt"}
    assert hub_place(reference(make(hub=hub)))[1] == {"k": 50}
    assert hub_place(reference(make(hub=hub, hints={"k": 7})))[1] == {"k": 7}


def test_release_and_its_repository_give_the_same_hints(make: Callable[..., Path]) -> None:
    by_name = hub_place(
        reference(make(saelens={"release": "gpt2-small-res-jb", "id": "blocks.2.hook_resid_pre"}))
    )
    path = {"repo": "jbloom/GPT2-Small-SAEs-Reformatted", "path": "blocks.2.hook_resid_pre"}
    assert by_name == hub_place(reference(make(hub=path)))
    assert by_name[1] == {"center": True}


def test_release_is_found_in_the_cache(
    make: Callable[..., Path], fill_cache: Callable[..., None], tmp_path: Path, fake_hub: Any
) -> None:
    repo = "google/gemma-scope-2b-pt-res"
    folder = "layer_1/width_16k/average_l0_102"
    fill_cache(tmp_path / "hub", repo, COMMIT, {f"{folder}/params.npz": b"weights"})
    saelens = {"release": "gemma-scope-2b-pt-res-canonical", "id": "layer_1/width_16k/canonical"}
    access = HubAccess(cache=tmp_path / "hub", endpoint=fake_hub.endpoint)
    found = find(make(saelens=saelens), access, is_local_only=True)
    assert found.path.as_posix().endswith(folder)
    assert found.origin == f"{repo}@{COMMIT}:{folder}"


@pytest.mark.parametrize(
    ("hook_point", "is_right"),
    [
        ("blocks.2.hook_resid_pre", True),
        ("blocks.1.hook_resid_post", True),
        ("blocks.2.hook_resid_post", False),
        ("blocks.2.hook_resid_mid", False),
    ],
)
def test_hook_point_of_a_release_is_compared(
    make: Callable[..., Path],
    fill_cache: Callable[..., None],
    tmp_path: Path,
    hook_point: str,
    is_right: bool,
) -> None:
    repo, sae_id = "jbloom/GPT2-Small-SAEs-Reformatted", "blocks.2.hook_resid_pre"
    fill_cache(tmp_path / "hub", repo, COMMIT, {f"{sae_id}/w.safetensors": b"w"})
    access = HubAccess(cache=tmp_path / "hub")
    saelens = {"release": "gpt2-small-res-jb", "id": sae_id}
    folder = make(saelens=saelens, hook_point=hook_point)
    if is_right:
        assert find(folder, access, is_local_only=True).commit == COMMIT
        return
    with pytest.raises(BundleError, match=f"found {hook_point}, expected {sae_id}"):
        find(folder, access, is_local_only=True)
    overruled = make(saelens=saelens, hook_point=hook_point, hints={"hook_point": hook_point})
    assert find(overruled, access, is_local_only=True).commit == COMMIT


def test_another_model_and_an_open_revision_are_said_aloud(
    make: Callable[..., Path], fill_cache: Callable[..., None], tmp_path: Path
) -> None:
    repo, sae_id = "jbloom/GPT2-Small-SAEs-Reformatted", "blocks.2.hook_resid_pre"
    fill_cache(tmp_path / "hub", repo, COMMIT, {f"{sae_id}/w.safetensors": b"w"})
    folder = make(saelens={"release": "gpt2-small-res-jb", "id": sae_id})
    with structlog.testing.capture_logs() as logs:
        find(folder, HubAccess(cache=tmp_path / "hub"), is_local_only=True)
    events = {entry["event"]: entry for entry in logs}
    assert events["sae_of_another_model"]["expected"] == "openai-community/gpt2"
    assert events["sae_not_pinned"]["commit"] == COMMIT


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("sub/l3", rf"saes\.l1: {REPO}@{COMMIT}: found no sub/l3, near: sub/l"),
        ("sup/l1", r"found no sup/l1, near: sub"),
    ],
)
def test_path_that_is_not_there_is_named_with_what_is_near(
    make: Callable[..., Path], access: HubAccess, path: str, message: str
) -> None:
    with pytest.raises(SAEStoreError, match=message):
        find(make(hub={"repo": REPO, "path": path}), access)


def test_folder_without_tensors_is_said_to_have_none(
    make: Callable[..., Path], fake_hub: Any, access: HubAccess
) -> None:
    fake_hub.add("someone/empty", COMMIT, {"a/cfg.json": b"{}"})
    with pytest.raises(SAEStoreError, match="a: found no tensors in it"):
        find(make(hub={"repo": "someone/empty", "path": "a"}), access)


def test_offline_cache_without_the_path_says_what_it_holds(
    make: Callable[..., Path],
    fill_cache: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill_cache(tmp_path / "hub", REPO, COMMIT, {"sub/l2/w.pt": b"w"})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SAEStoreError, match=r"no sub/l1 in the hub's cache.*sub/l2/w\.pt.*fetch"):
        find(make(hub=HUB), HubAccess(cache=tmp_path / "hub"))


@pytest.fixture
def sealed(make: Callable[..., Path], access: HubAccess, tmp_path: Path) -> Path:
    folder = make(hub=HUB)
    pin_saes(folder, cache=tmp_path / "cache", hub=access)
    return folder


def test_pinned_sae_that_is_here_needs_no_hub(
    sealed: Path, fake_hub: Any, access: HubAccess
) -> None:
    fake_hub.requests.clear()
    assert find(sealed, access).commit == COMMIT
    assert fake_hub.requests == []


def test_pinned_sae_stays_when_the_branch_moves(
    sealed: Path, fake_hub: Any, access: HubAccess, tmp_path: Path
) -> None:
    fake_hub.add(REPO, "4a" * 20, {"sub/l1/sae_weights.safetensors": b"new"})
    elsewhere = HubAccess(cache=tmp_path / "another machine", endpoint=access.endpoint)
    assert find(sealed, elsewhere).commit == COMMIT


def weights(files: SAEFiles) -> Path:
    return files.files["sae_weights.safetensors"].resolve()


def test_changed_file_is_noticed(sealed: Path, access: HubAccess) -> None:
    blob = weights(find(sealed, access))
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")
    with pytest.raises(SAEStoreError, match=r"saes\.l1: .*sae_weights\.safetensors: found sha256"):
        find(sealed, access)


def test_missing_file_is_brought_again(sealed: Path, access: HubAccess) -> None:
    found = find(sealed, access)
    expected = weights(found).read_bytes()
    weights(found).unlink()
    found.files["sae_weights.safetensors"].unlink()
    assert weights(find(sealed, access)).read_bytes() == expected


def test_start_reads_no_weights_that_it_knows(sealed: Path, access: HubAccess) -> None:
    seen: list[str] = []
    find(sealed, access, progress=lambda what, share: seen.append(what))
    assert seen == []
    find(sealed, access, again=True, progress=lambda what, share: seen.append(what))
    assert sorted(set(seen)) == ["checking cfg.json", "checking sae_weights.safetensors"]


def test_file_that_came_to_a_shared_path_is_noticed(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    save_saelens(planted_sae(8, 32, architecture="relu", seed=0), tmp_path / "shared")
    folder = make(path=str(tmp_path / "shared"))
    pin_saes(folder, cache=tmp_path / "cache")
    assert find(folder).path == tmp_path / "shared"
    (tmp_path / "shared" / "activation_scaler.json").write_text("{}")
    with pytest.raises(SAEStoreError, match="activation_scaler.json: found a file that"):
        find(folder)


def test_file_gone_from_a_shared_path_is_named(make: Callable[..., Path], tmp_path: Path) -> None:
    save_saelens(planted_sae(8, 32, architecture="relu", seed=0), tmp_path / "shared")
    folder = make(path=str(tmp_path / "shared"))
    pin_saes(folder, cache=tmp_path / "cache")
    (tmp_path / "shared" / "cfg.json").unlink()
    with pytest.raises(SAEStoreError, match=r"cfg\.json: found no such file"):
        find(folder)


def test_unknown_release_names_the_sae(make: Callable[..., Path]) -> None:
    folder = make(saelens={"release": "gpt2-small-res-jc", "id": "x"})
    with pytest.raises(SAEStoreError, match=r"saes\.l1: saelens\.release.*gpt2-small-res-jb"):
        find(folder)
