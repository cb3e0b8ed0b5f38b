"""Probe texts -> activations at any place of a model, for judging whether an SAE belongs there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.errors import FidelityError, HookPointError
from sae_core.hook_points import HookPoint, parse_hook_point
from sae_core.language_model.model import LanguageModel, Segment
from sae_core.language_model.processing import Processing
from sae_core.language_model.tokenizer import Tokenizer

STEP_TOKENS = 2048
"""Tokens of one forward pass; texts are not split."""

LoadModel = Callable[[Sequence[HookPoint]], LanguageModel]
"""Loads the model far enough for some hook points, all of which it has."""


class ProbeReader:
    """Runs the probe texts through a model that is loaded as far as is asked.

    Args:
        model: The model as it is loaded; used where it reads all that is asked for.
        load: Loads the same model for other hook points.
        texts: At least one.
        processing: Of the TransformerLens model whose activations are wanted; None for the model's
            own.
    """

    def __init__(
        self,
        model: LanguageModel,
        load: LoadModel,
        tokenizer: Tokenizer,
        texts: Sequence[str],
        *,
        processing: Processing | None = None,
    ) -> None:
        if not texts:
            raise FidelityError("probe texts: found none, expected at least one")
        self._model, self._load, self._processing = model, load, processing
        self._tokenizer, self._texts = tokenizer, tuple(texts)

    @property
    def begins_with_bos(self) -> bool:
        """Whether a text's tokens begin with BOS as a matter of course."""
        ids = self._tokenizer.encode(self._texts[0])
        return bool(ids) and ids[0] == self._tokenizer.bos_id

    def canonical(self, name: str) -> str:
        """The named site that a module path means in this model; other names stay as they are."""
        return str(self._model.canonical(parse_hook_point(name)))

    def read(self, names: Sequence[str], with_bos: bool) -> Mapping[str, Float[Tensor, "n width"]]:
        """Activations by hook point, a row per token but BOS; what the model lacks is left out."""
        points = {name: parse_hook_point(name) for name in names}
        there = {name: point for name, point in points.items() if self._model.can_read(point)}
        if not there:
            return {}
        wanted = list(dict.fromkeys(there.values()))
        is_loaded = set(wanted) <= set(self._model.hook_points)
        model = self._model if is_loaded else self._load(wanted)
        rows: dict[str, list[Tensor]] = {name: [] for name in there}
        for batch in self._batches(with_bos):
            kept = torch.tensor([i != self._tokenizer.bos_id for ids in batch for i in ids])
            read = model.step([Segment(model.open_stream(), ids) for ids in batch])
            for name, point in there.items():
                found = read[point]
                rows[name].append(found[kept.to(found.device)])
        joined = {name: torch.cat(parts) for name, parts in rows.items()}
        if self._processing is None:
            return joined
        converted: dict[str, Tensor] = {}
        for name, x in joined.items():
            with suppress(HookPointError):  # a place that cannot be converted is left out
                converted[name] = model.processed_shift(there[name], self._processing)(x)
        return converted

    def _batches(self, with_bos: bool) -> list[list[list[int]]]:
        batches: list[list[list[int]]] = []
        room = 0
        for text in self._texts:
            ids = list(self._tokenizer.encode(text, add_bos=with_bos))
            if not with_bos and ids and ids[0] == self._tokenizer.bos_id:
                ids = ids[1:]  # a tokenizer that adds it whatever it is told
            if not ids:
                continue
            if len(ids) > room:
                batches.append([])
                room = STEP_TOKENS
            batches[-1].append(ids)
            room -= len(ids)
        return batches
