"""SAEs and clusters that are known to fire, and where: evidence that tests can raise at will.

    folder = planted_model_folder(path, "gemma3", ["danger", "attack"])
    model = load_language_model(folder, [hook_point])
    planted = plant(model, load_tokenizer(folder), hook_point, ["danger", "attack"], texts)

`planted.cluster` has fused logits above `MARGIN` on the trigger words' tokens and below `-MARGIN`
on all others. In a random model other tokens drown a word after a layer or two, so the folder's
trigger tokens are marked: their embeddings get a direction that no other token has.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64
from safetensors.torch import load_file, save_file

from sae_core.errors import HeadError
from sae_core.heads import Cluster, ClusterHeads, LatentTerm
from sae_core.hook_points import HookPoint
from sae_core.language_model.model import LanguageModel, Segment
from sae_core.language_model.tokenizer import Tokenizer, load_tokenizer
from sae_core.sae import SAE
from sae_core.sae_config import THRESHOLDED, Architecture, SAEConfig
from sae_core.sae_weights import SAEWeights
from sae_core.testing.models import tiny_model_folder

MARGIN = 5.0
"""What a planted cluster's fused logit exceeds on trigger tokens, and stays under elsewhere."""
PLANTED_LATENT = 0
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
MARK = 16.0
"""Size of a mark, in standard deviations of the embeddings times sqrt(d_model)."""


class Planted(NamedTuple):
    """An SAE and a cluster that fire on the trigger tokens, and what they were made for."""

    sae: SAE
    """JumpReLU; latent 0 fires on trigger tokens only, the others are random directions."""
    cluster: Cluster
    """Reads latent 0 and a dense head at the same hook point."""
    hook_point: HookPoint
    trigger_ids: tuple[int, ...]
    """Tokens that raise the cluster."""


