"""How many tokens a second does the whole way score, and where does the time go?

Runs, in one process and on the same texts: the pipeline (engine, heads, aggregation, policy), the
scorer's steps alone, and a plain full Hugging Face forward of the same model with its LM head, as a
peer that reads hidden states would run it (padded batches). Prints ratios.

    python benchmarks/end_to_end.py [--bundle default] [--texts 32] [--rounds 2]
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from monitor.cli.common import bundle_folder
from monitor.config import default_cache_dir
from monitor.local import load_local, local_pipeline
from monitor.records import ScoreRequest
from monitor.served import Served
from sae_core.language_model.model import Segment

PADDED_BATCH = 8


def main() -> None:
    """Parses the flags, runs every variant in turn, prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", default="default")
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    served = load_local(
        bundle_folder(options.bundle), model=options.model, cache=default_cache_dir()
    )
    texts = make_texts(served, options.texts)
    n_tokens = sum(map(len, texts))
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, ", end="")
    print(f"python {platform.python_version()}, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, float32")
    print(f"{served.bundle.label}: {len(texts)} texts, {n_tokens} tokens, 8 to 512 a text\n")

    folder = served.scorer.language_model.config.folder
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rates: dict[str, list[float]] = {"pipeline": [], "scorer": [], "full forward": []}
    shares: list[dict[str, float]] = []
    for round_number in range(options.rounds + 1):
        measured = {
            "full forward": time_full(full, texts),
            "scorer": time_scorer(served, texts),
        }
        measured["pipeline"], share = asyncio.run(time_pipeline(served, texts))
        if round_number == 0:
            continue  # the first round warms caches and allocators
        shares.append(share)
        for name, seconds in measured.items():
            rates[name].append(n_tokens / seconds)

    peer = statistics.median(rates["full forward"])
    print(f"{'variant':<14}{'tokens/s':>10}{'spread':>16}{'x full forward':>16}")
    for name, values in rates.items():
        spread = f"{min(values):.0f}..{max(values):.0f}"
        middle = statistics.median(values)
        print(f"{name:<14}{middle:>10.0f}{spread:>16}{middle / peer:>16.2f}")
    print("\nshare of the pipeline's time")
    for name in shares[0]:
        print(f"  {name:<18}{statistics.median(s[name] for s in shares):>7.1%}")


def make_texts(served: Served, n_texts: int) -> list[list[int]]:
    """Random ids with mixed lengths, the same every time: most short, some long."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.3, 1.0, n_texts), 8, 512).astype(int)
    special = served.tokenizer.special_ids
    texts = []
    for length in lengths.tolist():
        ids = rng.integers(0, served.vocab_size, length).tolist()
        texts.append([0 if i in special else i for i in ids])
    return texts


def time_full(model: torch.nn.Module, texts: list[list[int]]) -> float:
    """Seconds of padded batches through the whole model, hidden states kept."""
    started = time.perf_counter()
    with torch.inference_mode():
        for start in range(0, len(texts), PADDED_BATCH):
            batch = texts[start : start + PADDED_BATCH]
            width = max(map(len, batch))
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros(len(batch), width, dtype=torch.long)
            for row, text in enumerate(batch):
                ids[row, : len(text)] = torch.tensor(text)
                mask[row, : len(text)] = 1
            model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    return time.perf_counter() - started


def time_scorer(served: Served, texts: list[list[int]], step_tokens: int = 2048) -> float:
    """Seconds of the scorer's steps, whole texts packed up to the engine's budget."""
    started = time.perf_counter()
    segments: list[Segment] = []
    waiting = 0
    for text in texts:
        if waiting + len(text) > step_tokens:
            served.scorer.step(segments)
            segments, waiting = [], 0
        segments.append(Segment(served.scorer.open_stream(), text))
        waiting += len(text)
    if segments:
        served.scorer.step(segments)
    return time.perf_counter() - started


async def time_pipeline(served: Served, texts: list[list[int]]) -> tuple[float, dict[str, float]]:
    """Seconds of the whole way, all texts sent at once, and the share of each part."""
    async with local_pipeline(lambda: served) as pipeline:
        started = time.perf_counter()
        decisions = await asyncio.gather(
            *(
                pipeline.score(
                    ScoreRequest(
                        token_ids=tuple(text),
                        tokenizer_fingerprint=served.tokenizer.fingerprint,
                    )
                )
                for text in texts
            )
        )
        seconds = time.perf_counter() - started
    forward = sum(d.timings.forward_seconds for d in decisions)
    encode = sum(d.timings.encode_seconds for d in decisions)
    return seconds, {
        "forward": forward / seconds,
        "encode and heads": encode / seconds,
        "everything else": 1 - (forward + encode) / seconds,
    }


if __name__ == "__main__":
    main()
