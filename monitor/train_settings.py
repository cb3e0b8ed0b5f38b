"""Every setting of `sae-monitor train-sae`: flags over a YAML file over defaults.

Keys of the file are the flags' names with underscores; it may also set what has no flag, by the
field names of `SAETrainConfig`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from monitor.errors import SettingsError
from sae_core.hook_points import HookPoint, parse_hook_point
from sae_core.training.sae_train_config import COUNTED, SAETrainConfig, planned_saes

RENAMED = {"arch": "architecture", "tokens": "total_tokens"}
"""Flags that are shorter than their field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """What one command trains, from what, and where it goes."""

    model: str
    """A model's folder, or `demo` for the embedded one."""
    data: tuple[Path, ...]
    """JSON lines with `text`, plain or gzipped, or folders of them."""
    hook_points: tuple[HookPoint, ...]
    out: Path
    """Gets one folder per SAE, named after it, and the checkpoint while training."""
    config: SAETrainConfig
    d_saes: tuple[int, ...]
    """Numbers of latents; there is an SAE of each at every hook point."""
    held_out_share: float = 0.01
    """Share of the documents that is not trained on but measured on, chosen by a hash."""
    held_out_tokens: int = 32_768
    loss_tokens: int = 2048
    """Tokens on which the whole model is run for the loss recovered; 0 leaves it out."""
    store_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the matrices on disk."""
    buffer_dir: Path | None = None
    """Where activations wait on disk; None keeps them in memory."""

    @property
    def checkpoint(self) -> Path:
        """Where a run that is under way is kept."""
        return self.out / "checkpoint"

    @property
    def folders(self) -> dict[HookPoint, Path]:
        """Where the SAEs of each hook point go."""
        return {hook_point: self.out / str(hook_point) for hook_point in self.hook_points}

    @property
    def sae_folders(self) -> list[Path]:
        """Where each SAE goes."""
        names = [str(hook_point) for hook_point in self.hook_points]
        return [self.out / name for name in planned_saes(self.config, names, self.d_saes)]


def load_train_settings(flags: Mapping[str, Any], path: Path | None) -> TrainSettings:
    """The settings that flags (None where not given) and the file at `path` make together.

    Raises:
        SettingsError: An unreadable file, an unknown key, a missing or impossible value.
        TrainingError: A value that training cannot have.
        HookPointError: A hook point that cannot be parsed.
    """
    given = _read(path) if path is not None else {}
    given |= {name: value for name, value in flags.items() if value not in (None, [])}
    fields = {field.name for field in dataclasses.fields(SAETrainConfig)}
    own = {field.name for field in dataclasses.fields(TrainSettings)} - {
        "config",
        "d_saes",
        "hook_points",
    }
    known = (fields - set(RENAMED.values())) | own | {"hook_point", "k", *RENAMED}
    if unknown := sorted(given.keys() - known):
        raise SettingsError(
            f"{path or 'flags'}: found {', '.join(unknown)}, expected {', '.join(sorted(known))}"
        )
    for name in ("model", "data", "hook_point", "out"):
        if name not in given:
            raise SettingsError(f"{name}: found none, expected --{name.replace('_', '-')}")
    hook_points = tuple(parse_hook_point(text) for text in _texts(given, "hook_point"))
    if len(set(hook_points)) < len(hook_points):
        raise SettingsError("hook_point: found one twice, expected each once")
    settings = {RENAMED.get(name, name): given[name] for name in given.keys() & {*fields, *RENAMED}}
    settings |= _l0_target(given)
    configs = _configs(settings)
    values: dict[str, Any] = {name: given[name] for name in given.keys() & own}
    values["data"] = tuple(Path(text) for text in _texts(given, "data"))
    for name in ("out", "buffer_dir"):
        if name in values:
            values[name] = Path(str(values[name]))
    values["model"] = str(values["model"])
    _check(values)
    return TrainSettings(
        **values,
        hook_points=hook_points,
        config=configs[0],
        d_saes=tuple(config.d_sae for config in configs),
    )


def _configs(settings: dict[str, Any]) -> list[SAETrainConfig]:
    """One for each number of latents that `d_sae` gives."""
    if "d_sae" not in settings:
        return [SAETrainConfig.of(settings)]
    given = settings["d_sae"]
    d_saes = given if isinstance(given, list) and given else [given]
    configs = [SAETrainConfig.of(settings | {"d_sae": d_sae}) for d_sae in d_saes]
    if len(set(d_saes)) < len(d_saes):
        raise SettingsError("d_sae: found one twice, expected each once")
    return configs


def _l0_target(given: Mapping[str, Any]) -> dict[str, Any]:
    """`k` for the architectures that count latents, `l0_target` for the others."""
    architecture = given.get("arch", SAETrainConfig.__dataclass_fields__["architecture"].default)
    right, wrong = ("k", "l0_target") if architecture in COUNTED else ("l0_target", "k")
    if wrong in given:
        raise SettingsError(f"{wrong}: found {given[wrong]!r}, expected {right} for {architecture}")
    return {"l0_target": given[right]} if right in given else {}


def _check(values: Mapping[str, Any]) -> None:
    share = values.get("held_out_share", 0.01)
    if not isinstance(share, float) or not 0 < share < 1:
        raise SettingsError(f"held_out_share: found {share!r}, expected between 0 and 1")
    for name, least in (("held_out_tokens", 1), ("loss_tokens", 0)):
        count = values.get(name, least)
        if type(count) is not int or count < least:
            raise SettingsError(f"{name}: found {count!r}, expected a whole number from {least}")
    if (found := values.get("store_dtype", "float32")) not in ("float32", "bfloat16"):
        raise SettingsError(f"store_dtype: found {found!r}, expected float32 or bfloat16")


def _texts(given: Mapping[str, Any], name: str) -> list[str]:
    value = given[name]
    if isinstance(value, str | Path):
        return [str(value)]
    if not isinstance(value, list | tuple) or not value:
        raise SettingsError(f"{name}: found {value!r}, expected one or a list")
    return [str(one) for one in value]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        line = " ".join(str(error).split())
        raise SettingsError(f"config file {path}: cannot be read ({line})") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingsError(f"config file {path}: found {content!r:.60}, expected keys and values")
    return content
