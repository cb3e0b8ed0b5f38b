"""A training run on disk, complete: the learners, the buffer, and where in the data it stood.

checkpoint/run.json               settings, counts, digest of the tokens read so far
checkpoint/buffer.safetensors     activations not yet trained on, and the shuffle's generator
checkpoint/learner-N.safetensors  one per SAE: parameters, Adam moments, counters
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_core.errors import TrainingError

RUN, BUFFER = "run.json", "buffer.safetensors"


class Checkpoint(NamedTuple):
    """Everything that a run needs to go on with the same bits."""

    identity: Mapping[str, Any]
    """What two runs must share to be one run: settings, hook points, width."""
    n_tokens: int
    n_contexts: int
    seconds: float
    """Wall time of training so far."""
    data_digest: str
    """sha256 over the tokens of those contexts."""
    buffer: Mapping[str, Tensor]
    learners: Sequence[Mapping[str, Tensor]]
    """In the order of `saes` in the identity; without it there is one for each hook point."""


def has_checkpoint(folder: Path) -> bool:
    """Whether a run can be taken up there."""
    return any((place / RUN).is_file() for place in (folder, _old(folder)))


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replaces the one in `folder`; being killed at any moment leaves one that is whole.

    Raises TrainingError where it cannot be written.
    """
    new, old = folder.with_name(folder.name + ".new"), _old(folder)
    facts = {
        name: value
        for name, value in checkpoint._asdict().items()
        if name not in ("buffer", "learners")
    }
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        _save(checkpoint.buffer, new / BUFFER)
        for index, tensors in enumerate(checkpoint.learners):
            _save(tensors, new / f"learner-{index}.safetensors")
        (new / RUN).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"checkpoint {folder}: cannot be written ({error})") from error


def read_checkpoint(folder: Path, identity: Mapping[str, Any]) -> Checkpoint | None:
    """The one in `folder`, None where there is none.

    Raises TrainingError for one that is damaged, or of a run that is another by `identity`.
    """
    place = next((p for p in (folder, _old(folder)) if (p / RUN).is_file()), None)
    if place is None:
        return None
    try:
        facts = json.loads((place / RUN).read_text(encoding="utf-8"))
        found = facts["identity"]
        expected = json.loads(json.dumps(identity))
        different = [
            f"{name} {found.get(name)!r}, expected {expected.get(name)!r}"
            for name in sorted(found.keys() | expected.keys())
            if found.get(name) != expected.get(name)
        ]
        if different:
            raise TrainingError(f"checkpoint {place}: was made with {'; '.join(different)}")
        learners = [
            load_file(place / f"learner-{index}.safetensors")
            for index in range(len(identity.get("saes", identity["hook_points"])))
        ]
        return Checkpoint(buffer=load_file(place / BUFFER), learners=learners, **facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise TrainingError(f"checkpoint {place}: is damaged ({error})") from error


def remove_checkpoint(folder: Path) -> None:
    """Once the run's result is written."""
    for place in (folder, _old(folder)):
        shutil.rmtree(place, ignore_errors=True)


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
