from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from sae_core.baseline import Baseline
from sae_core.evaluation.detection import Evaluation
from sae_core.formats import load_sae
from sae_core.language_model.tokenizer import load_tokenizer
from sae_core.testing.models import tiny_model_folder
from sae_core.training.build import build_default
from sae_core.training.build_heads import BuildInputs
from sae_core.training.dense_heads import HeadConfig
from sae_core.training.discovery import BROAD, ClusterPlan
from sae_core.training.sae_train_config import SAETrainConfig

HOOK_POINTS = {"l1": "blocks.0.hook_resid_post", "l2": "blocks.1.hook_resid_post"}
PLANS = (
    ClusterPlan(id="any", title="Any harm", severity="warning", categories=(BROAD,)),
    ClusterPlan(id="danger", title="Danger", severity="critical", categories=("danger",)),
)

USUAL = ("the", "model", "reads", "a", "prompt", "and", "bakes", "bread", "with", "flour", "salt")


def _write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _labelled(n: int, seed: int) -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(n):
        words = rng.choice(USUAL, 14).tolist()
        is_harmful = index % 2 == 0
        if is_harmful:
            words[3:9] = ["danger", "attack", "danger", "poison", "danger", "weapon"]
        rows.append(
            {
                "text": " ".join(words),
                "label": "harmful" if is_harmful else "benign",
                "category": "danger" if is_harmful else "benign_hard",
                "source": f"set{index // 2 % 4}",
            }
        )
    return rows


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildInputs, Evaluation]:
    root = tmp_path_factory.mktemp("build")
    corpus = [{"text": row["text"] * 4, "source": "c"} for row in _labelled(900, 5)]
    _write(root / "corpus" / "part.jsonl", corpus)
    inputs = BuildInputs(
        model_folder=tiny_model_folder(root / "model", "gemma3"),
        model_id="tiny/gemma3",
        model_package=None,
        corpus=root / "corpus",
        train=_write(root / "train.jsonl", _labelled(160, 1)),
        val=_write(root / "val.jsonl", _labelled(920, 2)),
        work=root / "work",
        out=root / "bundle",
        name="tiny",
        hook_points=tuple(HOOK_POINTS.values()),
        dense_hook_point=HOOK_POINTS["l2"],
        sae_config=SAETrainConfig(
            d_sae=64,
            l0_target=8.0,
            total_tokens=4096,
            batch_tokens=256,
            buffer_tokens=1024,
            forward_tokens=512,
            context_tokens=32,
            aux_k=16,
        ),
        head_config=HeadConfig(n_folds=2, n_candidates=12, n_latents=4, n_steps=60),
        plans=PLANS,
    )
    return inputs, build_default(inputs)


def test_bundle_has_every_file(built: tuple[BuildInputs, Evaluation]) -> None:
    out = built[0].out
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {
        "bundle.yaml",
        "heads.safetensors",
        "saes/l1/cfg.json",
        "saes/l1/sae_weights.safetensors",
        "saes/l2/cfg.json",
        "saes/l2/sae_weights.safetensors",
        "calibration/default.json",
        "fidelity/l1.json",
        "fidelity/l2.json",
        "fidelity.jsonl",
        "canaries.jsonl",
        "evaluation.json",
        "CARD.md",
    }


def test_parts_fit_each_other(built: tuple[BuildInputs, Evaluation]) -> None:
    out = built[0].out
    spec = yaml.safe_load((out / "bundle.yaml").read_text())
    artefact = json.loads((out / "calibration" / "default.json").read_text())
    heads = load_file(out / "heads.safetensors")
    assert {name: ref["hook_point"] for name, ref in spec["saes"].items()} == HOOK_POINTS
    for ref in spec["saes"].values():
        assert load_sae(out / ref["path"]).card.hook_point == ref["hook_point"]
    assert {ref["hook_point"] for ref in spec["dense_heads"].values()} == {HOOK_POINTS["l2"]}
    assert artefact["calibrated"] is True
    for cluster in spec["clusters"]:
        entry = artefact["clusters"][cluster["id"]]
        assert cluster["thresholds"] == entry["thresholds"]
        assert cluster["solo"] == entry["solo"]
        assert cluster["thresholds"]["flag"] > cluster["aggregate"]["evidence_floor"]
        assert heads[f"dense/{cluster['id']}/weight"].shape == (32,)
        assert cluster["latents"]
        assert all(0 <= t["id"] < 64 and t["weight"] > 0 for t in cluster["latents"])
    assert {t["sae"] for c in spec["clusters"] for t in c["latents"]} == HOOK_POINTS.keys()
    assert "Gemma Terms" in (out / "CARD.md").read_text()


