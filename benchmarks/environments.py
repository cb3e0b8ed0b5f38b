"""Environments of their own for the libraries that benchmarks compare with, made on first use.

They stay in the user's cache. torch and transformers are those of constraints.txt, so that a peer
runs on the same kernels as we do. Needs the standard library only: peers' processes import it too.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

CACHE = Path.home() / ".cache" / "sae-monitor" / "benchmarks"
CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
PEERS = {"saelens": "sae-lens", "nnsight": "nnsight"}
"""Folder in the cache, and the package that it is for."""


def peer_python(name: str) -> str:
    """The interpreter of one of `PEERS`; installs it where it is not there yet."""
    folder = CACHE / name
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"installing {PEERS[name]} into {folder} (about two minutes)", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pins = folder / "constraints.txt"
        pins.write_text("\n".join(_pins()) + "\n")
        for package in ("torch", PEERS[name]):  # torch first: the CPU build that is pinned
            command = [python, "-m", "pip", "install", "--quiet", "-c", pins, package]
            subprocess.run(command, check=True)
        (folder / "ready").touch()
    return str(python)


def versions(python: str, *modules: str) -> dict[str, str]:
    """Which versions an interpreter has of some packages."""
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    done = subprocess.run(
        [python, "-c", code, *modules], capture_output=True, text=True, check=True
    )
    return dict(zip(modules, done.stdout.split(), strict=True))


def _pins() -> list[str]:
    text = CONSTRAINTS.read_text("utf-8")
    return re.findall(r"^(?:torch|transformers)==\S+", text, flags=re.MULTILINE)
