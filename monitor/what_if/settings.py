"""A bundle and what would be otherwise, and which of it stored scores can answer.

Thresholds, aggregates, fusion weights, stages, rules and policies are read from scores that are
stored. Latents, SAEs, dense heads and the model make these scores: to change them is `replay`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from monitor.bundle import Bundle
from monitor.bundle_spec import BundleSpec, ClusterModel, validate_spec
from monitor.errors import SettingsError

CHANGEABLE = ("thresholds", "aggregate", "fusion", "stages")
"""Of a cluster."""
ALL_CLUSTERS = "*"


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a YAML file of changes: `clusters` by id, `rules`, `policies` by name."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: found {type(content).__name__}, expected a mapping")
    for key in content.keys() - {"clusters", "rules", "policies"}:
        raise SettingsError(f"{path}: found {key!r}, expected clusters, rules or policies")
    return content


def parse_assignment(text: str, spec: BundleSpec) -> dict[str, Any]:
    """`CLUSTER.KEY.NAME=VALUE` as the same kind of changes; `*` stands for every cluster."""
    place, equals, value = text.partition("=")
    ids = [ALL_CLUSTERS, *(cluster.id for cluster in spec.clusters)]
    owner = max((i for i in ids if place.startswith(f"{i}.")), key=len, default=None)
    if not equals or owner is None:
        raise SettingsError(
            f"--set {text}: expected CLUSTER.KEY=VALUE with a cluster of "
            f"{', '.join(ids)}, as {ids[1]}.thresholds.alert=3.5"
        )
    try:
        changed: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {text}: not readable as YAML: {error}") from None
    for key in reversed(place[len(owner) + 1 :].split(".")):
        changed = {key: changed}
    return {"clusters": {owner: changed}}


def changed_spec(spec: BundleSpec, changes: Sequence[Mapping[str, Any]]) -> BundleSpec:
    """The bundle with all changes, the later ones over the earlier.

    Raises:
        SettingsError: a cluster that the bundle does not have, or a key that makes scores.
        BundleError: what comes of it is not a valid bundle; names key, found and expected.
    """
    content = spec.model_dump(mode="json")
    clusters = {cluster["id"]: cluster for cluster in content["clusters"]}
    for change in changes:
        by_cluster = _mapping("clusters", change.get("clusters", {}))
        for name, values in by_cluster.items():
            if name != ALL_CLUSTERS and name not in clusters:
                raise SettingsError(
                    f"clusters: found {name!r}, expected one of {', '.join(sorted(clusters))}"
                )
            for key, value in _mapping(f"clusters.{name}", values).items():
                if key not in CHANGEABLE:
                    raise SettingsError(
                        f"clusters.{name}: found {key!r}, expected one of {', '.join(CHANGEABLE)}; "
                        "what makes the scores themselves can only be replayed"
                    )
                if key != "stages":
                    _check_names(
                        f"clusters.{name}.{key}", value, next(iter(clusters.values()))[key]
                    )
            for cluster in clusters.values() if name == ALL_CLUSTERS else (clusters[name],):
                _merge(cluster, values)
        if "rules" in change:
            content["rules"] = change["rules"]
        _merge(content["policies"], _mapping("policies", change.get("policies", {})))
    return validate_spec(content, "what-if")


def unanswerable(champion: Bundle, challenger: Bundle) -> dict[str, str]:
    """The challenger's clusters whose scores are not those in the champion's traces, and why."""
    reasons = {}
    known = {cluster.id: cluster for cluster in champion.spec.clusters}
    for cluster in challenger.spec.clusters:
        if cluster.id not in known:
            reasons[cluster.id] = "the champion does not have it"
            continue
        found = _other_scores(champion, challenger, known[cluster.id], cluster)
        if found:
            reasons[cluster.id] = "another " + ", another ".join(found)
    return reasons


def _other_scores(
    champion: Bundle, challenger: Bundle, before: ClusterModel, after: ClusterModel
) -> list[str]:
    found = []
    if _model(champion) != _model(challenger):
        found.append("model")
    if after.fusion.sae:
        if _latents(before) != _latents(after) or before.transform != after.transform:
            found.append("set of latents")
        digests = [bundle.sae_digests() for bundle in (champion, challenger)]
        saes = {latent.sae for latent in (*before.latents, *after.latents)}
        if any(digests[0].get(sae) != digests[1].get(sae) for sae in saes):
            found.append("SAE")
    if after.fusion.dense and not _same_head(champion, challenger, before, after):
        found.append("dense head")
    return found


def _model(bundle: Bundle) -> tuple[str | None, ...]:
    model = bundle.spec.model
    return model.weights_digest or model.id, model.tokenizer_digest


def _latents(cluster: ClusterModel) -> set[tuple[object, ...]]:
    return {(x.sae, x.id, x.weight, x.scale) for x in cluster.latents}


def _same_head(
    champion: Bundle, challenger: Bundle, before: ClusterModel, after: ClusterModel
) -> bool:
    if before.dense_head is None or after.dense_head is None:
        return before.dense_head is after.dense_head
    one, other = champion.dense_heads[before.dense_head], challenger.dense_heads[after.dense_head]
    places = (
        champion.spec.dense_heads[before.dense_head],
        challenger.spec.dense_heads[after.dense_head],
    )
    return (
        places[0] == places[1]
        and one.bias == other.bias
        and np.array_equal(one.weight, other.weight)
    )


def _check_names(where: str, value: object, known: Mapping[str, Any]) -> None:
    for name in _mapping(where, value):
        if name not in known:
            raise SettingsError(f"{where}: found {name!r}, expected one of {', '.join(known)}")


def _mapping(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SettingsError(f"{name}: found {type(value).__name__}, expected a mapping")
    return value


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
