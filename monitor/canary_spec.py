"""canaries.jsonl and canaries/expected.json: texts that must alert or pass, and what they gave.

A canary's verdict is for its author to say. What it scored where all was well is measured
(`sae-monitor bundle measure`, `calibrate`) and kept beside it, with a tolerance for each data type.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from monitor.bundle_spec import BundleSpec
from monitor.errors import BundleError
from monitor.records import Stage, Verdict

CANARIES = "canaries.jsonl"
EXPECTED = "canaries/expected.json"

TOLERANCES = {"float32": 0.01, "bfloat16": 1.0, "int8": 2.0}
"""Of max(1, |score|), by data type of the forward pass. On the default bundle bfloat16 moves them
by up to 0.39 and the shape of the batch, in float32, by 8e-7 (benchmarks/LOG.md, 2026-11-24). int8
was not measured; it has to give every canary's verdict before it starts."""


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Canary(_Data):
    """One text whose verdict is known."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    text: Annotated[str, Field(min_length=1)]
    stage: Stage = Stage.PROMPT
    verdict: Verdict
    """pass: no cluster flags. flag, alert: `cluster` gets at least this."""
    cluster: str | None = None

    @model_validator(mode="after")
    def _raises_something(self) -> Canary:
        if (self.verdict is Verdict.PASS) != (self.cluster is None):
            raise ValueError(
                f"cluster: found {self.cluster}, expected one with flag and alert, none with pass"
            )
        return self


class ExpectedScore(_Data):
    """One cluster's aggregated logits on one canary; None where it had none."""

    fused: FiniteFloat | None
    dense: FiniteFloat | None
    sae: FiniteFloat | None


class ExpectedLatent(_Data):
    """One registered latent over all canaries together."""

    total: FiniteFloat
    """Sum of its activations."""
    firings: NonNegativeInt
    """Tokens on which it was active."""


class CanaryExpectation(_Data):
    """What the canaries gave when they were measured."""

    schema_: Literal[1] = Field(alias="schema")
    measured_on: Mapping[str, object]
    """Digests of model, tokenizer, SAEs and heads, data type, backend and date."""
    tolerance: Mapping[str, PositiveFloat]
    """By data type; see `TOLERANCES`."""
    scores: Mapping[str, Mapping[str, ExpectedScore]]
    """By canary, then by cluster."""
    latents: Mapping[str, Mapping[NonNegativeInt, ExpectedLatent]]
    """By SAE, then by latent."""


def read_canaries(folder: Path, spec: BundleSpec) -> tuple[Canary, ...]:
    """The canaries of a bundle's folder; none where it has no such file.

    Raises:
        BundleError: a line that is no canary, an id twice, or a cluster that is not registered or
            does not look at the stage.
    """
    path = folder / CANARIES
    if not path.exists():
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BundleError(f"{CANARIES}: not readable as UTF-8: {error}") from error
    canaries: list[Canary] = []
    stages = {cluster.id: cluster.stages for cluster in spec.clusters}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{CANARIES}: line {number}"
        try:
            canary = Canary.model_validate_json(line)
        except ValidationError as error:
            raise BundleError(f"{where}: {_first(error)}") from error
        if canary.id in {other.id for other in canaries}:
            raise BundleError(f"{where}: id: found {canary.id} twice, expected once")
        if canary.cluster is not None and canary.stage not in stages.get(canary.cluster, ()):
            raise BundleError(
                f"{where}: cluster: found {canary.cluster}, expected one of {', '.join(stages)} "
                f"that looks at the stage {canary.stage}"
            )
        canaries.append(canary)
    return tuple(canaries)


def read_expectation(folder: Path) -> CanaryExpectation | None:
    """What the canaries are held to beside their verdicts; None where it was never measured.

    Raises:
        BundleError: the file is not of that form.
    """
    path = folder / EXPECTED
    if not path.exists():
        return None
    try:
        return CanaryExpectation.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BundleError(f"{EXPECTED}: {_first(error)}") from error


def write_expectation(folder: Path, expectation: CanaryExpectation) -> None:
    """Writes canaries/expected.json below `folder`."""
    path = folder / EXPECTED
    path.parent.mkdir(exist_ok=True)
    content = expectation.model_dump(mode="json", by_alias=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _first(error: ValidationError) -> str:
    """The first of pydantic's problems as one clause."""
    item = error.errors()[0]
    key = ".".join(map(str, item["loc"]))
    message = item["msg"].removeprefix("Value error, ")
    found = "" if item["type"] == "value_error" else f" (found {item['input']!r:.80})"
    return f"{key}: {message}{found}" if key else f"{message}{found}"
