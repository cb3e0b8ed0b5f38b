"""A language model cut at its deepest hook point: token ids in, activations out.

One step runs new tokens of many streams as one ragged batch, without padding. Knows no files
(see `loading`) and no text (see `tokenizer`). State of a stream is in its `KVStream`, state of a
step in its plan; nothing of either stays on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_core.errors import HookPointError, TokenError
from sae_core.hook_points import HookPoint, ModulePath
from sae_core.language_model.mirrored import Leader
from sae_core.language_model.packed import PackedPlan, Span
from sae_core.language_model.paged import PagedPlan, PagedStream
from sae_core.language_model.pages import PagePool, pool_for
from sae_core.language_model.processing import ProcessedShift, Processing, processed_shift
from sae_core.language_model.sites import HookSite, canonical, locate
from sae_core.language_model.span_attention import Attention, Heads, choose_attention
from sae_core.language_model.token_streams import KVStream, TokenStream
from sae_core.language_model.varlen import Kernel, installed_kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModelConfig:
    """Facts about a loaded model."""

    model_type: str
    """Hugging Face's name of the architecture, such as gemma3_text."""
    d_model: int
    n_layers: int
    """Blocks that were loaded."""
    n_layers_total: int
    """Blocks that the checkpoint has."""
    vocab_size: int
    max_positions: int
    """Tokens that one stream may hold."""
    folder: Path
    dtype: torch.dtype
    devices: tuple[torch.device, ...]
    """Where the blocks are, in order; token ids go in at the first."""
    n_ranks: int = 1
    """Processes of which each holds a part of every block."""
    products: str = "torch"
    """The library that multiplies matrices: torch (with what it calls by itself) or onednn."""
    attention: str = "torch"
    """What attends from several tokens of a stream: torch's fused kernel, or blocks."""
    rows: str = "torch"
    """What norms rows and attends from single tokens: torch, or compiled loops."""

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self.devices[0]


@dataclass(frozen=True, slots=True)
class Segment:
    """New tokens of one stream, to follow what the stream already holds."""

    stream: TokenStream
    token_ids: Sequence[int]


