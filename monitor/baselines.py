"""What live traffic is compared with: a calibration artefact's baseline, where it applies here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from monitor.bundle import Bundle
from monitor.errors import BundleError
from sae_core.baseline import Baseline
from sae_core.calibration import CalibrationError, upper_bound
from sae_core.drift import ScoreBins
from sae_core.heads import ClusterHeads

ZONES = ("flag", "alert")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What traffic like the calibration's does."""

    baseline: Baseline
    scores: Mapping[str, ScoreBins]
    """By cluster: how the baseline's texts score where it says so, else those of the thresholds."""
    rates: Mapping[str, Mapping[str, float]]
    """By cluster, then by zone: the bound of the share of benign texts that reach it."""
    policy: str
    """The policy whose rates those of `verdicts` are."""
    verdicts: Mapping[str, float]
    """By zone: the bound of the policy's own, which is that of its clusters without rules."""


def find_expected(
    bundle: Bundle, facts: Mapping[str, object], heads: ClusterHeads
) -> tuple[Expected | None, str]:
    """The first artefact's baseline that was made with exactly these facts; or why there is none.

    Args:
        facts: as `served.calibration_facts`.

    Raises:
        BundleError: a baseline that is not of the form that `calibrate` writes.
    """
    paths = dict.fromkeys(c.calibration for c in bundle.spec.clusters if c.calibration is not None)
    why = "the bundle has no calibration artefact"
    for path in paths:
        artefact: Mapping[str, Any] = bundle.calibration[path]
        differing = [key for key, found in facts.items() if artefact.get(key) != found]
        content = artefact.get("baseline")
        if differing:
            why = f"{path} was made with another {differing[0]}"
        elif content is None:
            why = f"{path} has no baseline (`sae-monitor bundle baseline` adds one)"
        else:
            try:
                return _expected(path, artefact, content, heads), ""
            except CalibrationError as error:
                raise BundleError(str(error)) from error
    return None, why


def _expected(
    path: str, artefact: Mapping[str, Any], content: Any, heads: ClusterHeads
) -> Expected:
    if not isinstance(content, dict):
        found = type(content).__name__
        raise CalibrationError(f"{path}: baseline: found {found}, expected an object")
    baseline = Baseline.from_json(content, path)
    if baseline.latents != heads.latents:
        raise CalibrationError(
            f"{path}: baseline: latents: found {len(baseline.latents)} latents, expected the "
            f"{heads.n_latents} that are registered, in their order"
        )
    clusters: Mapping[str, Any] = artefact.get("clusters") or {}
    try:
        confidence = float(artefact["policy"]["fused"]["flag"]["confidence"])
        n = int(artefact["policy"]["fused"]["flag"]["n_benign"])
        verdicts = artefact.get("verdicts") or artefact["policy"]["fused"]
        scored = content.get("scores") or {}
        return Expected(
            baseline=baseline,
            scores={
                name: ScoreBins.of(scored.get(name) or entry["benign_scores"])
                for name, entry in clusters.items()
            },
            rates={
                name: {
                    zone: upper_bound(round(entry["spend"][zone] * n), n, confidence)
                    for zone in ZONES
                }
                for name, entry in clusters.items()
            },
            policy=str(artefact.get("policy_name", "default")),
            verdicts={zone: float(verdicts[zone]["upper_bound"]) for zone in ZONES},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CalibrationError(
            f"{path}: found {type(error).__name__} {error}, expected what `sae-monitor calibrate` "
            "writes"
        ) from error
