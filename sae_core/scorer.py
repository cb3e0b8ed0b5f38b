"""Tokens in, token logits out: language model, SAEs and heads as one step.

Knows no requests, thresholds or time limits: those are the service's. A step is a function of its
parts alone; what a stream remembers is its `TokenStream`. Activations that are given are scored by
the same code as those of our own forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import NamedTuple, TypeGuard

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sae_core.activation_source import GivenRows, Part
from sae_core.encoder import Encoder
from sae_core.errors import HeadError, HookPointError, ScorerError, ShapeError
from sae_core.heads import ClusterHeads, side_by_side
from sae_core.hook_points import HookPoint, n_layers_needed
from sae_core.language_model.families import uses_layer_norm
from sae_core.language_model.model import LanguageModel, Segment
from sae_core.language_model.processing import DEFAULT_PROCESSING, ProcessedShift
from sae_core.language_model.token_streams import TokenStream
from sae_core.language_model.tokenizer import Tokenizer
from sae_core.live_fit import LiveFit
from sae_core.sae import SAE
from sae_core.vitals import FitSums


class SegmentScores(NamedTuple):
    """The scores of one segment's tokens, in order."""

    logits: Float32[np.ndarray, "n n_clusters 3"]
    """Last axis: fused, dense, sae; clusters in registered order."""
    latent_acts: Float32[np.ndarray, "n n_latents"]
    """Registered latents, those of each SAE side by side in the order of the heads' `sae_ids`."""


class StepScores(NamedTuple):
    """What one step made, and how long its two halves took."""

    segments: tuple[SegmentScores, ...]
    forward_seconds: float
    encode_seconds: float
    """SAE encoding, heads, and the copy to host memory."""
    fits: Mapping[int, Mapping[str, FitSums]] = {}
    """By the part's index, of those that were to be measured; then by SAE."""


class Forward(NamedTuple):
    """What a forward pass gave of all its tokens, and their scores where it made them too."""

    resid: Mapping[HookPoint, Float[Tensor, "n _"]]
    scores: SegmentScores | None = None


class Reading(NamedTuple):
    """How one SAE's registered latents are read."""

    hook_point: HookPoint
    shift: ProcessedShift | None
    encode: Encoder

    def __call__(
        self, resid: Mapping[HookPoint, Float[Tensor, "n _"]]
    ) -> Float[Tensor, "n n_latents"]:
        x = resid[self.hook_point]
        return self.encode(x if self.shift is None else self.shift(x))


def reading_shift(
    language_model: LanguageModel, hook_point: HookPoint, sae: SAE
) -> ProcessedShift | None:
    """What takes the model's activations to those that the SAE was trained on; None for nothing.

    Raises:
        HookPointError: They cannot be had exactly, or the SAE reads centred activations of a model
            that is never centred.
    """
    model_type = language_model.config.model_type
    if sae.config.center_input and not uses_layer_norm(model_type):
        raise HookPointError(
            f"SAE at {hook_point}: reads centred activations, but {model_type} normalises by "
            "root mean square and is never centred; expected no center for it"
        )
    if sae.card.processing == "none":
        return None
    return language_model.processed_shift(hook_point, DEFAULT_PROCESSING)


