"""What a model loses when an activation is replaced: next-token loss of the whole model, with head.

The only place that loads a model whole and runs it by plain Hugging Face code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from sae_core.errors import HookPointError, ModelLoadError
from sae_core.hook_points import HookPoint
from sae_core.language_model.checkpoint import one_line
from sae_core.language_model.sites import HookSite, locate

LOGIT_ROWS = 256
"""Positions whose logits are held at a time; a vocabulary of 262,144 takes 1 MiB a position."""

Replacement = Callable[[Float[Tensor, "positions width"]], Float[Tensor, "positions width"]]
"""What stands in for the activations of every position but the first."""


class WholeModel:
    """A causal language model with its head, in float32.

    Raises ModelLoadError where the folder cannot be read or has no head.
    """

    def __init__(self, folder: Path, *, device: str | torch.device = "cpu") -> None:
        try:
            # The caller has a bar of its own.
            logging.disable_progress_bar()  # type: ignore[no-untyped-call]
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ModelLoadError(f"model folder {folder}: {one_line(error)}") from error
        module, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ModelLoadError(
                f"model folder {folder}: found no {missing[0]}, expected a whole model with its "
                "language-modelling head"
            )
        self._module: Any = module.to(device).eval().requires_grad_(False)
        self._device = torch.device(device)

    @torch.inference_mode()
    def loss(
        self,
        contexts: Sequence[Sequence[int]],
        hook_point: HookPoint | None = None,
        replacement: Replacement | None = None,
    ) -> float:
        """Mean cross-entropy, in nats a token, of predicting each context's third token and on.

        The second token is predicted from the first one, where nothing is replaced.

        Raises:
            HookPointError: What is read at the hook point cannot be replaced there.
        """
        total, n = 0.0, 0
        with self._spliced(hook_point, replacement):
            for context in contexts:
                if len(context) < 3:
                    continue
                ids = torch.tensor([list(context)], device=self._device)
                states: Tensor = self._module.base_model(input_ids=ids, use_cache=False)[0][0, 1:-1]
                targets = ids[0, 2:]
                for rows, wanted in zip(
                    torch.split(states, LOGIT_ROWS), torch.split(targets, LOGIT_ROWS), strict=True
                ):
                    loss = functional.cross_entropy(self._logits(rows), wanted, reduction="sum")
                    total += float(loss)
                n += len(targets)
        if not n:
            raise ModelLoadError("contexts: found none of at least three tokens, expected some")
        return total / n

    def _logits(self, states: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows vocab"]:
        logits: Tensor = self._module.get_output_embeddings()(states)
        cap = getattr(self._module.config.get_text_config(), "final_logit_softcapping", None)
        return logits.float() if cap is None else cap * torch.tanh(logits.float() / cap)

    @contextmanager
    def _spliced(
        self, hook_point: HookPoint | None, replacement: Replacement | None
    ) -> Iterator[None]:
        if hook_point is None or replacement is None:
            yield
            return
        site = locate(self._module, hook_point)
        _check_replaceable(site, hook_point)
        handle = (
            site.module.register_forward_pre_hook(_input_hook(replacement), with_kwargs=True)
            if site.io == "input"
            else site.module.register_forward_hook(_output_hook(replacement))
        )
        try:
            yield
        finally:
            handle.remove()


def _check_replaceable(site: HookSite, hook_point: HookPoint) -> None:
    is_norm = "norm" in type(site.module).__name__.lower()
    if site.transform is not None or (site.io == "input" and is_norm):
        raise HookPointError(
            f"hook point {hook_point}: the stream that enters a norm also passes beside it, so it "
            "cannot be replaced there"
        )


def _replaced(value: Tensor, replacement: Replacement) -> Tensor:
    rows = value.reshape(-1, value.shape[-1])
    changed = torch.cat([rows[:1], replacement(rows[1:].float()).to(rows.dtype)])
    return changed.reshape(value.shape)


def _input_hook(replacement: Replacement) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (_replaced(args[0], replacement), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: _replaced(kwargs[first], replacement)}

    return hook


def _output_hook(replacement: Replacement) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (_replaced(output[0], replacement), *output[1:])
        return _replaced(output, replacement)

    return hook
