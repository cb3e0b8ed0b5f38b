"""Processes of other libraries, each in its own environment, that score when told to."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from engine_parts.measuring import say
from engine_parts.ours import Ours
from engine_parts.setting import SAE_ID, Setting
from sae_core.hook_points import parse_hook_point
from sae_core.language_model.model import Segment

TL_NAME = "google/gemma-3-270m"
"""TransformerLens keeps this model's facts by name; the weights that it gets are our folder's."""
RESID_TOLERANCE = 1e-3
"""Of a token's norm. TransformerLens orders its float32 operations otherwise: 1.5e-5 was seen."""
ACT_TOLERANCE = 1e-3
"""Of the threshold: this near to it a latent may be active on one side only."""


class Peer:
    """One process with its models loaded; a context that ends it."""

    def __init__(
        self, kind: str, python: str, ours: Ours, setting: Setting, folder: Path, threads: int
    ) -> None:
        self.kind = kind
        given = {
            "kind": kind,
            "threads": threads,
            "model": str(setting.model),
            "tl_name": TL_NAME,
            "sae": str(setting.bundle / "saes" / SAE_ID),
            "hook_point": setting.hook_point,
            "n_layers": setting.n_layers,
            "latent_ids": ours.served.scorer.heads.latent_ids[SAE_ID],
            "batch": str(folder / "batch.json"),
            "mixed": str(folder / "mixed.json"),
        }
        worker = Path(__file__).with_name("peer_worker.py")
        # Its models are on disk, and its folder's modules are ours: -P keeps them out of its way.
        command = [
            "env",
            "-u",
            "GOMP_SPINCOUNT",
            "-u",
            "OMP_WAIT_POLICY",
            f"OMP_NUM_THREADS={threads}",
            "HF_HUB_OFFLINE=1",
        ]
        command += [python, "-P", str(worker), json.dumps(given)]
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives with the process
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        say(f"loading {kind}")
        self._answer()

    def run(self, side: str, save: Path | None = None) -> float:
        """Seconds of one pass, measured there."""
        asked = {"run": side} | ({} if save is None else {"save": str(save)})
        assert self._process.stdin
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            said = self._errors.read()[-3000:]
            raise SystemExit(f"{self.kind} ended with code {self._process.wait()}:\n{said}")
        found: dict[str, Any] = json.loads(line)
        return found


def write_texts(setting: Setting, folder: Path, mixed: list[list[int]]) -> None:
    """What every peer reads."""
    (folder / "batch.json").write_text(json.dumps(setting.batch()))
    (folder / "mixed.json").write_text(json.dumps(mixed))


def compared(ours: Ours, setting: Setting, saved: Path) -> dict[str, Any]:
    """What a peer saved against ours: residual stream and registered latents of the same tokens.

    The residual stream is left out where ours has none to show.
    """
    texts, model = setting.batch(), ours.language_model
    acts = np.concatenate([result.latent_acts for result in ours.score(texts)])
    with np.load(saved) as file:
        their_resid = file["resid"].reshape(len(acts), -1)
        their_acts = file["latent_acts"].reshape(acts.shape)
    off = None
    if model is not None:
        segments = [Segment(model.open_stream(), text) for text in texts]
        resid = model.step(segments)[parse_hook_point(setting.hook_point)].float().numpy()
        distance = np.linalg.norm(resid - their_resid, axis=1)
        off = float((distance / np.linalg.norm(their_resid, axis=1)).max())
    bound = ACT_TOLERANCE * setting.threshold
    larger = np.maximum(acts, their_acts)
    both = (acts != 0) & (their_acts != 0)
    differs = (np.abs(acts - their_acts) > bound + ACT_TOLERANCE * larger) & (
        both | (np.abs(larger - setting.threshold) > bound)
    )
    return {
        "resid_relative": off,
        "latents_active": int((acts != 0).sum()),
        "latents_that_differ": int(differs.sum()),
        "same": (off is None or off < RESID_TOLERANCE) and not bool(differs.any()),
    }
