"""The model, SAE and bundle that every side loads, and how much of everything is measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors import safe_open
from safetensors.numpy import save_file

from monitor.bundle import load_bundle
from monitor.cli.common import bundle_folder
from monitor.config import default_cache_dir
from monitor.model_store import find_model
from sae_core.formats.saelens_writer import save_saelens
from sae_core.hook_points import parse_hook_point
from sae_core.language_model.loading import load_language_model
from sae_core.language_model.model import Segment
from sae_core.language_model.tokenizer import load_tokenizer
from sae_core.sae import SAE
from sae_core.sae_config import SAECard, SAEConfig
from sae_core.sae_weights import SAEWeights
from sae_core.testing.models import tiny_model_folder

ACTIVE = 0.003
"""Share of the latents that are active: 49 of 16,384."""
DEADLINE_MS = 3_600_000
"""Of the bundle's policy: a slow machine must not turn scores into skipped tokens."""
SAE_ID = "bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of everything; the defaults are those of the numbers to reach."""

    d_sae: int = 16_384
    n_latents: int = 64
    n_clusters: int = 8
    batch: tuple[int, int] = (8, 128)
    """Texts and tokens of each, for prefill."""
    n_mixed: int = 64
    mixed: tuple[int, int] = (10, 400)
    """Shortest and longest of the mixed lengths."""
    n_streams: int = 64
    n_many: int = 256
    context: int = 256
    """Tokens that every stream holds before it is measured."""
    stream_rounds: int = 8
    """Tokens of every stream in one round of the comparison."""
    load_seconds: float = 10.0
    early: int = 800
    late: int = 8000
    pieces: int = 24
    prefix: int = 1000
    rest: int = 20
    rpc_tokens: int = 1000
    rpc_calls: int = 300
    cache_bytes: int = 2 * 1024**3
    """The server's budget of keys and values; its default."""
    held_context: int = 640
    """Tokens of the streams that fill it: all that a window of 512 keeps."""
    held_streams: int = 250
    """Of these; the server allows 256."""
    rounds: int = 5
    seconds: float = 200.0
    """No new round of one comparison after this."""


