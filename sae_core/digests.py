"""What an SAE is, as one digest; a calibration holds for it and no other. Light: no tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping


def sae_digest(
    files: Mapping[str, str], hook_point: str, hints: Mapping[str, str | int | float | bool]
) -> str:
    """sha256 over an SAE's files, where it reads and how.

    Args:
        files: sha256 by name, relative to the SAE's folder.
        hints: What `load_sae` is told besides.
    """
    said = {"files": dict(files), "hook_point": hook_point, "hints": dict(hints)}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
