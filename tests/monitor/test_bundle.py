from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from monitor.bundle import load_bundle, seal
from monitor.errors import BundleError


def spec() -> dict[str, Any]:
    return {
        "name": "small",
        "version": 1,
        "model": {"id": "tiny"},
        "saes": {"l0": {"path": "saes/l0", "hook_point": "blocks.0.hook_resid_post"}},
        "dense_heads": {"harm": {"hook_point": "blocks.0.hook_resid_post"}},
        "clusters": [
            {
                "id": "harm",
                "title": "Harm",
                "severity": "critical",
                "latents": [{"sae": "l0", "id": 3, "weight": 0.5, "scale": 2.0, "label": "x"}],
                "dense_head": "harm",
                "thresholds": {"flag": 1.0, "alert": 2.0, "clear": 0.5},
            }
        ],
        "policies": {"default": {"mode": "monitor"}},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "saes/l0").mkdir(parents=True)
    (tmp_path / "saes/l0/cfg.json").write_text("{}")
    save_file(
        {
            "dense/harm/weight": np.arange(4, dtype=np.float32),
            "dense/harm/bias": np.array(-1.5, np.float32),
        },
        tmp_path / "heads.safetensors",
    )
    return write(tmp_path, spec())


def write(folder: Path, content: object) -> Path:
    (folder / "bundle.yaml").write_text(yaml.safe_dump(content))
    return folder


def test_reads_spec_and_dense_heads(folder: Path) -> None:
    bundle = load_bundle(folder)
    assert bundle.label == "small@1"
    assert bundle.spec.clusters[0].latents[0].scale == 2.0
    assert bundle.dense_heads["harm"].bias == -1.5
    assert bundle.dense_heads["harm"].weight.tolist() == [0, 1, 2, 3]
    assert not bundle.sealed


def test_any_changed_byte_changes_the_digest(folder: Path) -> None:
    before = load_bundle(folder).digest
    (folder / "saes/l0/cfg.json").write_text("{ }")
    assert load_bundle(folder).digest != before


def test_sealed_bundle_is_verified_and_keeps_its_digest(folder: Path) -> None:
    unsealed = load_bundle(folder).digest
    assert seal(folder) == unsealed
    assert load_bundle(folder).sealed
    assert load_bundle(folder).digest == unsealed


@pytest.mark.parametrize("change", ["edit", "remove", "add"])
def test_sealed_bundle_names_the_file_that_changed(folder: Path, change: str) -> None:
    seal(folder)
    if change == "edit":
        (folder / "saes/l0/cfg.json").write_text('{"k": 1}')
    elif change == "remove":
        (folder / "saes/l0/cfg.json").unlink()
    else:
        (folder / "saes/l0/extra.json").write_text("{}")
    with pytest.raises(BundleError, match=r"saes/l0/(cfg|extra)\.json"):
        load_bundle(folder)


def test_forged_manifest_digest_is_found(folder: Path) -> None:
    seal(folder)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["digest"] = "0" * 64
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="digest"):
        load_bundle(folder)


def test_missing_folder_and_missing_yaml_are_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere"):
        load_bundle(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"bundle\.yaml"):
        load_bundle(tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("surprise",), 1, "surprise"),
        (("clusters", 0, "threshold"), 1, r"clusters\.harm\.threshold"),
        (("clusters", 0, "severity"), "dire", r"clusters\.harm\.severity.*'dire'"),
        (("clusters", 0, "thresholds", "alert"), 0.7, "clear <= flag < alert"),
        (("clusters", 0, "thresholds", "flag"), float("nan"), "finite"),
        (("clusters", 0, "aggregate"), {"evidence_floor": 1.0}, "above aggregate.evidence_floor"),
        (("clusters", 0, "aggregate"), {"window": 0}, "window"),
        (("clusters", 0, "latents", 0, "sae"), "l9", r"found 'l9', expected one of \['l0'\]"),
        (("clusters", 0, "latents", 0, "scale"), 0.0, "scale"),
        (("clusters", 0, "dense_head"), "other", "found 'other', expected one of"),
        (("clusters",), [], "clusters"),
        (("policies",), {"strict": {}}, "expected one named default"),
        (("policies", "default", "clusters"), ["nope"], "found 'nope'"),
        (("policies", "default", "mode"), "enforced", "enforced"),
        (
            ("rules",),
            [{"id": "r", "all": [{"cluster": "harm"}], "severity": "info"}],
            "exactly one of above, below",
        ),
        (("saes", "l0", "path"), "saes/l7", "found no saes/l7"),
    ],
)
def test_wrong_values_are_named(
    folder: Path, path: tuple[Any, ...], value: object, message: str
) -> None:
    content = spec()
    at: Any = content
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(BundleError, match=message):
        load_bundle(write(folder, content))


