"""Published SAEs by the names that SAELens gives them: which repository, which path, what else.

`sae_releases.yaml` holds what is widely used. It wins over the registry of an installed sae_lens,
which is read, as data and without importing it, only for releases that the table does not know: so
a bundle means the same SAE on every machine, whatever is installed there.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from monitor.bundle_spec import Scalar
from monitor.errors import SAEStoreError

TABLE = Path(__file__).with_name("sae_releases.yaml")
NUMBERS = ("layer", "n", "step")
"""Variables of a pattern that are whole numbers."""
SCALE_IN_FILES = ("llama_scope", "llama_scope_r1_distill")
"""Formats of sae_lens whose own files hold the scale of their inputs; its registry repeats it."""
QWEN_SCOPE = re.compile(r"Qwen/SAE-Res-.+-W\d+K-L0_(?P<k>\d+)")
"""Where k is in the repository's name and nowhere else."""
_VARIABLE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedSAE:
    """Where one SAE of a release is, and what its publisher says of it."""

    repo: str
    path: str
    """Folder or file inside the repository."""
    model: str | None
    """The language model that it was trained on."""
    hook_point: str | None
    """What it reads, in TransformerLens's words; None where that is not one name."""
    hints: Mapping[str, Scalar]
    """What scoring needs and the files do not say; by the names that `load_sae` takes."""


def find_published(release: str, sae_id: str) -> PublishedSAE:
    """The SAE `sae_id` of `release`, both as SAELens names them.

    Raises:
        SAEStoreError: an unknown release or id, with the names that come near.
    """
    table = _table()
    families = [family for family in table.families if release in family.choices]
    if families:
        for family in families:
            found = family.find(release, sae_id, table.canonical)
            if found is not None:
                return found
        raise SAEStoreError(
            f"saelens.id: found {sae_id!r}, expected an SAE of {release}: "
            + "; ".join(family.expected(release, sae_id) for family in families)
        )
    registry = _installed_registry()
    if release in registry:
        return _from_registry(release, registry[release], sae_id)
    if "/" in release:
        raise SAEStoreError(
            f"saelens.release: found {release!r}, the name of a repository, expected "
            f"hub: {{repo: {release}, path: {sae_id}}}"
        )
    known = {name for family in table.families for name in family.choices} | registry.keys()
    hint = "" if registry else " (an installed sae-lens would add its own registry)"
    raise SAEStoreError(
        f"saelens.release: found {release!r}, which is not known{hint}; {near(release, known)}"
    )


def hints_of(repo: str, path: str) -> dict[str, Scalar]:
    """What `load_sae` must be told of files that come from there; mostly nothing."""
    if (match := QWEN_SCOPE.fullmatch(repo)) is not None:
        return {"k": int(match["k"])}
    hints: dict[str, Scalar] = {}
    for key, value in _table().hints.get(repo, {}).items():
        if not isinstance(value, dict):
            hints[key] = value
        elif path in value:
            hints[key] = value[path]
    return hints


def near(name: str, known: Iterable[str]) -> str:
    """Says which known names come near to `name`."""
    names = sorted(known)
    matches = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    return f"near: {', '.join(matches)}" if matches else f"known: {', '.join(names[:5])}, ..."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """Releases that follow one pattern."""

    choices: Mapping[str, Mapping[str, str]]
    """Release -> the variables that its name fixes."""
    templates: Mapping[str, str]
    ids: Mapping[str, str]

    def find(self, release: str, sae_id: str, canonical: Mapping[str, Any]) -> PublishedSAE | None:
        variables = {**self.choices[release], "id": sae_id}
        match = self._match(variables, sae_id)
        if match is not None:
            variables |= match
        path = self.ids.get(sae_id)
        if path is None:
            if match is None:
                return None
            if "{canonical}" in self.templates["path"]:
                sets = canonical.get(variables["set"], {})
                n = sets.get(variables["width"], {}).get(int(variables["layer"]))
                if n is None:
                    return None
                variables["canonical"] = str(n)
            path = _fill(self.templates["path"], variables)
        repo = _fill(self.templates["repo"], variables)
        hook_point = self.templates.get("hook_point")
        return PublishedSAE(
            repo=repo,
            path=path,
            model=_fill(self.templates["model"], variables),
            hook_point=None if hook_point is None else _fill(hook_point, variables),
            hints=hints_of(repo, path),
        )

    def expected(self, release: str, sae_id: str) -> str:
        """The ids of a release, for the message that one is none of them."""
        parts = [near(sae_id, self.ids)] if self.ids else []
        if "id" in self.templates:
            parts.append(_partly_filled(self.templates["id"], self.choices[release]))
        return ", ".join(parts)

    def _match(self, variables: Mapping[str, str], sae_id: str) -> dict[str, str] | None:
        if "id" not in self.templates:
            return None
        pattern = ""
        for text, name in _parts(self.templates["id"]):
            pattern += re.escape(text)
            if name in variables:
                pattern += re.escape(variables[name])
            elif name:
                pattern += f"(?P<{name}>{'[0-9]+' if name in NUMBERS else '[A-Za-z0-9_.-]+'})"
        match = re.fullmatch(pattern, sae_id)
        return None if match is None else match.groupdict()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    families: tuple[_Family, ...]
    canonical: Mapping[str, Mapping[str, Mapping[int, int]]]
    """Set of Gemma Scope -> width -> layer -> average l0."""
    hints: Mapping[str, Mapping[str, Any]]
    """Repository -> hint -> its value, or its value by path."""


