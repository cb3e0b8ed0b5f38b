"""What runs in a peer's process, in its own environment: imports nothing of ours.

Takes commands as lines of JSON and answers each with one, so that sides can take turns while every
model stays loaded. `{"run": side}` is answered by the seconds of one pass over the texts, with
`"save": path` the residual stream and the latents go to a file too.

All sides score the whole way: language model, SAE, and the registered latents taken out.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Outcome(NamedTuple):
    """What one pass left: nothing where it was read by nobody."""

    resid: torch.Tensor | None = None
    latent_acts: torch.Tensor | None = None


Side = Callable[[], Outcome]


def main() -> None:
    """Loads what the first argument describes, then answers until standard input ends."""
    given = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries greet on standard output
    torch.set_num_threads(given["threads"])
    sides = KINDS[given["kind"]](given)
    print(json.dumps({"sides": list(sides)}), file=replies, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        with torch.inference_mode():
            outcome = sides[asked["run"]]()
        seconds = time.perf_counter() - began
        if "save" in asked and outcome.resid is not None:
            acts = outcome.latent_acts[..., given["latent_ids"]]
            np.savez(asked["save"], resid=outcome.resid.numpy(), latent_acts=acts.numpy())
        del outcome
        print(json.dumps({"seconds": seconds}), file=replies, flush=True)


def saelens(given: dict[str, Any]) -> dict[str, Side]:
    """The documented way, which runs the whole model with the SAE spliced in, and the best one."""
    from sae_lens import SAE, HookedSAETransformer

    model = HookedSAETransformer.from_pretrained_no_processing(
        given["tl_name"],
        hf_model=AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(given["model"]),
        device="cpu",
        dtype=torch.float32,
    )
    sae = SAE.load_from_disk(given["sae"], device="cpu")
    tokens, hook_point = batch(given), given["hook_point"]

    def documented() -> Outcome:
        _, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
        return Outcome(
            cache[f"{hook_point}.hook_sae_input"], cache[f"{hook_point}.hook_sae_acts_post"]
        )

    def best() -> Outcome:
        _, cache = model.run_with_cache(
            tokens, stop_at_layer=given["n_layers"], names_filter=hook_point
        )
        return Outcome(cache[hook_point], sae.encode(cache[hook_point]))

    return {"documented": documented, "best": best}


def nnsight(given: dict[str, Any]) -> dict[str, Side]:
    """A trace that saves the block's output and stops there."""
    from nnsight import LanguageModel

    model = LanguageModel(
        AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(given["model"]),
    )
    tokens, encode, last = batch(given), encoder(given), given["n_layers"] - 1

    def trace() -> Outcome:
        with model.trace(tokens) as tracer:
            resid = model.model.layers[last].output.save()
            tracer.stop()
        resid = resid[0] if isinstance(resid, tuple) else resid
        return Outcome(resid, encode(resid))

    return {"trace": trace}


def transformers(given: dict[str, Any]) -> dict[str, Side]:
    """Plain Hugging Face with a forward hook: the whole model, cut, and cut on padded batches."""
    causal = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32).eval()
    tokens, encode, n_layers = batch(given), encoder(given), given["n_layers"]
    cut = type(causal.model)(causal.config).eval()
    cut.load_state_dict(causal.model.state_dict(), assign=True)
    cut.layers, cut.norm = cut.layers[:n_layers], torch.nn.Identity()
    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: object) -> None:
        seen[:] = [output[0] if isinstance(output, tuple) else output]

    for layers in (causal.model.layers, cut.layers):
        layers[n_layers - 1].register_forward_hook(keep)

    def whole() -> Outcome:
        causal(tokens, use_cache=False)
        return Outcome(seen[0], encode(seen[0]))

    def early() -> Outcome:
        cut(tokens, use_cache=False)
        return Outcome(seen[0], encode(seen[0]))

    mixed = json.loads(Path(given["mixed"]).read_text())

    def padded(texts: list[list[int]], n_at_a_time: int) -> Outcome:
        for start in range(0, len(texts), n_at_a_time):
            some = texts[start : start + n_at_a_time]
            ids = torch.zeros(len(some), max(map(len, some)), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, text in enumerate(some):
                ids[row, : len(text)] = torch.tensor(text)
                mask[row, : len(text)] = 1
            cut(ids, attention_mask=mask, use_cache=False)
            encode(seen[0])
        return Outcome()

    return {
        "full": whole,
        "cut": early,
        "padded": lambda: padded(mixed, len(mixed)),
        "sorted": lambda: padded(sorted(mixed, key=len), 8),
    }


KINDS: dict[str, Callable[[dict[str, Any]], dict[str, Side]]] = {
    "saelens": saelens,
    "nnsight": nnsight,
    "transformers": transformers,
}


def batch(given: dict[str, Any]) -> torch.Tensor:
    """The texts of the prefill figures, all of one length."""
    return torch.tensor(json.loads(Path(given["batch"]).read_text()))


def encoder(given: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """JumpReLU over all latents in plain torch, as one writes it from the paper."""
    from safetensors.torch import load_file

    weights = load_file(Path(given["sae"]) / "sae_weights.safetensors")

    def encode(x: torch.Tensor) -> torch.Tensor:
        pre_acts = x @ weights["W_enc"] + weights["b_enc"]
        return torch.relu(pre_acts) * (pre_acts > weights["threshold"])

    return encode


if __name__ == "__main__":
    main()