def test_yaml_that_builds_objects_is_refused(folder: Path) -> None:
    (folder / "bundle.yaml").write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(BundleError, match="YAML"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"dense/harm/bias": np.array(0, np.float32)}, "dense/harm/weight"),
        (
            {
                "dense/harm/weight": np.zeros((2, 2), np.float32),
                "dense/harm/bias": np.array(0, np.float32),
            },
            "1 axes",
        ),
        (
            {
                "dense/harm/weight": np.array([np.nan], np.float32),
                "dense/harm/bias": np.array(0, np.float32),
            },
            "NaN",
        ),
    ],
)
def test_wrong_dense_tensors_are_named(folder: Path, tensors: dict[str, Any], message: str) -> None:
    save_file(tensors, folder / "heads.safetensors")
    with pytest.raises(BundleError, match=message):
        load_bundle(folder)


def test_damaged_safetensors_is_named(folder: Path) -> None:
    (folder / "heads.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(BundleError, match=r"heads\.safetensors"):
        load_bundle(folder)


HOOK = {"hook_point": "blocks.0.hook_resid_post"}
HUB = {"repo": "someone/saes", "path": "l0"}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({}, "saes.l0: found none, expected exactly one of path, hub, saelens"),
        ({"path": "saes/l0", "hub": HUB}, "found path and hub, expected exactly one"),
        ({"hub": {"repo": "saes"}}, "saes.l0.hub.repo"),
        ({"hub": {"repo": "a/b", "path": "../c"}}, "found '../c', expected a path inside"),
        ({"hub": {"repo": "a/b", "path": "/c"}}, "found '/c', expected a path inside"),
        ({"hub": {"repo": "a/b", "branch": "x"}}, "saes.l0.hub.branch"),
        ({"saelens": {"release": "r"}}, "saes.l0.saelens.id"),
        ({"hub": HUB, "hints": {"k": [50]}}, "saes.l0.hints: k: found list, expected text"),
        ({"hub": HUB, "hints": {"k": float("nan")}}, "k: found nan, expected a finite"),
        ({"hub": HUB, "hints": {"path": "x"}}, "found the key 'path'"),
        ({"hub": HUB, "hints": {"a-b": 1}}, "found the key 'a-b'"),
        ({"hub": HUB, "hints": "k"}, "saes.l0.hints: found str, expected a mapping"),
        ({"hub": HUB, "files": {"w": "abc"}}, "saes.l0.files.w"),
        ({"hub": HUB, "files": {"../w": "a" * 64}}, "found the name '../w'"),
    ],
)
def test_wrong_reference_to_an_sae_is_named(
    folder: Path, reference: dict[str, Any], message: str
) -> None:
    content = spec()
    content["saes"]["l0"] = HOOK | reference
    with pytest.raises(BundleError, match=message):
        load_bundle(write(folder, content))


def test_hints_keep_their_types(folder: Path) -> None:
    hints = {"k": 50, "scale": 0.5, "subfolder": "layers.3", "center": True, "one": 1.0}
    content = spec()
    content["saes"]["l0"] = HOOK | {"hub": HUB, "hints": hints}
    found = load_bundle(write(folder, content)).spec.saes["l0"].hints
    assert found == hints
    assert {key: type(found[key]) for key in hints} == {key: type(hints[key]) for key in hints}


def test_sae_may_lie_outside_the_bundle(folder: Path, tmp_path: Path) -> None:
    content = spec()
    content["saes"]["l0"] = HOOK | {"path": str(folder / "saes/l0")}
    assert load_bundle(write(folder, content)).spec.saes["l0"].is_inside(folder)
    content["saes"]["l0"] = HOOK | {"path": str(tmp_path.parent)}
    assert not load_bundle(write(folder, content)).spec.saes["l0"].is_inside(folder)


def test_failed_seal_leaves_the_manifest(folder: Path) -> None:
    seal(write(folder, spec()))
    before = (folder / "MANIFEST.json").read_bytes()
    content = spec()
    content["saes"]["l0"] = HOOK | {"hub": HUB}
    with pytest.raises(BundleError, match="saes.l0: found revision main, expected the 40 digits"):
        seal(write(folder, content))
    assert (folder / "MANIFEST.json").read_bytes() == before