class LanguageModel:
    """Blocks up to the deepest hook point, run on packed segments."""

    def __init__(
        self,
        module: nn.Module,
        config: LanguageModelConfig,
        hook_points: Sequence[HookPoint],
        *,
        attention: Attention = "torch",
    ) -> None:
        self.config = config
        self._leader: Leader | None = None
        self.hook_points: tuple[HookPoint, ...] = tuple(dict.fromkeys(hook_points))
        self._module = module
        self._sites = {hook_point: locate(module, hook_point) for hook_point in self.hook_points}
        is_whole = len(config.devices) == config.n_ranks == 1
        self.pool: PagePool | None = pool_for(config.device, config.dtype) if is_whole else None
        """Where streams keep their keys and values; None where each has buffers of its own."""
        self.kernel: Kernel | None = installed_kernel()
        """What attends over pages where it can."""
        self._lock = Lock()  # hooks are installed for the length of a step
        first_pass, heads = self._measure()
        if heads is not None and self.pool is None and {d.type for d in config.devices} == {"cpu"}:
            chosen = choose_attention(heads, config.dtype, attention)
            self.config = replace(config, attention=chosen)
        self.widths: Mapping[HookPoint, int] = {
            h: first_pass[h].shape[-1] for h in self.hook_points
        }
        """Entries of one token's activations at every hook point: d_model, but for hook_z,
        mlp.hook_post and some module paths. Measured on a first pass, not taken from the config."""
        self.devices: Mapping[HookPoint, torch.device] = {
            h: first_pass[h].device for h in self.hook_points
        }
        """Where the activations at every hook point are."""

    @property
    def module(self) -> nn.Module:
        """The Hugging Face module, cut; for what traces it rather than runs it."""
        return self._module

    @property
    def sites(self) -> Mapping[HookPoint, HookSite]:
        """Where each hook point is read."""
        return self._sites

    def can_read(self, hook_point: HookPoint) -> bool:
        """Whether the whole model has such a place, loaded or not."""
        n_layers, n_layers_total = self.config.n_layers, self.config.n_layers_total
        if hook_point.layer >= n_layers_total:
            return False
        if hook_point.layer >= n_layers and not isinstance(hook_point, ModulePath):
            # Blocks are alike, so one that is loaded stands for those that are not.
            hook_point = replace(hook_point, layer=n_layers - 1)
        try:
            locate(self._module, hook_point)
        except HookPointError:
            return False
        return True

    def lead(self, leader: Leader) -> None:
        """From now on every step and stream is told to the other ranks; see `ranks`."""
        self._leader = leader

    def open_stream(self) -> TokenStream:
        """A stream with no tokens, for use with this model only."""
        if self._leader is not None:
            return self._leader.open_stream(self.config.n_layers)
        return KVStream(self.config.n_layers) if self.pool is None else PagedStream(self.pool)

    @property
    def failure(self) -> str:
        """Why no step can succeed any more; empty while they can."""
        return "" if self._leader is None else self._leader.failure

    def close(self) -> None:
        """Ends the other ranks, where there are any; no step can follow."""
        if self._leader is not None:
            self._leader.close()

    def canonical(self, hook_point: HookPoint) -> HookPoint:
        """The named site that a module path means here; see `sites.canonical`."""
        return canonical(self._module, hook_point)

    def processed_shift(self, hook_point: HookPoint, processing: Processing) -> ProcessedShift:
        """From activations here to a processed TransformerLens model's; see `processing`."""
        return processed_shift(self._module, hook_point, processing)

    def step(self, segments: Sequence[Segment]) -> dict[HookPoint, Float[Tensor, "total_tokens _"]]:
        """The activations at every hook point, for all new tokens in segment order.

        Row `i` is token `i`, `widths` says how wide it is.

        Every stream grows by its tokens. When anything is raised no stream has grown, and the
        same step can be tried again. A stream may have several segments, which follow each other.
        The tensors are the caller's, in the model's dtype and on its device.

        Raises:
            TokenError: A token id outside the vocabulary, or a stream longer than the model's
                positions; names segment and position, and nothing has run.
            RankError: Another rank of a tensor-parallel model is gone; no step will succeed.
        """
        plan, token_ids, positions = self._plan(segments)
        if not token_ids:
            return {
                h: torch.empty(0, w, dtype=self.config.dtype, device=self.devices[h])
                for h, w in self.widths.items()
            }
        if self._leader is None:
            captured = self.run(plan, token_ids, positions)
        else:
            with self._leader.step(plan, token_ids, positions):
                captured = self.run(plan, token_ids, positions)
        # A clone made outside inference mode is an ordinary tensor, which autograd accepts.
        # Some modules see rows without a batch axis, such as OPT's MLP.
        acts = {h: captured[h].reshape(len(token_ids), -1).clone() for h in self.hook_points}
        for span in plan.spans:
            span.stream.advance(span.stop - span.start)
        return acts

    def run(
        self, plan: PackedPlan, token_ids: list[int], positions: list[int]
    ) -> dict[HookPoint, Tensor]:
        """One forward pass, up to the last hook point; what each one saw, in its own shape.

        The streams of the plan hold its rows then, and have not grown: `step` does that.
        """
        device = self.config.device
        captured: dict[HookPoint, Tensor] = {}
        with (
            self._lock,
            self._capture(captured),
            torch.inference_mode(),
            suppress(_DeepestReached),
        ):
            self._module(
                input_ids=torch.tensor([token_ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                packed_plan=plan,
            )
        return captured

    def _measure(self) -> tuple[dict[HookPoint, Tensor], Heads | None]:
        """Reads two tokens of a stream of their own, and checks that a row is a token.

        Also the shape of attention; None where no block needed any.
        """
        n = min(2, self.config.max_positions)
        plan, token_ids, positions = self._plan([Segment(self.open_stream(), [0] * n)])
        captured = self.run(plan, token_ids, positions)
        for hook_point in self.hook_points:
            if hook_point not in captured:
                raise HookPointError(f"hook point {hook_point}: its module did not run")
            acts = captured[hook_point]
            if acts.shape[:-1] not in ((1, n), (n,)):
                found = f"activations of shape {list(acts.shape)} for {n} tokens"
                raise HookPointError(f"hook point {hook_point}: {found}, expected one row a token")
        return captured, plan.heads

    def _plan(self, segments: Sequence[Segment]) -> tuple[PackedPlan, list[int], list[int]]:
        spans: list[Span] = []
        all_ids: list[int] = []
        positions: list[int] = []
        lengths: dict[int, int] = {}
        for index, segment in enumerate(segments):
            stream, token_ids = segment.stream, list(segment.token_ids)
            if not token_ids:
                continue
            past = lengths.get(id(stream), stream.length)
            length = lengths[id(stream)] = past + len(token_ids)
            if length > self.config.max_positions:
                raise TokenError(
                    f"segment {index}: found {length} tokens in the stream, "
                    f"the model has {self.config.max_positions} positions"
                )
            if not 0 <= min(token_ids) <= max(token_ids) < self.config.vocab_size:
                bad = next(
                    i for i, t in enumerate(token_ids) if not 0 <= t < self.config.vocab_size
                )
                raise TokenError(
                    f"segment {index}: found token id {token_ids[bad]} at position {past + bad}, "
                    f"expected 0 to {self.config.vocab_size - 1}"
                )
            spans.append(Span(stream, len(all_ids), len(all_ids) + len(token_ids), past))
            all_ids += token_ids
            positions += range(past, length)
        if self.pool is None:
            plan = PackedPlan(
                tuple(spans),
                in_blocks=self.config.attention == "blocks",
                compiled=self.config.rows == "compiled",
            )
            return plan, all_ids, positions
        return PagedPlan(spans, self.pool, self.kernel), all_ids, positions

    @contextmanager
    def _capture(self, captured: dict[HookPoint, Tensor]) -> Iterator[None]:
        """While open, a forward pass fills `captured` and stops at the last missing hook point."""

        def receiver(hook_point: HookPoint) -> Callable[[Tensor], None]:
            def receive(resid: Tensor) -> None:
                captured[hook_point] = resid
                if len(captured) == len(self._sites):
                    raise _DeepestReached

            return receive

        handles = [site.register(receiver(h)) for h, site in self._sites.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _DeepestReached(Exception):
    """Ends a forward pass once every hook point has been read; never leaves `step`."""
