"""A changed copy of a bundle, sealed: whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from monitor.bundle import MANIFEST, Bundle, load_unsealed, seal
from monitor.errors import BundleError


def sealed_copy(bundle: Bundle, out: Path, edit: Callable[[Path], None]) -> str:
    """Copies the bundle to `out`, seals what `edit` made of the copy, and returns its digest.

    Args:
        edit: changes the files of the unsealed copy that it is given.

    Raises:
        BundleError: `out` is there already, or the copy is not a valid bundle.
    """
    if out.exists():
        raise BundleError(f"--out: found {out}, expected a folder that is not there yet")
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        shutil.copytree(bundle.folder, part)
        (part / MANIFEST).unlink(missing_ok=True)
        (part / (MANIFEST.removesuffix(".json") + ".sig")).unlink(missing_ok=True)
        edit(part)
        load_unsealed(part)
        digest = seal(part)
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return digest
