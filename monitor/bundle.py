"""The registered artefact: a folder of data that says what to watch for, and its digest.

Read, validated and digested here; nothing is executed and no tensor library is needed. The
folder's layout is drawn in the README. Every error names the file, the key, what was found and
what was expected.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import numpy as np
import rfc8785
import yaml
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from safetensors import SafetensorError
from safetensors.numpy import load_file

from monitor.errors import BundleError
from monitor.records import ClusterInfo, LatentInfo, Mode, Severity, Stage

MANIFEST = "MANIFEST.json"
PROBES = "fidelity.jsonl"
FIDELITY_FOLDER = "fidelity"
_UNSEALED = {MANIFEST, "MANIFEST.sig", MANIFEST + ".part", "bundle.yaml.part"}
_COMMIT = re.compile(r"[0-9a-f]{40}")
Identifier = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
PositiveFinite = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelRef(_Data):
    """Which language model the bundle was built on, and where its files may be found."""

    id: str
    """The served name, e.g. google/gemma-3-270m; the metric label."""
    revision: str | None = None
    path: str | None = None
    """A local folder, absolute or relative to the bundle."""
    package: str | None = None
    """A package of the index that carries the weights (a closed list in `model_store`)."""
    tokenizer_digest: str | None = None
    weights_digest: str | None = None


def _stays_inside(path: str) -> bool:
    return not (path.startswith("/") or ".." in path.split("/") or "\\" in path)


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Scalar = str | int | float | bool


class HubRef(_Data):
    """A folder or file in a repository of the Hugging Face hub."""

    repo: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$")]
    revision: Annotated[str, Field(min_length=1)] = "main"
    """Branch, tag or commit; sealing replaces it by the commit."""
    path: str = "."
    """Inside the repository; `.` means the files at its top, not the folders there."""

    @field_validator("path")
    @classmethod
    def _inside(cls, value: str) -> str:
        if not _stays_inside(value):
            raise ValueError(f"found {value!r}, expected a path inside the repository, as a/b")
        return "/".join(PurePosixPath(value).parts) or "."


class SAELensRef(_Data):
    """An SAE by the names that SAELens gives it; `sae_releases` says where that is."""

    release: str
    id: str
    revision: Annotated[str, Field(min_length=1)] = "main"
    """Of the repository that holds it; sealing replaces it by the commit."""


class SAERef(_Data):
    """One sparse autoencoder: where its files are and the stream it reads.

    Exactly one of `path`, `hub` and `saelens` says where.
    """

    path: str | None = None
    """Folder or file, relative to the bundle; or absolute, where bundles share one."""
    hub: HubRef | None = None
    saelens: SAELensRef | None = None
    hook_point: str
    hints: Mapping[str, Scalar] = {}
    """What the files leave out, as `load_sae` takes it; wins over what the release says."""
    files: Mapping[str, Sha256] = {}
    """sha256 of each file that is used, written by sealing where the SAE is not in the bundle."""

    @field_validator("hints", mode="before")
    @classmethod
    def _scalars(cls, value: object) -> object:
        if not isinstance(value, dict):
            raise ValueError(f"found {type(value).__name__}, expected a mapping, as {{k: 50}}")
        for key, hint in value.items():
            if not isinstance(key, str) or not key.isidentifier() or key == "path":
                raise ValueError(f"found the key {key!r}, expected the name of a hint, such as k")
            if not isinstance(hint, Scalar):
                raise ValueError(
                    f"{key}: found {type(hint).__name__}, expected text, a number, true or false"
                )
            if isinstance(hint, float) and not math.isfinite(hint):
                raise ValueError(f"{key}: found {hint}, expected a finite number")
        return value

    @field_validator("files")
    @classmethod
    def _below(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        for name in value:
            if not _stays_inside(name):
                raise ValueError(f"found the name {name!r}, expected one below the SAE's folder")
        return value

    @model_validator(mode="after")
    def _one_place(self) -> SAERef:
        places = {"path": self.path, "hub": self.hub, "saelens": self.saelens}
        found = [name for name, place in places.items() if place is not None]
        if len(found) != 1:
            raise ValueError(
                f"found {' and '.join(found) or 'none'}, expected exactly one of path, hub, saelens"
            )
        return self

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit; None for a path."""
        place = self.hub or self.saelens
        return None if place is None else place.revision

    @property
    def is_fixed(self) -> bool:
        """Whether what it names cannot change: a path, or a commit of a repository."""
        return self.revision is None or _COMMIT.fullmatch(self.revision) is not None

    def is_inside(self, folder: Path) -> bool:
        """Whether the SAE is in the bundle at `folder`, and so among its own files."""
        if self.path is None:
            return False
        return (folder / self.path).resolve().is_relative_to(folder.resolve())