@functools.cache
def _table() -> _Table:
    content = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return _Table(
        families=tuple(_read_family(entry) for entry in content["families"]),
        canonical={
            name: {
                width: dict(enumerate(by_layer)) if isinstance(by_layer, list) else by_layer
                for width, by_layer in widths.items()
            }
            for name, widths in content["canonical"].items()
        },
        hints={
            entry["repo"]: {key: value for key, value in entry.items() if key != "repo"}
            for entry in content["hints"]
        },
    )


def _read_family(entry: Mapping[str, Any]) -> _Family:
    axes = []
    for name, options in entry.get("with", {}).items():
        extra = options if isinstance(options, dict) else dict.fromkeys(options, {})
        axes.append([{name: option, **more} for option, more in extra.items()])
    choices = {}
    for combination in itertools.product(*axes):
        variables = {key: value for part in combination for key, value in part.items()}
        choices[_fill(entry["release"], variables)] = variables
    templates = {
        key: entry[key] for key in ("repo", "id", "path", "model", "hook_point") if key in entry
    }
    return _Family(choices=choices, templates=templates, ids=entry.get("ids", {}))


def _parts(template: str) -> list[tuple[str, str]]:
    """Pairs of literal text and the name of the variable after it, empty at the end."""
    pieces = _VARIABLE.split(template)
    return list(itertools.zip_longest(pieces[::2], pieces[1::2], fillvalue=""))


def _fill(template: str, variables: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda match: variables[match[1]], template)


def _partly_filled(template: str, variables: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda match: variables.get(match[1], match[1].upper()), template)


@functools.cache
def _installed_registry() -> Mapping[str, Any]:
    """The registry that an installed sae_lens carries; empty without one."""
    spec = importlib.util.find_spec("sae_lens")
    if spec is None or spec.origin is None:
        return {}
    path = Path(spec.origin).with_name("pretrained_saes.yaml")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 5 seconds without libyaml
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SAEStoreError(f"sae_lens: {path.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise SAEStoreError(f"sae_lens: {path.name}: found no mapping, expected release names")
    return content


def _from_registry(release: str, entry: Mapping[str, Any], sae_id: str) -> PublishedSAE:
    saes = {sae["id"]: sae for sae in entry["saes"]}
    if sae_id not in saes:
        raise SAEStoreError(
            f"saelens.id: found {sae_id!r}, expected an SAE of {release}; {near(sae_id, saes)}"
        )
    sae = saes[sae_id]
    overrides = entry.get("config_overrides") or {}
    hints = hints_of(entry["repo_id"], str(sae["path"]))
    if "norm_scaling_factor" in sae and entry.get("conversion_func") not in SCALE_IN_FILES:
        hints["norm_scaling_factor"] = sae["norm_scaling_factor"]
    if (overrides.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"):
        hints["center"] = True
    if "normalize_activations" in overrides:
        hints["normalize_activations"] = overrides["normalize_activations"]
    hook = re.match(r"blocks\.\d+\.(?:\w+\.)?hook_[a-z]+(?:_[a-z]+)*", sae_id)
    return PublishedSAE(
        repo=entry["repo_id"],
        path=str(sae["path"]),
        model=overrides.get("model_name", entry.get("model")),
        hook_point=overrides.get("hook_name", hook[0] if hook else None),
        hints=hints,
    )
