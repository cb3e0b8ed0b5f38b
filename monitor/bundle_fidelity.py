"""Writes what a bundle's SAEs are held to: probe texts, and the bands around what they give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from monitor.bundle import FIDELITY_FOLDER, MANIFEST, PROBES
from monitor.errors import BundleError
from monitor.fidelity import measure_fidelity
from monitor.served import Served
from sae_core.sae import SAE
from sae_core.training.probes import PROBES as GENERAL_PROBES
from sae_core.training.probes import probe_rows

L0_APART = 2.0
"""Factor between measured and published L0 from which on something is probably wrong."""


class Outcome(NamedTuple):
    """What was written, and what speaks against it; a line each."""

    written: tuple[str, ...]
    doubts: tuple[str, ...]


def write_default_probes(folder: Path) -> str | None:
    """Writes fidelity.jsonl with general prose where there is none; its name where it did.

    Raises:
        BundleError: The bundle is sealed.
    """
    path = folder / PROBES
    has_some = path.exists() and path.read_text(encoding="utf-8").strip()
    if has_some or not (folder / "bundle.yaml").exists():
        return None
    _check_unsealed(folder)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in probe_rows(GENERAL_PROBES)]
    path.write_text("".join(lines), encoding="utf-8")
    return PROBES


def write_bands(served: Served, *, force: bool) -> Outcome:
    """Measures every SAE and writes fidelity/<id>.json, unless there are doubts and no `force`.

    Raises:
        BundleError: The bundle is sealed, or has no probe texts.
    """
    folder = served.bundle.folder
    _check_unsealed(folder)
    doubts, contents = [], {}
    for sae_id, (point, sae) in served.saes.items():
        measured, better = measure_fidelity(served, sae_id)
        contents[sae_id] = measured.to_json()
        for place in better[:3]:
            doubts.append(
                f"SAE {sae_id}: FVU is {measured.fvu:.3g} at {point} and "
                f"{place.measured.fvu:.3g} at {place.hook_point}, where it fits better"
            )
        if measured.fvu is not None and measured.fvu >= 1:
            doubts.append(
                f"SAE {sae_id}: FVU is {measured.fvu:.3g} at {point}, expected below 1 "
                "(a constant reconstructs better)"
            )
        published = _published_l0(sae)
        if published and not 1 / L0_APART < (measured.l0 + 1e-9) / published < L0_APART:
            doubts.append(f"SAE {sae_id}: L0 is {measured.l0:.3g}, its card says {published:.3g}")
    if doubts and not force:
        return Outcome((), (*doubts, "nothing was written; --force writes all the same"))
    written = []
    for sae_id, content in contents.items():
        path = folder / FIDELITY_FOLDER / f"{sae_id}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        fvu = "not measured" if content["fvu"] is None else f"{content['fvu']:.4g}"
        n_silent = sum(count == 0 for count in content["firings"].values())
        written.append(
            f"{FIDELITY_FOLDER}/{path.name}: FVU {fvu}, L0 {content['l0']:.4g}; {n_silent} of "
            f"{len(content['firings'])} registered latents fire on no probe text and are not held"
        )
    return Outcome(tuple(written), tuple(doubts))


def _published_l0(sae: SAE) -> float | None:
    """Active latents a token as the SAE's own card has them, where it does."""
    held_out = sae.card.facts.get("held_out")
    nested = held_out.get("l0") if isinstance(held_out, dict) else None
    for value in (sae.card.facts.get("l0"), nested, sae.config.k):
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


def _check_unsealed(folder: Path) -> None:
    if (folder / MANIFEST).exists():
        raise BundleError(
            f"bundle: found {MANIFEST} in {folder}, expected a bundle that is not sealed "
            "(remove it, measure, and seal again)"
        )
