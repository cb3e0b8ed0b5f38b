"""Several SAEs, each at its hook point, with their latents counted through like those of one.

Latents are then chosen from all of them by one contrast: number n of the whole is latent
n - first of the SAE that begins at `first`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from numpy import ndarray

from sae_core.heads import ClusterHeads
from sae_core.sae import SAE
from sae_core.training.discovery import TextActs, text_acts
from sae_core.training.examples import ResidualSet
from sae_core.training.token_features import CHUNK_TOKENS, latent_acts_of, text_means

Streams = Mapping[str, ResidualSet]
"""By hook point, the same texts; what they share (lengths, token ids) may be read at any."""


class PlacedSAE(NamedTuple):
    """An SAE and where it reads."""

    id: str
    """As the bundle names it."""
    hook_point: str
    sae: SAE


class Dictionary:
    """All latents of some SAEs, in the order of the SAEs."""

    def __init__(self, saes: Sequence[PlacedSAE]) -> None:
        self.saes = tuple(saes)
        ends = np.cumsum([one.sae.config.d_sae for one in self.saes]).tolist()
        self._firsts = [0, *ends[:-1]]

    def name_of(self, latent: int) -> tuple[str, int]:
        """The SAE's id, and the latent's number within it."""
        place = int(np.searchsorted(self._firsts, latent, side="right")) - 1
        return self.saes[place].id, latent - self._firsts[place]

    def text_acts(self, streams: Streams) -> TextActs:
        """Every latent over each text."""
        found = [text_acts(one.sae, streams[one.hook_point]) for one in self.saes]
        return TextActs(*(np.concatenate(parts, axis=-1) for parts in zip(*found, strict=True)))

    def acts_of(
        self, streams: Streams, latents: Sequence[int]
    ) -> Float32[ndarray, "total n_latents"]:
        """Latent acts of the chosen latents for every token."""
        n_tokens = len(shared(streams).token_ids)
        acts = np.empty((n_tokens, len(latents)), np.float32)
        names = [self.name_of(latent) for latent in latents]
        for one in self.saes:
            columns = [column for column, (sae_id, _) in enumerate(names) if sae_id == one.id]
            if columns:
                ids = [names[column][1] for column in columns]
                acts[:, columns] = latent_acts_of(one.sae, streams[one.hook_point], ids)
        return acts


class ReadTexts(NamedTuple):
    """Labelled texts as the heads that are fitted on them read them."""

    streams: Streams
    dictionary: Dictionary
    dense_hook_point: str
    acts: TextActs
    """All latents of the dictionary."""
    means: Float32[ndarray, "n_texts d_in"]
    """Of the residuals at `dense_hook_point`."""

    @classmethod
    def of(cls, streams: Streams, dictionary: Dictionary, dense_hook_point: str) -> ReadTexts:
        dense = streams[dense_hook_point]
        return cls(
            streams,
            dictionary,
            dense_hook_point,
            dictionary.text_acts(streams),
            text_means(np.asarray(dense.resid), dense.starts),
        )


def shared(streams: Streams) -> ResidualSet:
    """One of the streams, for what is the same in all."""
    return next(iter(streams.values()))


def some_texts(streams: Streams, texts: Int64[ndarray, " n"]) -> dict[str, ResidualSet]:
    """The chosen texts at every hook point; copies their rows."""
    return {name: stream.subset(texts) for name, stream in streams.items()}


def token_logits(
    streams: Streams, dictionary: Dictionary, heads: ClusterHeads
) -> Float32[ndarray, "total n_clusters 3"]:
    """Fused, dense and SAE logit of every token, by the code that serves."""
    n_tokens = len(shared(streams).token_ids)
    logits = np.empty((n_tokens, len(heads.clusters), 3), np.float32)
    encoders = [
        (one.id, one.hook_point, one.sae.slice(heads.latent_ids[one.id])) for one in dictionary.saes
    ]
    for start in range(0, n_tokens, CHUNK_TOKENS):
        part = slice(start, min(start + CHUNK_TOKENS, n_tokens))
        with torch.inference_mode():
            resid = {
                name: torch.from_numpy(np.array(stream.resid[part]))
                for name, stream in streams.items()
            }
            found = heads(resid, {name: encode(resid[place]) for name, place, encode in encoders})
            logits[part] = torch.stack((found.fused, found.dense, found.sae), dim=-1).numpy()
    return logits