QUICK = Sizes(
    d_sae=256,
    n_latents=16,
    n_clusters=2,
    batch=(2, 16),
    n_mixed=6,
    mixed=(4, 40),
    n_streams=4,
    n_many=8,
    context=32,
    stream_rounds=2,
    load_seconds=0.5,
    early=40,
    late=400,
    pieces=3,
    prefix=100,
    rest=8,
    rpc_tokens=64,
    rpc_calls=8,
    cache_bytes=1024**2,
    held_context=100,
    held_streams=8,
    rounds=2,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One model folder with a bundle on it, and token ids to score."""

    model: Path
    bundle: Path
    hook_point: str
    n_layers: int
    """Blocks that are needed."""
    d_in: int
    """Width of the residual stream there."""
    threshold: float
    """Of every latent."""
    token_ids: np.ndarray
    """Ids that may be drawn: no special ones."""
    sizes: Sizes

    def texts(self, lengths: Sequence[int], seed: int) -> list[list[int]]:
        """Random texts of these lengths, the same for the same seed."""
        rng = np.random.default_rng(seed)
        return [rng.choice(self.token_ids, n).tolist() for n in lengths]

    def batch(self, seed: int = 0) -> list[list[int]]:
        """The texts of the prefill figures."""
        n_texts, n_tokens = self.sizes.batch
        return self.texts([n_tokens] * n_texts, seed)

    def matrices(self) -> dict[tuple[int, int], int]:
        """How many matrices of each shape (inputs, outputs) the needed blocks have."""
        counts: dict[tuple[int, int], int] = {}
        for shape, layer in self._tensors():
            if layer is not None and len(shape) == 2:
                counts[shape[1], shape[0]] = counts.get((shape[1], shape[0]), 0) + 1
        return counts

    def weights_in_use(self) -> int:
        """Numbers of the language model that scoring reads: embedding and needed blocks."""
        return sum(int(np.prod(shape)) for shape, _ in self._tensors())

    def _tensors(self) -> list[tuple[tuple[int, ...], int | None]]:
        """Shapes of the tensors in use, and the block of each; None for the embedding."""
        found: list[tuple[tuple[int, ...], int | None]] = []
        for path in sorted(self.model.glob("*.safetensors")):
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 - no iterator
                    shape = tuple(file.get_slice(name).get_shape())
                    block = re.search(r"\.layers\.(\d+)\.", name)
                    if block and int(block[1]) < self.n_layers:
                        found.append((shape, int(block[1])))
                    elif "embed_tokens" in name:
                        found.append((shape, None))
        return found


def gemma_folder() -> Path:
    """Gemma 3 270M as the default bundle finds it; converts it on first use."""
    bundle = load_bundle(bundle_folder("default"))
    return find_model(bundle, override=None, cache=default_cache_dir()).folder


def real_setting(folder: Path, sizes: Sizes) -> Setting:
    """Gemma 3 270M read after layer 9."""
    return write_setting(folder, gemma_folder(), "blocks.8.hook_resid_post", sizes)


def tiny_setting(folder: Path, sizes: Sizes) -> Setting:
    """A random Gemma 3 of three layers, read after the second."""
    model = tiny_model_folder(folder / "model", "gemma3", max_position_embeddings=2048)
    return write_setting(folder, model, "blocks.1.hook_resid_post", sizes)


def wide_setting(folder: Path, sizes: Sizes) -> Setting:
    """One cheap block as wide as Gemma 3 270M: all but the forward costs what it costs there."""
    model = tiny_model_folder(
        folder / "model",
        "llama",
        hidden_size=640,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=4096,
    )
    return write_setting(folder, model, "blocks.0.hook_resid_post", sizes)


def write_setting(folder: Path, model: Path, hook_point: str, sizes: Sizes) -> Setting:
    """Writes a bundle with a random SAE, in SAELens' format, and random heads; seeded."""
    place = parse_hook_point(hook_point)
    language_model = load_language_model(model, [place])
    tokenizer = load_tokenizer(model)
    vocab_size = language_model.config.vocab_size
    token_ids = np.setdiff1d(np.arange(vocab_size), sorted(tokenizer.special_ids))
    sample = np.random.default_rng(0).choice(token_ids, 128).tolist()
    x = language_model.step([Segment(language_model.open_stream(), sample)])[place]
    d_in = x.shape[1]
    generator = torch.Generator().manual_seed(0)
    W_enc = torch.randn(d_in, sizes.d_sae, generator=generator) / d_in**0.5
    threshold = float(np.quantile((x @ W_enc).numpy(), 1 - ACTIVE))
    sae = SAE(
        SAEConfig(architecture="jumprelu", d_in=d_in, d_sae=sizes.d_sae),
        SAEWeights(
            W_enc,
            torch.zeros(sizes.d_sae),
            torch.nn.functional.normalize(W_enc.T, dim=1).contiguous(),
            torch.zeros(d_in),
            torch.full((sizes.d_sae,), threshold),
        ),
        SAECard(hook_point=hook_point, model_name="bench/model"),
    )
    bundle = folder / "bundle"
    save_saelens(sae, bundle / "saes" / SAE_ID)
    _write_heads(bundle, model, hook_point, d_in, sizes)
    return Setting(
        model=model,
        bundle=bundle,
        hook_point=hook_point,
        n_layers=language_model.config.n_layers,
        d_in=d_in,
        threshold=threshold,
        token_ids=token_ids,
        sizes=sizes,
    )


def _write_heads(bundle: Path, model: Path, hook_point: str, d_in: int, sizes: Sizes) -> None:
    rng = np.random.default_rng(0)
    latents = rng.permutation(sizes.d_sae)[: sizes.n_latents].tolist()
    names = [f"cluster-{n}" for n in range(sizes.n_clusters)]
    tensors = {}
    for name in names:
        tensors[f"dense/{name}/weight"] = rng.standard_normal(d_in).astype(np.float32) / d_in
        tensors[f"dense/{name}/bias"] = np.zeros((), np.float32)
    save_file(tensors, bundle / "heads.safetensors")
    spec = {
        "name": "bench",
        "version": 1,
        "model": {"id": "bench/model", "path": str(model)},
        "saes": {SAE_ID: {"path": f"saes/{SAE_ID}", "hook_point": hook_point}},
        "dense_heads": {name: {"hook_point": hook_point} for name in names},
        "clusters": [
            {
                "id": name,
                "title": name,
                "severity": "warning",
                "latents": [
                    {"sae": SAE_ID, "id": i, "weight": 0.01, "scale": 1.0}
                    for i in latents[number :: sizes.n_clusters]
                ],
                "dense_head": name,
                "fusion": {"sae": 1.0, "dense": 1.0, "bias": 0.0},
                "thresholds": {"flag": 1e6, "alert": 2e6, "clear": 0.0},
            }
            for number, name in enumerate(names)
        ],
        "policies": {"default": {"mode": "monitor", "deadline_ms": DEADLINE_MS}},
    }
    (bundle / "bundle.yaml").write_text(yaml.safe_dump(spec))
