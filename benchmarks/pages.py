"""What would pages of keys and values cost attention on a CPU?

One decode step's attention, one new token a stream, over each stream's keys and values in a buffer
of its own against pages that are gathered first. Prints milliseconds a layer, and the ratio.

    python benchmarks/pages.py [--streams 64] [--context 256] [--page 32] [--rounds 20]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def main() -> None:
    """Parses the flags, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--page", type=int, default=32)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=9, help="so that caches hold no layer")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, ", end="")
    print(f"torch {torch.__version__}, {options.streams} streams x {options.context} tokens, ")
    n_pages = -(-options.context // options.page)
    for dtype in (torch.float32, torch.bfloat16):
        shape = options.kv_heads, options.context, options.head_dim
        buffers = [
            [tuple(torch.randn(shape, dtype=dtype) for _ in "kv") for _ in range(options.streams)]
            for _ in range(options.layers)
        ]
        page = n_pages * options.streams, options.page, options.kv_heads, options.head_dim
        pools = [tuple(torch.randn(page, dtype=dtype) for _ in "kv") for _ in range(options.layers)]
        tables = torch.randperm(n_pages * options.streams).view(options.streams, n_pages)
        query = torch.randn(1, options.kv_heads, options.heads, options.head_dim, dtype=dtype)

        def contiguous(buffers: list[list[tuple[Tensor, ...]]], query: Tensor) -> None:
            for layer in buffers:
                for keys, values in layer:
                    scaled_dot_product_attention(query, keys[None], values[None])

        def paged(pools: list[tuple[Tensor, ...]], tables: Tensor, query: Tensor) -> None:
            for pool in pools:
                for table in tables:
                    keys, values = (
                        t[table].flatten(0, 1)[: options.context].transpose(0, 1) for t in pool
                    )
                    scaled_dot_product_attention(query, keys[None], values[None])

        found = [
            measured(lambda b=buffers, q=query: contiguous(b, q), options.rounds),
            measured(lambda p=pools, t=tables, q=query: paged(p, t, q), options.rounds),
        ]
        for name, times in zip(("buffers", "pages"), found, strict=True):
            per_layer = [1000 * seconds / options.layers for seconds in times]
            spread = f"[{min(per_layer):.2f}, {max(per_layer):.2f}]"
            print(f"  {dtype}  {name:<8} {statistics.median(per_layer):7.2f} ms a layer {spread}")
        print(f"  pages over buffers: {min(found[1]) / min(found[0]):.2f} of the best rounds")


def measured(run: Callable[[], None], rounds: int) -> list[float]:
    """CPU seconds of each round, after one to warm up: others may use the machine."""
    run()
    seconds = []
    for _ in range(rounds):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return seconds


if __name__ == "__main__":
    with torch.inference_mode():
        main()
