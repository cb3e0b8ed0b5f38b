"""What does it cost to encode registered latents only, against SAELens' encode of all?

The same weights and inputs go through a file to SAELens (installed by this benchmark into an
environment of its own), to our whole encoder and to slices of 16, 256 and 2,048 latents. Every
measurement is a process of its own: seconds of one encode (median, spread, and CPU seconds, which
other work on the machine disturbs less), seconds to load with a warm page cache, peak memory.
What comes out is compared with SAELens' at 2,048 latents, and the count of active latents at all.
The last row loads 256 latents of an SAE with a million (a file of holes, so its bytes are zeros).

    python benchmarks/encode.py [--quick] [--json FILE] [--threads N] [--latents N ...]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environments import CACHE, peer_python, versions

HEADER_BYTES = 1024
K = 64
ARCHITECTURES = {"relu": "standard", "jumprelu": "jumprelu", "topk": "topk"}
SLICES = (16, 256, 2048)
PAGE = 4096
THRESHOLD = 1.5
MOST_ACTS = 2**25
"""tokens x latents that are encoded at a time: 128 tokens of 262,144 latents."""
MARGIN = 1e-4
"""Activations differ by rounding: this near to its bar a latent may be active on one side only."""


def main() -> None:
    """Runs the parent, which prints the table, or one measurement that the parent asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="16k latents, width 640, 64 tokens")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=600, help="no new case after this")
    parser.add_argument("--latents", type=int, nargs="+", default=[16_384, 65_536, 262_144])
    parser.add_argument("--widths", type=int, nargs="+", default=[640, 2304])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        print(json.dumps(measure(json.loads(options.measure))))
        return
    parent(options)


