"""The registered artefact: a folder of data that says what to watch for, and its digest.

Read, validated and digested here; nothing is executed and no tensor library is needed. The
folder's layout is drawn in the README. Every error names the file, the key, what was found and
what was expected.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import rfc8785
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from monitor.bundle_spec import BundleSpec, parse_spec
from monitor.canary_spec import Canary, CanaryExpectation, read_canaries, read_expectation
from monitor.errors import BundleError
from monitor.records import ClusterInfo, LatentInfo
from sae_core.digests import sae_digest

MANIFEST = "MANIFEST.json"
PROBES = "fidelity.jsonl"
FIDELITY_FOLDER = "fidelity"
_UNSEALED = {MANIFEST, "MANIFEST.sig", MANIFEST + ".part", "bundle.yaml.part"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseHead:
    """A dense head's numbers, as stored."""

    weight: NDArray[np.float32]
    """[d_in]"""
    bias: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle in memory: what bundle.yaml says, the small tensors, and the digest of it all."""

    folder: Path
    spec: BundleSpec
    digest: str
    """sha256 over the sorted names and hashes of every file; see `bundle_digest`."""
    sealed: bool
    """True where MANIFEST.json was there and every file agreed with it."""
    dense_heads: Mapping[str, DenseHead]
    calibration: Mapping[str, Mapping[str, object]]
    """By the path that clusters name; parsed JSON."""
    probes: tuple[str, ...] = ()
    """Texts of fidelity.jsonl."""
    fidelity: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """By SAE id: what it gives on the probe texts, from fidelity/<id>.json; parsed JSON."""
    canaries: tuple[Canary, ...] = ()
    """Of canaries.jsonl."""
    canary_expectation: CanaryExpectation | None = None
    """What the canaries scored where all was well; None where it was never measured."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """sha256 of every file by its path in the folder, as the digest is made of."""

    @property
    def label(self) -> str:
        """name@version."""
        return f"{self.spec.name}@{self.spec.version}"

    def sae_digests(self) -> dict[str, str]:
        """What each SAE is, by id; one that is elsewhere and not pinned is left out."""
        digests = {}
        for sae_id, ref in self.spec.saes.items():
            files = ref.files
            if ref.path is not None and ref.is_inside(self.folder):
                place = PurePosixPath(ref.path)
                if (
                    str(place) in self.hashes
                ):  # one file: what lies beside it may say how it is read
                    place = place.parent
                files = {
                    PurePosixPath(name).relative_to(place).as_posix(): digest
                    for name, digest in self.hashes.items()
                    if PurePosixPath(name).is_relative_to(place)
                }
            if files:
                digests[sae_id] = sae_digest(files, ref.hook_point, ref.hints)
        return digests

    def cluster_infos(self, calibrated: Mapping[str, bool]) -> tuple[ClusterInfo, ...]:
        """The clusters as the registry shows them, in bundle order."""
        return tuple(
            ClusterInfo(
                cluster=c.id,
                title=c.title,
                severity=c.severity,
                stages=c.stages,
                latents=tuple(
                    LatentInfo(
                        sae=t.sae, latent_id=t.id, weight=t.weight, scale=t.scale, label=t.label
                    )
                    for t in c.latents
                ),
                has_dense_head=c.dense_head is not None,
                aggregate=c.aggregate.kind,
                flag=c.thresholds.flag,
                alert=c.thresholds.alert,
                clear=c.thresholds.clear,
                calibrated=calibrated.get(c.id, False),
            )
            for c in self.spec.clusters
        )


def load_bundle(folder: Path) -> Bundle:
    """The bundle in `folder`, checked against its manifest where it has one.

    Raises:
        BundleError: missing folder or file, unknown key, wrong value, damaged file.
    """
    if not folder.is_dir():
        raise BundleError(f"bundle: found no folder {folder}, expected one with bundle.yaml")
    hashes = file_hashes(folder)
    return _load(folder, hashes, sealed=_check_manifest(folder, hashes))


def _load(folder: Path, hashes: Mapping[str, str], *, sealed: bool) -> Bundle:
    spec = _read_spec(folder / "bundle.yaml")
    for sae_id, ref in spec.saes.items():
        if ref.path is not None and not (folder / ref.path).exists():
            raise BundleError(
                f"bundle.yaml: saes.{sae_id}.path: found no {ref.path} in {folder}, "
                "expected an SAE folder or file"
            )
    return Bundle(
        folder=folder,
        spec=spec,
        digest=bundle_digest(hashes),
        sealed=sealed,
        dense_heads=_read_dense_heads(folder / "heads.safetensors", spec),
        calibration={
            path: _read_json(folder / path)
            for path in sorted({c.calibration for c in spec.clusters if c.calibration})
        },
        probes=_read_probes(folder / PROBES),
        fidelity={
            sae_id: _read_json(folder / FIDELITY_FOLDER / f"{sae_id}.json")
            for sae_id in spec.saes
            if (folder / FIDELITY_FOLDER / f"{sae_id}.json").exists()
        },
        canaries=read_canaries(folder, spec),
        canary_expectation=read_expectation(folder),
        hashes=hashes,
    )


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file under `folder`, manifest and signature left out, by relative path."""
    hashes: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in _UNSEALED:
            with path.open("rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def bundle_digest(hashes: Mapping[str, str]) -> str:
    """sha256 over the canonical JSON (RFC 8785) of the map from file name to sha256."""
    return hashlib.sha256(rfc8785.dumps(dict(hashes))).hexdigest()


def load_unsealed(folder: Path) -> Bundle:
    """The bundle as its folder is now, whatever its manifest says; to seal it anew.

    Raises:
        BundleError: as `load_bundle`.
    """
    if not folder.is_dir():
        raise BundleError(f"bundle: found no folder {folder}, expected one with bundle.yaml")
    return _load(folder, file_hashes(folder), sealed=False)


def seal(folder: Path) -> str:
    """Writes MANIFEST.json over what the folder holds now; returns the digest.

    Raises:
        BundleError: the folder is not a valid bundle, or one of its SAEs is elsewhere and not
            pinned; the old manifest stays.
    """
    bundle = load_unsealed(folder)
    for sae_id, ref in bundle.spec.saes.items():
        if not ref.is_fixed:
            raise BundleError(
                f"bundle.yaml: saes.{sae_id}: found revision {ref.revision}, expected the 40 "
                "digits of a commit (sae-monitor bundle seal writes it)"
            )
        if not ref.files and not ref.is_inside(folder):
            raise BundleError(
                f"bundle.yaml: saes.{sae_id}: found no files, expected the sha256 of each, as the "
                "SAE is not in the bundle (sae-monitor bundle seal writes them)"
            )
    manifest = {"digest": bundle.digest, "files": file_hashes(folder)}
    part = folder / (MANIFEST + ".part")
    part.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    part.replace(folder / MANIFEST)
    return bundle.digest


def _read_spec(path: Path) -> BundleSpec:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BundleError(f"bundle: found no {path.name} in {path.parent}, expected one") from None
    except UnicodeDecodeError as error:
        raise BundleError(f"{path.name}: not readable as YAML: {error}") from error
    return parse_spec(text, path.name)


def _check_manifest(folder: Path, hashes: Mapping[str, str]) -> bool:
    path = folder / MANIFEST
    if not path.exists():
        return False
    manifest = _read_json(path)
    expected = manifest.get("files")
    if not isinstance(expected, dict):
        raise BundleError(f"{MANIFEST}: found no map `files`, expected file name to sha256")
    for name in sorted(expected.keys() | hashes.keys()):
        if name not in hashes:
            raise BundleError(f"{MANIFEST}: {name}: found no such file, expected {expected[name]}")
        if name not in expected:
            raise BundleError(f"{MANIFEST}: {name}: found a file that the manifest does not list")
        if hashes[name] != expected[name]:
            raise BundleError(
                f"{MANIFEST}: {name}: found sha256 {hashes[name][:16]}..., expected "
                f"{str(expected[name])[:16]}... (the file is damaged or was edited after sealing)"
            )
    if manifest.get("digest") != bundle_digest(hashes):
        raise BundleError(
            f"{MANIFEST}: digest: found {manifest.get('digest')}, expected {bundle_digest(hashes)}"
        )
    return True


def _read_json(path: Path) -> Mapping[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(f"bundle: found no {path.name} at {path}, expected one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{path.name}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise BundleError(f"{path.name}: found {type(content).__name__}, expected an object")
    return content


def _read_probes(path: Path) -> tuple[str, ...]:
    if not path.exists():
        return ()
    texts = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            text = row.get("text") if isinstance(row, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise BundleError(
                    f"{path.name}: line {number}: found {line[:80]!r}, expected an object with text"
                )
            texts.append(text)
    except (ValueError, UnicodeDecodeError) as error:
        raise BundleError(f"{path.name}: not readable as JSON lines: {error}") from error
    return tuple(texts)


def _read_dense_heads(path: Path, spec: BundleSpec) -> dict[str, DenseHead]:
    if not spec.dense_heads:
        return {}
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise BundleError(f"bundle: found no {path.name}, expected one for dense_heads") from None
    except SafetensorError as error:
        raise BundleError(f"{path.name}: not readable as safetensors: {error}") from error
    heads = {}
    for name in spec.dense_heads:
        for key, n_axes in ((f"dense/{name}/weight", 1), (f"dense/{name}/bias", 0)):
            if key not in tensors:
                raise BundleError(f"{path.name}: found no tensor {key}, expected one")
            if tensors[key].ndim != n_axes:
                raise BundleError(
                    f"{path.name}: {key}: found shape {tensors[key].shape}, expected {n_axes} axes"
                )
            if not np.isfinite(tensors[key]).all():
                raise BundleError(f"{path.name}: {key}: found NaN or infinity, expected numbers")
        heads[name] = DenseHead(
            weight=tensors[f"dense/{name}/weight"].astype(np.float32),
            bias=float(tensors[f"dense/{name}/bias"]),
        )
    return heads
