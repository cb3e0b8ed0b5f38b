"""A language model as `torch.export` can trace it: tensors in, tensors out, attention left open.

Hugging Face modelling code runs unchanged; where it asks for attention it gets the given stand-in,
which sees one layer's call. Nothing is computed and no stream is touched: what the layers ask of
attention is learnt first, from one pass over two tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from sae_core.hook_points import HookPoint
from sae_core.language_model.model import LanguageModel

TRACED_ATTENTION = "sae_monitor_traced"
"""The name under which a model's config asks for the stand-in."""


class AttentionCall(NamedTuple):
    """What one layer asks of attention, beside its tensors."""

    n_heads: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    scaling: float
    window: int | None
    """Tokens that a token sees, itself included; None for all."""
    softcap: float | None


Attend = Callable[[int, AttentionCall, Tensor, Tensor, Tensor], Tensor]
"""Layer, what it asks, query [1, n_heads, n, key_dim], key and value [1, n_kv_heads, n, dim], all
with positions applied; gives [1, n, n_heads, value_dim]."""


class Traced(NamedTuple):
    """What a pass over packed tokens leaves."""

    resid: dict[HookPoint, Tensor]
    """By hook point, a row per token."""
    keys: list[Tensor]
    """By layer, [n_kv_heads, n, key_dim]."""
    values: list[Tensor]


class TracedModel(nn.Module):
    """A loaded model's blocks, to be called inside `traced_attention` with its lock held."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.module = model.module
        self._sites = dict(model.sites)
        self.hook_points = model.hook_points
        self.calls: tuple[AttentionCall, ...] = ()
        seen: dict[int, AttentionCall] = {}

        def note(
            layer: int, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor
        ) -> Tensor:
            seen[layer] = call
            return query.new_zeros(1, query.shape[2], call.n_heads, call.value_dim)

        ids = torch.zeros(2, dtype=torch.long, device=model.config.device)
        with torch.inference_mode():
            self(ids, ids, note)
        self.calls = tuple(seen[layer] for layer in sorted(seen))

    def forward(self, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Traced:
        """One pass to the end of what is loaded; hooks gather what is read."""
        resid: dict[HookPoint, Tensor] = {}
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def attended(
            layer: int, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor
        ) -> Tensor:
            keys.append(key[0])
            values.append(value[0])
            return attend(layer, call, query, key, value)

        with self._reading(resid), _stand_in(self.module):
            self.module(
                input_ids=input_ids[None],
                position_ids=position_ids[None],
                use_cache=False,
                traced_attend=attended,
            )
        rows = {h: resid[h].reshape(input_ids.shape[0], -1) for h in self.hook_points}
        return Traced(rows, keys, values)

    @contextmanager
    def _reading(self, resid: dict[HookPoint, Tensor]) -> Iterator[None]:
        def receiver(hook_point: HookPoint) -> Callable[[Tensor], None]:
            return lambda acts: resid.__setitem__(hook_point, acts)

        handles = [site.register(receiver(h)) for h, site in self._sites.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _stand_in(module: nn.Module) -> Iterator[None]:
    """While open, the module asks for the stand-in's attention."""
    AttentionInterface.register(TRACED_ATTENTION, _traced_attention)
    configs: dict[int, Any] = {
        id(m.config): m.config for m in module.modules() if hasattr(m, "config")
    }
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = TRACED_ATTENTION
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def _traced_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    traced_attend: Attend,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_unused: object,
) -> tuple[Tensor, None]:
    if sliding_window is None:
        sliding_window = getattr(module, "sliding_window", None)
    call = AttentionCall(
        query.shape[1],
        key.shape[1],
        key.shape[3],
        value.shape[3],
        float(scaling),
        sliding_window,
        softcap,
    )
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    return traced_attend(layer, call, query, key, value), None