class Scorer:
    """A language model whose residual streams are read by SAEs and dense heads.

    Args:
        language_model: Loaded up to every hook point named below.
        tokenizer: The one that belongs to it; kept beside it, not used here.
        saes: By id, where each one reads and what it is; ids as in the heads' `sae_ids`.
        heads: The clusters to score.

    Raises:
        HeadError: The heads' SAEs are not those given, or a cluster does not fit them.
        ShapeError: An SAE's d_in is not the width at its hook point.
        HookPointError: An SAE or dense head reads where the language model was not told to.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        tokenizer: Tokenizer,
        saes: Mapping[str, tuple[HookPoint, SAE]],
        heads: ClusterHeads,
    ) -> None:
        if set(saes) != set(heads.sae_ids):
            found, expected = sorted(saes), sorted(heads.sae_ids)
            raise HeadError(f"SAEs given are {found}, the heads were built for {expected}")
        devices, widths = language_model.devices, language_model.widths
        read = {f"SAE {sae_id!r}": str(hook_point) for sae_id, (hook_point, _) in saes.items()}
        read |= {
            f"dense head of cluster {c.id!r}": c.dense_hook_point
            for c in heads.clusters
            if c.dense_hook_point is not None
        }
        loaded = [str(hook_point) for hook_point in language_model.hook_points]
        for reader, name in read.items():
            if name not in loaded:
                expected_places = ", ".join(loaded)
                raise HookPointError(f"{reader} reads {name}, the model gives {expected_places}")
        for sae_id, (hook_point, sae) in saes.items():
            if not sae.config.reads(widths[hook_point]):
                raise ShapeError(
                    f"SAE {sae_id!r}: d_in is {sae.config.d_in}, "
                    f"the model's {hook_point} is {widths[hook_point]} wide"
                )
        d_sae = {sae_id: sae.config.d_sae for sae_id, (_, sae) in saes.items()}
        heads.check_fit(d_sae, {str(hook_point): n for hook_point, n in widths.items()})
        self.language_model = language_model
        self.tokenizer = tokenizer
        # Where the forward pass ends: what is read before is narrow, or read by a dense head.
        deepest = max(devices, key=lambda hook_point: n_layers_needed([hook_point]))
        self.heads = heads.to(devices[deepest])
        self.readings: Mapping[str, Reading] = {
            sae_id: Reading(
                hook_point=saes[sae_id][0],
                shift=reading_shift(language_model, *saes[sae_id]),
                encode=saes[sae_id][1].slice(heads.latent_ids[sae_id]).to(devices[saes[sae_id][0]]),
            )
            for sae_id in heads.sae_ids
        }
        self.live_fit = LiveFit(
            {
                sae: (read.hook_point, read.shift, saes[sae][1])
                for sae, read in self.readings.items()
            }
        )

    def open_stream(self) -> TokenStream:
        """A stream without tokens, for segments of this scorer."""
        return self.language_model.open_stream()

    def step(self, parts: Sequence[Part], measured: Sequence[int] = ()) -> StepScores:
        """Scores every part's tokens; those of segments become part of their streams.

        When anything is raised no stream has grown.

        Args:
            measured: indices of the parts on which the whole SAEs are run too.

        Raises:
            TokenError: As `LanguageModel.step`.
            ScorerError: A residual stream or a logit is not finite; names the part's index (as a
                segment), the token's position in its stream, and the hook point or the cluster.
        """
        lengths = {id(p.stream): (p.stream, p.stream.length) for p in parts if _is_segment(p)}
        pieces = _pieces(parts)
        own = [
            (piece, part) for piece, part in zip(pieces, parts, strict=True) if _is_segment(part)
        ]
        began = perf_counter()
        batches: list[_Batch] = []
        if own:
            forward = self._forward([segment for _, segment in own])
            batches.append(_Batch(forward.resid, [piece for piece, _ in own], forward.scores))
        try:
            for batch in batches:
                batch.check_finite()  # waits for the device: the forward pass ends here
            forward_ended = perf_counter()
            for piece, part in zip(pieces, parts, strict=True):
                if isinstance(part, GivenRows):
                    given = _Batch(part.tensors(self.language_model.devices), [piece])
                    given.check_finite()
                    batches.append(given)
            scores: dict[int, SegmentScores] = {}
            fits: dict[int, Mapping[str, FitSums]] = {}
            for batch in batches:
                scores |= self._score(batch)
                if measured:
                    fits |= self._fits(batch, measured)
        except ScorerError:
            for stream, length in lengths.values():
                stream.truncate(length)
            raise
        return StepScores(
            tuple(scores[index] for index in range(len(parts))),
            forward_ended - began,
            perf_counter() - forward_ended,
            fits,
        )

    def score_resid(
        self, resid: Mapping[HookPoint, Float[Tensor, "n _"]]
    ) -> tuple[Float32[np.ndarray, "n n_clusters 3"], Float32[np.ndarray, "n n_latents"]]:
        """Logits and latent activations of tokens whose residual streams are already known.

        Needs every hook point that an SAE or a dense head reads.
        """
        with torch.inference_mode():
            latent_acts = {sae_id: read(resid) for sae_id, read in self.readings.items()}
            device, dense = self.heads.device, self.heads.hook_points
            latent_acts = {sae_id: acts.to(device) for sae_id, acts in latent_acts.items()}
            read = {str(h): t.to(device) if str(h) in dense else t for h, t in resid.items()}
            logits = self.heads(read, latent_acts)
            stacked = torch.stack((logits.fused, logits.dense, logits.sae), dim=-1)
            acts = side_by_side(
                [acts.float() for acts in latent_acts.values()],
                stacked.new_empty(len(stacked), 0),
            )
        return stacked.cpu().numpy(), acts.cpu().numpy()

    def _forward(self, segments: Sequence[Segment]) -> Forward:
        """Our own forward pass; a subclass may have scores with it."""
        return Forward(self.language_model.step(segments))

    def _fits(self, batch: _Batch, measured: Sequence[int]) -> dict[int, Mapping[str, FitSums]]:
        fits: dict[int, Mapping[str, FitSums]] = {}
        start = 0
        for piece in batch.pieces:
            if piece.number in measured:
                rows = slice(start, start + piece.n_tokens)
                mine = {hook_point: acts[rows] for hook_point, acts in batch.resid.items()}
                fits[piece.number] = self.live_fit(mine, piece.start)
            start += piece.n_tokens
        return fits

    def _score(self, batch: _Batch) -> dict[int, SegmentScores]:
        logits, latent_acts = batch.scores or self.score_resid(batch.resid)
        finite = np.isfinite(logits)
        if not finite.all():
            row, column = (int(i) for i in np.argwhere(~finite)[0][:2])
            cluster = self.heads.clusters[column].id
            raise ScorerError(
                f"{batch.place(row)}: logits of cluster {cluster!r} are "
                f"{logits[row, column].tolist()}, expected finite"
            )
        scores: dict[int, SegmentScores] = {}
        if len(batch.pieces) == 1:
            return {batch.pieces[0].number: SegmentScores(logits, latent_acts)}
        start = 0
        for piece in batch.pieces:
            rows = slice(start, start + piece.n_tokens)
            # Copied, as one that is kept would hold the whole step's memory.
            scores[piece.number] = SegmentScores(logits[rows].copy(), latent_acts[rows].copy())
            start = rows.stop
        return scores


class _Piece(NamedTuple):
    """One part of a step, as messages name it."""

    number: int
    """Index in the step."""
    start: int
    """Position of its first token in its stream or request."""
    n_tokens: int


class _Batch(NamedTuple):
    """Activations that are scored together, and whose they are, in order."""

    resid: Mapping[HookPoint, Float[Tensor, "n _"]]
    pieces: Sequence[_Piece]
    scores: SegmentScores | None = None
    """Where the forward pass made them."""

    def check_finite(self) -> None:
        """Raises ScorerError at the first row that holds NaN or infinity."""
        for hook_point, tensor in self.resid.items():
            if bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
                continue  # what is not finite always shows in a sum; finite rows may overflow it
            finite = torch.isfinite(tensor).all(dim=-1)
            if not bool(finite.all()):
                row = int((~finite).nonzero()[0])
                raise ScorerError(
                    f"{self.place(row)}: residual stream at {hook_point} is not finite, "
                    "expected finite numbers"
                )

    def place(self, row: int) -> str:
        """Where a row comes from: its segment, and its position there."""
        for piece in self.pieces:
            if row < piece.n_tokens:
                return f"segment {piece.number}, position {piece.start + row}"
            row -= piece.n_tokens
        raise AssertionError("the row lies beyond the segments")


def _is_segment(part: Part) -> TypeGuard[Segment]:
    return isinstance(part, Segment)


def _pieces(parts: Sequence[Part]) -> list[_Piece]:
    pieces: list[_Piece] = []
    lengths: dict[int, int] = {}
    for index, part in enumerate(parts):
        if isinstance(part, GivenRows):
            pieces.append(_Piece(index, part.start, part.n_tokens))
            continue
        start = lengths.get(id(part.stream), part.stream.length)
        pieces.append(_Piece(index, start, len(part.token_ids)))
        lengths[id(part.stream)] = start + len(part.token_ids)
    return pieces