def test_baseline_is_what_the_benign_texts_do_to_the_sae(
    built: tuple[BuildInputs, Evaluation],
) -> None:
    inputs, _ = built
    out = inputs.out
    artefact = json.loads((out / "calibration" / "default.json").read_text())
    baseline = Baseline.from_json(artefact["baseline"], "default.json")
    spec = yaml.safe_load((out / "bundle.yaml").read_text())
    latents = sorted({(t["sae"], t["id"]) for c in spec["clusters"] for t in c["latents"]})
    assert baseline.latents == tuple(latents)

    tokenizer = load_tokenizer(inputs.model_folder)
    for sae_id, hook_point in HOOK_POINTS.items():
        sae = load_sae(out / "saes" / sae_id)
        ids = [latent for name, latent in latents if name == sae_id]
        n, firings, active, error, variance = 0, np.zeros(len(ids)), 0.0, 0.0, 0.0
        for name, path in (("train", inputs.train), ("val", inputs.val)):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            resid = np.load(inputs.work / f"resid_{name}" / f"{hook_point}.npy")
            lengths = [len(tokenizer.encode(row["text"], add_bos=True)) - 1 for row in rows]
            per_text = np.split(resid, np.cumsum(lengths)[:-1])
            for row, x in zip(rows, per_text, strict=True):
                if row["label"] == "harmful":
                    continue
                acts = sae.encode(torch.from_numpy(x))
                n += len(x)
                firings += (acts[:, ids] != 0).sum(0).numpy()
                active += float((acts != 0).sum())
                recons = sae.decode(acts).numpy()
                error += float(((x - recons).astype(np.float64) ** 2).sum())
                variance += float(((x - x.mean(0)).astype(np.float64) ** 2).sum())
        own = [column for column, (name, _) in enumerate(latents) if name == sae_id]
        assert baseline.n_tokens == n
        np.testing.assert_array_equal(np.array(baseline.firings)[own], firings)
        assert baseline.ratios[f"l0:{sae_id}"] == pytest.approx(active / n, rel=1e-5)
        assert baseline.ratios[f"fvu:{sae_id}"] == pytest.approx(error / variance, rel=1e-4)


def test_unseen_figures_are_of_heads_that_had_not_seen_the_data_set(
    built: tuple[BuildInputs, Evaluation],
) -> None:
    out = built[0].out
    unseen = json.loads((out / "evaluation.json").read_text())["unseen_sources"]
    assert unseen["overall"]["n_harmful"] == 80
    fused = unseen["overall"]["figures"]["fused"]["auroc"]
    assert fused[1] <= fused[0] <= fused[2]
    assert unseen["over_data_sets"]["figures"]["fused"]["auroc"][0] == fused[0]
    assert {"fused", "dense", "sae"} == unseen["clusters"]["danger"]["figures"].keys()
    assert f"| fused | {fused[0]:.3f} [" in (out / "CARD.md").read_text()


def test_figures_show_the_planted_risk(built: tuple[BuildInputs, Evaluation]) -> None:
    _, figures = built
    assert figures.clusters["danger"][0].auroc.value > 0.95
    assert figures.benign_raised["alert"] <= 0.01


def test_second_build_reuses_every_stage(built: tuple[BuildInputs, Evaluation]) -> None:
    inputs, first = built
    before = (inputs.out / "bundle.yaml").read_bytes()
    stages = {path: path.stat().st_mtime_ns for path in inputs.work.rglob("*") if path.is_file()}
    assert build_default(inputs) == first
    assert (inputs.out / "bundle.yaml").read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in stages} == stages