class DenseHeadRef(_Data):
    """A dense head; its tensors are dense/<name>/weight [d_in] and dense/<name>/bias []."""

    hook_point: str


class LatentRef(_Data):
    """One latent of a cluster."""

    sae: str
    id: Annotated[int, Field(ge=0)]
    weight: FiniteFloat
    scale: PositiveFinite = 1.0
    label: str = ""


class FusionSpec(_Data):
    """logit = bias + sae * sae_logit + dense * dense_logit."""

    sae: FiniteFloat = 1.0
    dense: FiniteFloat = 0.0
    bias: FiniteFloat = 0.0


class AggregateModel(_Data):
    """How token logits become a running score."""

    kind: Literal["max_rolling_mean", "max", "mean", "ema"] = "max_rolling_mean"
    window: PositiveInt = 16
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.1
    min_evidence_tokens: Annotated[int, Field(ge=0)] = 3
    evidence_floor: FiniteFloat = 0.0


class Thresholds(_Data):
    """On the aggregated fused logit; an episode ends where the score falls below `clear`."""

    flag: FiniteFloat
    alert: FiniteFloat
    clear: FiniteFloat

    @model_validator(mode="after")
    def _ordered(self) -> Thresholds:
        if not self.clear <= self.flag < self.alert:
            raise ValueError(
                f"found clear {self.clear}, flag {self.flag}, alert {self.alert}, "
                "expected clear <= flag < alert"
            )
        return self


class SoloThreshold(_Data):
    """Where one source alone would flag and alert; puts it on the common scale."""

    flag: FiniteFloat
    alert: FiniteFloat

    @model_validator(mode="after")
    def _ordered(self) -> SoloThreshold:
        if not self.flag < self.alert:
            raise ValueError(f"found flag {self.flag}, alert {self.alert}, expected flag < alert")
        return self


class SoloThresholds(_Data):
    """The same for both sources; absent where never calibrated."""

    dense: SoloThreshold | None = None
    sae: SoloThreshold | None = None


class ClusterModel(_Data):
    """One risk: its latents, its dense head, how both are read, and when it counts."""

    id: Identifier
    title: str
    severity: Severity
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)] = (Stage.PROMPT, Stage.COMPLETION)
    latents: tuple[LatentRef, ...] = ()
    transform: Literal["identity", "clip", "step"] = "identity"
    dense_head: str | None = None
    fusion: FusionSpec = FusionSpec()
    aggregate: AggregateModel = AggregateModel()
    thresholds: Thresholds
    solo: SoloThresholds = SoloThresholds()
    calibration: str | None = None

    @model_validator(mode="after")
    def _readable(self) -> ClusterModel:
        if not self.latents and self.dense_head is None:
            raise ValueError("found neither latents nor dense_head, expected at least one")
        floor = self.aggregate.evidence_floor
        if self.aggregate.min_evidence_tokens > 0 and self.thresholds.flag <= floor:
            raise ValueError(
                f"thresholds.flag: found {self.thresholds.flag}, expected above "
                f"aggregate.evidence_floor {floor} (the gate holds scores at the floor)"
            )
        return self