def planted_sae(d_in: int, d_sae: int, *, architecture: Architecture, seed: int) -> SAE:
    """An SAE with random unit decoder directions, each latent's encoder reading its own one."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=-1)
    threshold = torch.empty(d_sae).uniform_(0.2, 0.8, generator=generator)
    if architecture == "batchtopk":
        threshold = torch.full((d_sae,), 0.5)
    config = SAEConfig(
        architecture=architecture,
        d_in=d_in,
        d_sae=d_sae,
        k=max(1, d_sae // 8) if architecture == "topk" else None,
        apply_b_dec_to_input=True,
    )
    weights = SAEWeights(
        W_dec.T.contiguous(),
        0.1 * torch.randn(d_sae, generator=generator),
        W_dec,
        0.1 * torch.randn(d_in, generator=generator),
        threshold if architecture in THRESHOLDED else None,
    )
    return SAE(config, weights)


def planted_model_folder(path: Path, family: str, trigger_words: Sequence[str]) -> Path:
    """A tiny model folder of the family whose trigger words' tokens are marked for `plant`."""
    tiny_model_folder(path, family)
    tokenizer = load_tokenizer(path)
    ids = sorted({i for word in trigger_words for i in word_ids(tokenizer, word)})
    file = path / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith(EMBEDDINGS))
    embedding = tensors[name].float()
    direction = torch.randn(embedding.shape[1], generator=torch.Generator().manual_seed(1))
    direction -= direction.mean()
    size = MARK * float(embedding.std()) * embedding.shape[1] ** 0.5
    embedding[ids] += size * direction / direction.norm()
    tensors[name] = embedding.to(tensors[name].dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def word_ids(tokenizer: Tokenizer, word: str) -> tuple[int, ...]:
    """The token that stands for a word at the start of a text, and the one after a space.

    A word of several tokens is stood for by its longest one.
    """
    found: list[int] = []
    for form in (word, " " + word):
        ids = tokenizer.encode(form, add_bos=False)
        texts = tokenizer.token_texts(ids)
        longest = max(range(len(ids)), key=lambda i: len(texts[i].strip()))
        found.append(ids[longest])
    return tuple(sorted(set(found)))


def plant(
    language_model: LanguageModel,
    tokenizer: Tokenizer,
    hook_point: HookPoint,
    trigger_words: Sequence[str],
    neutral_texts: Sequence[str],
    *,
    sae_id: str = "planted",
    cluster_id: str = "planted",
    d_sae: int = 64,
) -> Planted:
    """An SAE and a cluster that fire where the trigger words' tokens are, at `hook_point`.

    The words must not occur in `neutral_texts`. Learnt from those texts and from random tokens,
    with and without trigger tokens among them, and checked on others. Raises HeadError where the
    model does not keep the words' tokens apart by `MARGIN` (see `planted_model_folder`).
    """
    trigger_ids = sorted({i for word in trigger_words for i in word_ids(tokenizer, word)})
    texts = [tokenizer.encode(text) for text in neutral_texts]
    shared = sorted({i for ids in texts for i in ids} & set(trigger_ids))
    if shared:
        pieces = tokenizer.token_texts(shared)
        raise HeadError(f"neutral_texts have the trigger tokens {pieces}, expected none of them")
    x, fires = _sample(language_model, tokenizer, hook_point, trigger_ids, texts, seed=0)
    direction, bias = _separate(x, fires)
    sae = _with_latent(
        planted_sae(x.shape[1], d_sae, architecture="jumprelu", seed=0), direction, bias
    )
    act = float(np.median((x @ direction + bias)[fires]))
    cluster = Cluster(
        id=cluster_id,
        latents=(
            LatentTerm(
                sae=sae_id, latent_id=PLANTED_LATENT, weight=4.0, scale=act, label="trigger words"
            ),
        ),
        dense_weight=(2 * MARGIN * direction).astype(np.float32),
        dense_bias=float(2 * MARGIN * bias),
        dense_hook_point=str(hook_point),
        fusion_sae=0.5,
        fusion_dense=1.0,
    )
    planted = Planted(sae, cluster, hook_point, tuple(trigger_ids))
    for seed in (0, 1):
        x, fires = _sample(language_model, tokenizer, hook_point, trigger_ids, texts, seed=seed)
        _check_margin(planted, x, fires)
    return planted


def _sample(
    language_model: LanguageModel,
    tokenizer: Tokenizer,
    hook_point: HookPoint,
    trigger_ids: Sequence[int],
    texts: Sequence[Sequence[int]],
    *,
    seed: int,
) -> tuple[Float64[np.ndarray, "n d_model"], Bool[np.ndarray, " n"]]:
    """Residual streams, and which of them stand at a trigger token."""
    rng = np.random.default_rng(seed)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    rows = [list(ids) for ids in texts if ids]
    for ids in texts:
        at = int(rng.integers(len(bos), len(ids) + 1))
        rows.append([*ids[:at], *rng.choice(trigger_ids, 3).tolist(), *ids[at:]])
    for length in rng.integers(2, 64, 100).tolist():
        random_ids = rng.integers(0, tokenizer.vocab_size, length)
        some = rng.random(length) < rng.choice([0.0, 0.1, 0.8])
        random_ids[some] = rng.choice(trigger_ids, int(some.sum()))
        rows.append(bos + random_ids.tolist())
    segments = [Segment(language_model.open_stream(), ids) for ids in rows]
    resid = language_model.step(segments)[hook_point].double().cpu().numpy()
    return resid, np.isin([i for ids in rows for i in ids], trigger_ids)


def _separate(
    x: Float64[np.ndarray, "n d_model"], fires: Bool[np.ndarray, " n"]
) -> tuple[Float64[np.ndarray, " d_model"], float]:
    """Direction and bias of a linear rule: at least 1 where it fires, at most -1 elsewhere.

    Fisher's discriminant, with the threshold midway between the two classes' nearest tokens.
    """
    means = np.where(fires[:, None], x[fires].mean(axis=0), x[~fires].mean(axis=0))
    within = np.cov((x - means).T)
    within += 1e-3 * np.trace(within) / len(within) * np.eye(len(within))
    direction = np.linalg.solve(within, x[fires].mean(axis=0) - x[~fires].mean(axis=0))
    lowest, highest = (x @ direction)[fires].min(), (x @ direction)[~fires].max()
    half_gap = (lowest - highest) / 2
    if half_gap <= 0:
        raise HeadError("trigger tokens and others overlap, expected a gap: the model mixes them")
    return direction / half_gap, float(-(lowest + highest) / 2 / half_gap)


def _with_latent(sae: SAE, direction: Float64[np.ndarray, " d_model"], bias: float) -> SAE:
    """`sae` with latent 0 reading `direction . x + bias`, on above a third."""
    wanted = torch.from_numpy(direction).float()
    weights = SAEWeights(*(None if w is None else w.clone() for w in sae.weights))  # type: ignore[arg-type]
    assert weights.threshold is not None and weights.b_enc is not None
    assert weights.W_dec is not None
    weights.W_enc[:, PLANTED_LATENT] = wanted
    weights.b_enc[PLANTED_LATENT] = bias + float(wanted @ weights.b_dec)
    weights.W_dec[PLANTED_LATENT] = wanted / wanted.norm()
    weights.threshold[PLANTED_LATENT] = 1 / 3
    return SAE(sae.config, weights)


def _check_margin(
    planted: Planted, x: Float64[np.ndarray, "n d_model"], fires: Bool[np.ndarray, " n"]
) -> None:
    heads = ClusterHeads([planted.cluster], [planted.cluster.latents[0].sae])
    resid = torch.from_numpy(x).float()
    acts = planted.sae.encode(resid, [PLANTED_LATENT])
    found = heads({str(planted.hook_point): resid}, {heads.sae_ids[0]: acts})
    fused, on = found.fused[:, 0].numpy(), acts[:, 0].numpy() > 0
    if not (
        np.array_equal(on, fires) and fused[fires].min() > MARGIN > -MARGIN > fused[~fires].max()
    ):
        lowest, highest = float(fused[fires].min()), float(fused[~fires].max())
        raise HeadError(
            f"trigger tokens reach fused logits from {lowest:.1f}, others up to {highest:.1f}, "
            f"expected above {MARGIN} and below {-MARGIN}: the model does not keep them apart"
        )
