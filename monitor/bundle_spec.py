"""bundle.yaml: what may stand in it, checked by pydantic; every error names file, key and value."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import yaml
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

from monitor.errors import BundleError
from monitor.records import AuditLevel, Mode, Severity, Stage
from sae_core.aggregation import AggregateKind

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
            if key in ("subfolder", "weights_file") and not _stays_inside(str(hint)):
                raise ValueError(f"{key}: found {hint!r}, expected a place inside the SAE's path")
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

    kind: AggregateKind = "max_rolling_mean"
    window: PositiveInt = 16
    k: PositiveInt = 4
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.1
    min_evidence_tokens: Annotated[int, Field(ge=0)] = 3
    evidence_floor: FiniteFloat = 0.0

    @model_validator(mode="after")
    def _k_fits(self) -> AggregateModel:
        if self.kind == "k_of_window" and self.k > self.window:
            raise ValueError(f"k: found {self.k}, expected at most the window of {self.window}")
        return self


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
    categories: tuple[str, ...] = ()
    """Categories of labelled rows that are this risk's, `*` for every harmful one; what
    `evaluate` counts as its positives. Empty means the category of the cluster's own id."""

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
    ranked_by: str | None = None
    """The cluster whose score is the policy's overall score, as far as the verdict agrees; absent
    means the largest of all."""
    audit_level: AuditLevel | None = None
    """How much the audit log keeps; never more than the server's own level, which stands here
    where it is absent."""


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
            if policy.ranked_by is not None:
                looked_at = list(policy.clusters or ids)
                _known(f"policies.{name}.ranked_by", policy.ranked_by, looked_at)
        return self


def _known(key: str, found: str, known: Mapping[str, object] | list[str]) -> None:
    if found not in known:
        raise ValueError(f"{key}: found {found!r}, expected one of {sorted(known)}")


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
    return validate_spec(content, name)


def validate_spec(content: Mapping[str, object], name: str) -> BundleSpec:
    """What a bundle.yaml says, validated; BundleError names key, found and expected."""
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