def parent(options: argparse.Namespace) -> None:
    started = time.monotonic()
    peer = peer_python("saelens")
    peers = versions(peer, "sae-lens", "torch")
    facts = {
        "machine": cpu_name(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sae_lens": peers["sae-lens"],
        "sae_lens_torch": peers["torch"],
        "tokens": 64 if options.quick else options.tokens,
        "k": K,
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    sizes, widths = ([16_384], [640]) if options.quick else (options.latents, options.widths)
    rows: list[dict[str, Any]] = []
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="encode-") as name:
        folder = Path(name)
        if not options.quick:
            rows.append(million(options, folder))
            shutil.rmtree(folder / "sae")
        for d_sae in sizes:
            for d_in in widths:
                if time.monotonic() - started > options.seconds:
                    print(f"{d_sae} x {d_in}: left out, {options.seconds:.0f} s are over")
                    continue
                tokens = min(facts["tokens"], MOST_ACTS // d_sae)
                write_inputs(folder, d_in, tokens, d_sae)
                write_weights(folder, d_in, d_sae)
                for architecture in ARCHITECTURES:
                    write_head(folder, architecture, d_in, d_sae)
                    rows += case(options, peer, folder, architecture, d_in, d_sae)
                shutil.rmtree(folder / "sae")
    print(f"\n{time.monotonic() - started:.0f} s in all")
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")


def case(
    options: argparse.Namespace,
    peer: str,
    folder: Path,
    architecture: str,
    d_in: int,
    d_sae: int,
) -> list[dict[str, Any]]:
    """One SAE by SAELens, whole, and in slices."""
    tokens = len(np.load(folder / "x.npy"))
    print(f"\n{architecture}, {d_sae:,} latents, d_in {d_in}, {tokens} tokens")
    print(
        f"{'':<10}{'encode ms':>10}{'spread':>18}{'CPU ms':>9}{'x SAELens':>10}{'by CPU':>9}"
        f"{'load s':>8}{'peak MB':>9}{'read MB':>9}{'least':>8}  same"
    )
    given = {"folder": str(folder), "repeats": options.repeats}
    rows = []
    reference: dict[str, Any] | None = None
    for name in ("SAELens", "whole", *SLICES):
        python = peer if name == "SAELens" else sys.executable
        found = in_process(options, python, given | {"what": name})
        found |= {"architecture": architecture, "d_sae": d_sae, "d_in": d_in, "what": name}
        reference = reference or found
        found["speedup"] = reference["seconds"] / found["seconds"]
        found["cpu_speedup"] = reference["cpu_seconds"] / found["cpu_seconds"]
        found["same"] = "" if name == "SAELens" else compared(folder, architecture, name)
        rows.append(found)
        read = pages_read(folder, d_in, d_sae, name) if isinstance(name, int) else d_in * d_sae * 4
        least = d_in * (name if isinstance(name, int) else d_sae) * 4
        if architecture == "topk":
            read = least = d_in * d_sae * 4  # all are rivals
        found |= {"read_bytes": read, "least_bytes": least}
        spread = f"{found['fastest'] * 1e3:.1f}..{found['slowest'] * 1e3:.1f}"
        print(
            f"{name!s:<10}{found['seconds'] * 1e3:>10.1f}{spread:>18}"
            f"{found['cpu_seconds'] * 1e3:>9.1f}"
            f"{found['speedup']:>10.1f}{found['cpu_speedup']:>9.1f}{found['load_seconds']:>8.2f}"
            f"{found['peak_bytes'] / 1e6:>9.0f}{read / 1e6:>9.1f}{least / 1e6:>8.1f}  "
            f"{found['same']}",
            flush=True,
        )
    return rows


def million(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """256 of a million latents, 4,096 wide: 16 GB of W_enc in a file of holes.

    The page cache is warmed by reading the file once from front to back, as a download or a check
    of its sha256 does; what a cold load leaves in it are small pages, which take longer to map.
    """
    d_in, d_sae = 4096, 2**20
    (folder / "sae").mkdir()
    write_inputs(folder, d_in, 8, d_sae)
    write_head(folder, "relu", d_in, d_sae)
    with (folder / "sae" / "sae_weights.safetensors").open("rb") as file:
        for _ in range(0, 4 * d_in * d_sae, 2**26):
            file.read(2**26)
    found = in_process(
        options, sys.executable, {"folder": str(folder), "repeats": 1, "what": 256, "cold": True}
    )
    read = pages_read(folder, d_in, d_sae, 256)
    print(
        f"\n256 of {d_sae:,} latents, d_in {d_in}, float32, a file of holes: loaded in "
        f"{found['load_seconds']:.2f} s, peak memory {found['peak_bytes'] / 1e6:.0f} MB "
        f"({found['import_bytes'] / 1e6:.0f} MB of it after imports), {read / 1e9:.2f} GB of pages "
        f"hold them, {256 * d_in * 4 / 1e6:.1f} MB are theirs"
    )
    return found | {"architecture": "relu", "d_sae": d_sae, "d_in": d_in, "what": 256}


def in_process(options: argparse.Namespace, python: str, given: dict[str, Any]) -> dict[str, Any]:
    """A measurement in a process of its own."""
    command = [python, __file__, "--threads", str(options.threads), "--measure", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(f"{given['what']} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(given: dict[str, Any]) -> dict[str, Any]:
    """In the child: loads, encodes, saves what came out."""
    folder, what = Path(given["folder"]), given["what"]
    x = torch.from_numpy(np.load(folder / "x.npy"))
    ids = torch.from_numpy(np.load(folder / "ids.npy"))
    load: Callable[[], Callable[[torch.Tensor], torch.Tensor]]
    if what == "SAELens":
        from sae_lens import SAE as PeerSAE

        def load() -> Callable[[torch.Tensor], torch.Tensor]:
            return PeerSAE.load_from_disk(str(folder / "sae"), device="cpu").encode  # type: ignore[no-any-return]

    else:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        from sae_core.formats import load_sae

        def load() -> Callable[[torch.Tensor], torch.Tensor]:
            sae = load_sae(folder / "sae")
            if what == "whole":
                assert sae.weights
                return sae.encode
            return sae.slice(ids[:what])

    imported = peak_bytes()
    loads = []
    for _ in range(1 if given.get("cold") else 2):  # the first one warms the page cache
        encode = None
        started = time.perf_counter()
        encode = load()
        loads.append(time.perf_counter() - started)
    walls, cpus = [], []
    with torch.inference_mode():
        acts = encode(x)  # warms caches and allocators
        for _ in range(given["repeats"]):
            del acts
            started, cpu = time.perf_counter(), time.process_time()
            acts = encode(x)
            walls.append(time.perf_counter() - started)
            cpus.append(time.process_time() - cpu)
    if not given.get("cold"):
        is_slice = isinstance(what, int)
        np.save(folder / f"acts-{what}.npy", (acts if is_slice else acts[:, ids]).numpy())
        np.save(folder / f"l0-{what}.npy", (acts != 0).sum(dim=1).numpy())
    return {
        "seconds": statistics.median(walls),
        "fastest": min(walls),
        "slowest": max(walls),
        "cpu_seconds": statistics.median(cpus),
        "load_seconds": loads[-1],
        "peak_bytes": peak_bytes(),
        "import_bytes": imported,
    }


def peak_bytes() -> int:
    """The most memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compared(folder: Path, architecture: str, what: str | int) -> str:
    """Against SAELens: "same", or what differs by more than rounding."""
    theirs, ours = np.load(folder / "acts-SAELens.npy"), np.load(folder / f"acts-{what}.npy")
    if isinstance(what, int):
        theirs = theirs[:, :what]
    off = np.abs(theirs - ours)
    bar = {"relu": 0.0, "jumprelu": THRESHOLD}.get(architecture)
    switched = (theirs != 0) != (ours != 0)
    if bar is not None:  # at its bar a latent may go either way
        switched &= np.abs(np.maximum(theirs, ours) - bar) > MARGIN
    problems = int((switched | ((theirs != 0) & (ours != 0) & (off > MARGIN))).sum())
    if what == "whole":
        l0 = np.load(folder / "l0-SAELens.npy") - np.load(folder / "l0-whole.npy")
        problems += int(np.abs(l0).sum() > 2 * len(l0))
    n = int((ours != 0).sum())
    return f"same ({n} active)" if not problems else f"{problems} of {ours.size} DIFFER"


def write_inputs(folder: Path, d_in: int, tokens: int, d_sae: int) -> None:
    rng = np.random.default_rng(1)
    np.save(folder / "x.npy", rng.standard_normal((tokens, d_in), dtype=np.float32))
    np.save(folder / "ids.npy", rng.permutation(d_sae)[: max(SLICES)].astype(np.int64))


def write_weights(folder: Path, d_in: int, d_sae: int) -> None:
    """W_enc, the only large tensor with numbers in it, behind room for a header."""
    (folder / "sae").mkdir()
    generator = torch.Generator().manual_seed(0)
    with (folder / "sae" / "sae_weights.safetensors").open("wb") as file:
        file.seek(HEADER_BYTES)
        for _ in range(0, d_in, 64):
            rows = torch.randn(64, d_sae, generator=generator) / d_in**0.5
            file.write(rows.numpy().data)


def write_head(folder: Path, architecture: str, d_in: int, d_sae: int) -> None:
    """The rest of the file, for one architecture; the decoder is a hole."""
    shapes = {"W_enc": [d_in, d_sae], "W_dec": [d_sae, d_in], "b_dec": [d_in], "b_enc": [d_sae]}
    if architecture == "jumprelu":
        shapes["threshold"] = [d_sae]
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode().ljust(HEADER_BYTES - 8)
    path = folder / "sae" / "sae_weights.safetensors"
    path.touch()
    with path.open("r+b") as file:
        file.write((HEADER_BYTES - 8).to_bytes(8, "little") + text)
        file.truncate(HEADER_BYTES + end)
        if architecture == "jumprelu":
            file.seek(HEADER_BYTES + header["threshold"]["data_offsets"][0])
            file.write(np.full(d_sae, THRESHOLD, np.float32).data)
    cfg: dict[str, Any] = {
        "architecture": ARCHITECTURES[architecture],
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.0.hook_resid_post"},
    }
    if architecture == "topk":
        cfg |= {"k": K, "rescale_acts_by_decoder_norm": False}
    (folder / "sae" / "cfg.json").write_text(json.dumps(cfg))


def pages_read(folder: Path, d_in: int, d_sae: int, n: int) -> int:
    """Bytes of the pages of W_enc that hold the first `n` of the ids; a file is read by pages."""
    wanted = np.load(folder / "ids.npy")[:n]
    per_row = len(np.unique(wanted * 4 // PAGE))
    return d_in * per_row * PAGE


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