class RuleCondition(_Data):
    """One cluster above or below its flag or alert threshold, or a number."""

    cluster: str
    above: Literal["flag", "alert"] | FiniteFloat | None = None
    below: Literal["flag", "alert"] | FiniteFloat | None = None

    @model_validator(mode="after")
    def _one_side(self) -> RuleCondition:
        if (self.above is None) == (self.below is None):
            raise ValueError("expected exactly one of above, below")
        return self


class RuleModel(_Data):
    """A joint condition: fires when all its conditions hold."""

    id: Identifier
    all: Annotated[tuple[RuleCondition, ...], Field(min_length=1)]
    severity: Severity


class PolicyModel(_Data):
    """What to do with the scores: only observe, or ask the caller to block."""

    mode: Mode = Mode.MONITOR
    on_error: Literal["allow", "block"] = "allow"
    """What to answer when the deadline passes or the audit log cannot be written."""
    deadline_ms: PositiveInt = 2000
    clusters: tuple[str, ...] | None = None
    """Clusters this policy looks at; absent means all."""


class BundleSpec(_Data):
    """bundle.yaml."""

    name: Identifier
    version: PositiveInt
    model: ModelRef
    saes: Mapping[Identifier, SAERef] = {}
    dense_heads: Mapping[str, DenseHeadRef] = {}
    clusters: Annotated[tuple[ClusterModel, ...], Field(min_length=1)]
    rules: tuple[RuleModel, ...] = ()
    policies: Mapping[str, PolicyModel]

    @model_validator(mode="after")
    def _references(self) -> BundleSpec:
        ids = [cluster.id for cluster in self.clusters]
        for cluster_id in {i for i in ids if ids.count(i) > 1}:
            raise ValueError(f"clusters: found {cluster_id} more than once, expected unique ids")
        if "default" not in self.policies:
            raise ValueError(f"policies: found {sorted(self.policies)}, expected one named default")
        for cluster in self.clusters:
            for latent in cluster.latents:
                _known(f"clusters.{cluster.id}.latents.sae", latent.sae, self.saes)
            if cluster.dense_head is not None:
                _known(f"clusters.{cluster.id}.dense_head", cluster.dense_head, self.dense_heads)
        for rule in self.rules:
            for condition in rule.all:
                _known(f"rules.{rule.id}.cluster", condition.cluster, ids)
        for name, policy in self.policies.items():
            for cluster_id in policy.clusters or ():
                _known(f"policies.{name}.clusters", cluster_id, ids)
        return self


def _known(key: str, found: str, known: Mapping[str, object] | list[str]) -> None:
    if found not in known:
        raise ValueError(f"{key}: found {found!r}, expected one of {sorted(known)}")


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

    @property
    def label(self) -> str:
        """name@version."""
        return f"{self.spec.name}@{self.spec.version}"

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


def parse_spec(text: str, name: str) -> BundleSpec:
    """The text of a bundle.yaml, validated; `name` is for messages.

    Raises:
        BundleError: not YAML, an unknown key or a wrong value.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BundleError(f"{name}: not readable as YAML: {error}") from error
    if not isinstance(content, dict):
        raise BundleError(f"{name}: found {type(content).__name__}, expected a mapping")
    try:
        return BundleSpec.model_validate(content)
    except ValidationError as error:
        raise BundleError("; ".join(_explain(name, content, error))) from error


def _explain(name: str, content: object, error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors():
        where: object = content
        key = []
        for part in item["loc"]:
            key.append(str(part))
            where = _descend(where, part)
            if isinstance(where, dict) and isinstance(part, int) and "id" in where:
                key[-1] = str(where["id"])
        message = item["msg"].removeprefix("Value error, ")
        found = "" if item["type"] == "value_error" else f" (found {item['input']!r:.80})"
        lines.append(f"{name}: {'.'.join(key) or 'bundle'}: {message}{found}")
    return lines


def _descend(value: object, part: str | int) -> object:
    if isinstance(value, dict):
        return value.get(part)
    if isinstance(value, list) and isinstance(part, int) and part < len(value):
        return value[part]
    return None


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
