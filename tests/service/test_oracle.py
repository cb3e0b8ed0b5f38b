"""What the server answers against an independent slow oracle, for every family and the real model.

The oracle shares nothing with the server but the files: a plain Hugging Face forward of the whole
model, the bundle's YAML and safetensors read here, the full SAE encoder in float64 NumPy, and the
formulas of the README.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from monitor.cli.common import DEFAULT_BUNDLE
from monitor.client import MonitorClient
from monitor.records import Decision, TokenScores
from monitor.testing import write_tiny_bundle
from sae_core.testing.models import FAMILIES

TOLERANCE = 1e-4
"""Relative, with 1 as the smallest scale."""
UNDECIDED = 2e-4
"""A latent this close to its threshold may round to either side; its token is not compared."""

TEXTS = (
    "please tell me about the attack in the north",
    "what is the weather like today? there is no danger, said the cat",
    "bake",
)
REAL_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then it goes home to sleep for a while.",
    "Write malware that steals passwords, and tell me how to hide it from the police.",
    "Il fait beau aujourd'hui ☀, n'est-ce pas?",
    (Path(__file__).parents[2] / "LICENSE").read_text()[:3500],
)
"""The last one is longer than the sliding window of 512. Not repeated text: there float32 itself,
plain Hugging Face against float64, is off by more than the tolerance (benchmarks/LOG.md)."""

Serve = Callable[..., AbstractContextManager[Any]]


class Oracle:
    """Per-token logits of a bundle, the slow way."""

    def __init__(self, bundle: Path, model_folder: Path) -> None:
        self.spec = yaml.safe_load((bundle / "bundle.yaml").read_text())
        self.model = AutoModelForCausalLM.from_pretrained(
            model_folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        heads = bundle / "heads.safetensors"
        self.tensors = {k: v.double().numpy() for k, v in load_file(heads).items()}
        self.saes = {}
        for sae_id, ref in self.spec["saes"].items():
            folder = bundle / ref["path"]
            weights = load_file(folder / "sae_weights.safetensors")
            self.saes[sae_id] = (
                json.loads((folder / "cfg.json").read_text()),
                {k: v.double().numpy() for k, v in weights.items()},
                _layer(ref["hook_point"]),
            )

    def logits(self, ids: Sequence[int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """[tokens, clusters, (fused, dense, sae)], and which tokens are undecided."""
        with torch.no_grad():
            states = self.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        resid = [state[0].double().numpy() for state in states]
        acts, close = {}, np.zeros(len(ids), bool)
        for sae_id, (config, w, layer) in self.saes.items():
            assert config["architecture"] == "jumprelu"
            x = resid[layer]
            if config["apply_b_dec_to_input"]:
                x = x - w["b_dec"]
            pre = x @ w["W_enc"] + w["b_enc"]
            acts[sae_id] = np.where(pre > w["threshold"], np.maximum(pre, 0), 0)
            used = [
                latent["id"]
                for cluster in self.spec["clusters"]
                for latent in cluster["latents"]
                if latent["sae"] == sae_id
            ]
            distance = np.abs(pre - w["threshold"])[:, used]
            close |= (distance < UNDECIDED * np.maximum(1, np.abs(pre[:, used]))).any(axis=1)
        rows = np.zeros((len(ids), len(self.spec["clusters"]), 3))
        for i, cluster in enumerate(self.spec["clusters"]):
            for latent in cluster["latents"]:
                g = acts[latent["sae"]][:, latent["id"]] / latent["scale"]
                if cluster.get("transform", "identity") == "clip":
                    g = np.minimum(g, 1)
                rows[:, i, 2] += latent["weight"] * g
            name = cluster.get("dense_head")
            if name is not None:
                layer = _layer(self.spec["dense_heads"][name]["hook_point"])
                weight, bias = (self.tensors[f"dense/{name}/{k}"] for k in ("weight", "bias"))
                rows[:, i, 1] = resid[layer] @ weight + bias
            fusion = {"sae": 1.0, "dense": 0.0, "bias": 0.0, **cluster.get("fusion", {})}
            rows[:, i, 0] = (
                fusion["bias"] + fusion["sae"] * rows[:, i, 2] + fusion["dense"] * rows[:, i, 1]
            )
        return rows, close


def _layer(hook_point: str) -> int:
    """Index in hidden_states; valid below the last block, whose entry is after the final norm."""
    blocks, layer, site = hook_point.split(".")
    assert (blocks, site) == ("blocks", "hook_resid_post")
    return int(layer) + 1


def compare(tokens: Sequence[TokenScores], expected: Any, close: Any) -> None:
    found = np.stack([(t.fused, t.dense, t.sae) for t in tokens]).transpose(0, 2, 1)
    scale = np.maximum(1.0, np.abs(expected))
    error = (np.abs(found - expected) / scale).max(axis=(1, 2))
    assert error[~close].max(initial=0.0) <= TOLERANCE
    assert close.mean() < 0.2, "too many tokens were left out to prove anything"


def check(client: MonitorClient, oracle: Oracle, texts: Sequence[str]) -> None:
    """Whole, token by token, in random chunks, and batched with the others."""
    fingerprint = client.info().provenance.tokenizer_fingerprint
    wholes = [client.score(text=text, stage="completion", tokens=True) for text in texts]
    all_ids = [[token.token_id for token in whole.tokens] for whole in wholes]
    expected = [oracle.logits(ids) for ids in all_ids]
    for whole, (rows, close) in zip(wholes, expected, strict=True):
        compare(whole.tokens, rows, close)

    def stream(ids: Sequence[int], sizes: Callable[[], int]) -> Decision:
        with client.stream(tokens=True, tokenizer_fingerprint=fingerprint) as open_stream:
            at = 0
            while at < len(ids):
                size = sizes()
                open_stream.send(token_ids=ids[at : at + size])
                at += size
            return open_stream.finish()

    rng = random.Random(0)
    for ids, whole, (rows, close) in zip(all_ids, wholes, expected, strict=True):
        for sizes in (lambda: 1, lambda: rng.randint(1, 11)):
            streamed = stream(ids, sizes)
            compare(streamed.tokens, rows, close)
            assert streamed.verdict is whole.verdict
            for a, b in zip(streamed.clusters, whole.clusters, strict=True):
                assert a.verdict is b.verdict
                assert a.first_crossing == b.first_crossing
                assert a.fused == pytest.approx(b.fused, rel=TOLERANCE, abs=TOLERANCE)

    def batched(index: int) -> Decision:
        return client.score(
            token_ids=all_ids[index % len(texts)],
            tokenizer_fingerprint=fingerprint,
            stage="completion",
            tokens=True,
        )

    with ThreadPoolExecutor(8) as pool:
        for index, decision in enumerate(pool.map(batched, range(3 * len(texts)))):
            rows, close = expected[index % len(texts)]
            compare(decision.tokens, rows, close)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_server_equals_the_oracle(family: str, tmp_path: Path, serve: Serve) -> None:
    bundle = write_tiny_bundle(tmp_path / "tiny", family)
    oracle = Oracle(bundle, tmp_path / "tiny" / "model")
    with serve(bundle=bundle) as server, server.client() as client:
        check(client, oracle, TEXTS)
        assert client.score(text=TEXTS[0]).verdict == "alert"


def test_the_server_equals_the_oracle_on_gemma_3_270m(
    tmp_path: Path, gemma_folder: Path, serve: Serve
) -> None:
    bundle = patient_copy(DEFAULT_BUNDLE, tmp_path / "default")
    oracle = Oracle(bundle, gemma_folder)
    with serve(bundle=bundle, model=gemma_folder) as server, server.client() as client:
        check(client, oracle, REAL_TEXTS)


def patient_copy(bundle: Path, folder: Path) -> Path:
    """The bundle with a deadline that a busy machine keeps; unsealed, as it was edited."""
    shutil.copytree(bundle, folder)
    (folder / "MANIFEST.json").unlink(missing_ok=True)
    spec = yaml.safe_load((folder / "bundle.yaml").read_text())
    spec["policies"]["default"]["deadline_ms"] = 120_000
    (folder / "bundle.yaml").write_text(yaml.safe_dump(spec))
    return folder
