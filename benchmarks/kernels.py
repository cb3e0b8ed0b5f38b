"""Do the Triton kernels of sae_core.kernels beat torch on this card?

Runs each kernel and its torch form on the same inputs on CUDA, checks that they agree, and prints
the median and spread of both. A kernel may be used only where it wins here by a margin that
LOG.md holds. Without CUDA or triton there is nothing to measure, and it says so.

    python benchmarks/kernels.py [--tokens 512] [--rounds 20]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

WIDTHS = (640, 2304)
LATENTS = (16, 256, 2048)
D_SAE = 65_536
N_CLUSTERS = 10


def main() -> None:
    """Prints one line a shape, or why there is none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: the kernels are for CUDA, nothing was measured")
        return
    if find_spec("triton") is None:
        print("triton is not installed: there are no kernels, nothing was measured")
        return
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import triton

    from sae_core import kernels

    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"float32 without TF32, {options.tokens} tokens, median of {options.rounds}, in ms\n")
    print(f"{'':<40}{'kernel':>8}{'spread':>16}{'torch':>8}{'spread':>16}{'torch / kernel':>16}")
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    for d_in in WIDTHS:
        z = normal(options.tokens, d_in)
        for n in LATENTS:
            given = (normal(d_in, n) / d_in**0.5, normal(n), normal(n).abs(), normal(n, N_CLUSTERS))
            torch.testing.assert_close(
                kernels.cluster_sums(z, *given),
                kernels.cluster_sums_torch(z, *given),
                rtol=1e-3,
                atol=1e-3,
            )
            row(
                f"cluster_sums d_in {d_in}, {n} latents",
                lambda z=z, given=given: kernels.cluster_sums(z, *given),
                lambda z=z, given=given: kernels.cluster_sums_torch(z, *given),
                options.rounds,
            )
        W, b_enc = normal(d_in, D_SAE) / d_in**0.5, normal(D_SAE)
        ids = torch.randperm(D_SAE, generator=generator, device="cuda")[:64]
        own = (z @ W[:, ids]) + b_enc[ids]
        off = kernels.count_rivals(z, W, b_enc, own, ids) - kernels.count_rivals_torch(
            z, W, b_enc, own, ids
        )
        if int(off.abs().max()) > 2:  # rounding may swap neighbours
            raise SystemExit(f"count_rivals is off by {int(off.abs().max())}")
        row(
            f"count_rivals d_in {d_in}, 64 of {D_SAE}",
            lambda z=z, W=W, b=b_enc, own=own, ids=ids: kernels.count_rivals(z, W, b, own, ids),
            lambda z=z, W=W, b=b_enc, own=own, ids=ids: kernels.count_rivals_torch(
                z, W, b, own, ids
            ),
            max(2, options.rounds // 4),
        )


def row(name: str, kernel: Callable[[], object], plain: Callable[[], object], rounds: int) -> None:
    ours, theirs = timed(kernel, rounds), timed(plain, rounds)
    ratio = statistics.median(theirs) / statistics.median(ours)
    cells = "".join(
        f"{statistics.median(ms):>8.2f}{f'{min(ms):.2f}..{max(ms):.2f}':>16}"
        for ms in (ours, theirs)
    )
    print(f"{name:<40}{cells}{ratio:>16.2f}", flush=True)


def timed(run: Callable[[], object], rounds: int) -> list[float]:
    """Milliseconds of each round on the device, after two that compile and warm up."""
    run(), run()
    found = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return found


if __name__ == "__main__":
    main()
