"""The kernels equal their torch forms, through Triton's interpreter in a process of its own.

The interpreter must be asked for before triton is imported, and torch imports triton by itself.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ((5, 40, 100, 3), (33, 70, 64, 20), (1, 16, 7, 1), (16, 32, 640, 16))


def interpreted(body: str) -> None:
    """Runs `body` for every shape; an assertion that fails is this test's."""
    lines = "\n".join("    " + line for line in body.strip().splitlines())
    code = f"""
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, {str(ROOT)!r})
import torch
from sae_core.kernels import *
g = torch.Generator().manual_seed(0)
for rows, d_in, n, n_clusters in {SHAPES!r}:
{lines}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_cluster_sums_equal_torch() -> None:
    interpreted(
        """
z, W = torch.randn(rows, d_in, generator=g), torch.randn(d_in, n, generator=g)
b_enc, threshold = torch.randn(n, generator=g), torch.randn(n, generator=g)
mix = torch.randn(n, n_clusters, generator=g)
sums = cluster_sums(z, W, b_enc, threshold, mix)
expected = cluster_sums_torch(z.double(), W.double(), b_enc.double(), threshold.double(),
                              mix.double()).float()
assert (rows, n_clusters) == sums.shape
torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-3)
"""
    )


def test_counts_of_rivals_equal_torch_with_ties() -> None:
    """Whole numbers make every product exact, and ties common."""
    interpreted(
        """
z = torch.randint(-2, 3, (rows, d_in), generator=g).float()
W = torch.randint(-1, 2, (d_in, n), generator=g).float()
b_enc = torch.randint(-2, 3, (n,), generator=g).float()
keys = z @ W + b_enc
ids = torch.randperm(n, generator=g)[:5]
own = keys[:, ids]
counts = count_rivals(z, W, b_enc, own, ids)
assert torch.equal(counts, count_rivals_torch(z, W, b_enc, own, ids, chunk=30))
order = [sorted(range(n), key=lambda j: (-row[j], j)) for row in keys.tolist()]
assert counts.tolist() == [[o.index(i) for i in ids.tolist()] for o in order]
"""
    )
