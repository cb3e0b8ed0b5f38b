"""What do compiled loops over rows save on the CPU?

The same model twice, with rows by torch and compiled by numba, in turns: whole texts, one token of
each of many streams, one token of one. Prints the time of a step of each and the ratio of both,
pair by pair, as other work on a machine moves either alone.

    python benchmarks/compiled_rows.py [--model FOLDER] [--layer 8] [--rounds 30] [--threads N]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout's own packages win

import engine_parts  # noqa: F401 - says how OpenMP waits, before torch is imported
import numpy as np
import torch
from engine_parts.measuring import in_turns, machine, paired, show, timed
from engine_parts.setting import gemma_folder

from sae_core.hook_points import HookPoint
from sae_core.language_model.compiled_rows import Rows, has_numba
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import LanguageModel, Segment
from sae_core.language_model.products import bfloat16_is_faster

CONTEXT = 256
"""Tokens that a stream holds before single ones follow."""
FORGET_AFTER = 64
"""Single tokens after which streams go back to their context, so that every step is alike."""


def main() -> None:
    """Parses the flags, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="by default that of the default bundle")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if not has_numba():
        raise SystemExit("numba is not installed: nothing is compiled, nothing was measured")
    torch.set_num_threads(options.threads)
    folder = options.model or gemma_folder()
    facts = machine() | {"threads": options.threads, "torch": torch.__version__}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    dtypes = [torch.float32]
    if bfloat16_is_faster(torch.device("cpu")):
        dtypes.append(torch.bfloat16)
    for dtype in dtypes:
        measure(folder, HookPoint(options.layer, "resid_post"), dtype, options.rounds)


def measure(folder: Path, hook_point: HookPoint, dtype: torch.dtype, rounds: int) -> None:
    """Every kind of step, by both."""
    kinds: tuple[Rows, ...] = get_args(Rows)[1:]
    models = {
        rows: load_language_model(folder, [hook_point], dtype=dtype, rows=rows) for rows in kinds
    }
    steps: dict[str, Callable[[LanguageModel], Callable[[], float]]] = {
        "8 texts of 128 tokens": lambda model: texts(model, 8, 128),
        "a token of each of 64 streams": lambda model: tokens(model, 64),
        "a token of each of 8 streams": lambda model: tokens(model, 8),
        "a token of one stream": lambda model: tokens(model, 1),
    }
    print(f"\n{str(dtype).removeprefix('torch.')}, ms of a step: median [least, most]")
    for name, side in steps.items():
        sides = {rows: side(model) for rows, model in models.items()}
        seconds = in_turns(name, sides, rounds=rounds, seconds=120)
        gain = paired(seconds["torch"], seconds["compiled"])
        print(
            f"{name:<32} torch {show(seconds['torch'], 1e3):<24} "
            f"compiled {show(seconds['compiled'], 1e3):<24} "
            f"{gain['median']:.2f} [{gain['min']:.2f}, {gain['max']:.2f}] times as fast"
        )


def texts(model: LanguageModel, n: int, n_tokens: int) -> Callable[[], float]:
    """A step of whole texts."""
    rng = np.random.default_rng(0)

    def step() -> float:
        drawn = rng.integers(1000, model.config.vocab_size, (n, n_tokens)).tolist()
        segments = [Segment(model.open_stream(), ids) for ids in drawn]
        return timed(lambda: model.step(segments))

    return step


def tokens(model: LanguageModel, n: int) -> Callable[[], float]:
    """A step of one token of each of `n` streams."""
    rng = np.random.default_rng(0)
    streams = [model.open_stream() for _ in range(n)]
    for stream in streams:
        drawn = rng.integers(1000, model.config.vocab_size, CONTEXT).tolist()
        model.step([Segment(stream, drawn)])
    number = count(1)

    def step() -> float:
        if next(number) % FORGET_AFTER == 0:
            for stream in streams:
                stream.truncate(CONTEXT)
        drawn = rng.integers(1000, model.config.vocab_size, n).tolist()
        segments = [Segment(s, [token_id]) for s, token_id in zip(streams, drawn, strict=True)]
        return timed(lambda: model.step(segments))

    return step


if __name__ == "__main__":
    main()
