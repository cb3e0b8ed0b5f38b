"""CARD.md of one trained SAE: the facts of its cfg.json for a reader."""

from __future__ import annotations

from typing import Any

from sae_core.sae_config import SAECard, SAEConfig

NAMES = {"batchtopk": "BatchTopK", "topk": "TopK", "jumprelu": "JumpReLU", "relu": "ReLU"}
STORED = {
    "batchtopk": "stored as JumpReLU with one threshold for all latents",
    "topk": "stored as TopK",
    "jumprelu": "stored as JumpReLU",
    "relu": "stored as ReLU (SAELens' standard)",
}


def sae_card(config: SAEConfig, card: SAECard) -> str:
    """The card of an SAE whose facts are those that `train_saes` wrote."""
    facts = card.facts
    training, held_out = facts["training"], facts["held_out"]
    architecture = training["architecture"]
    histogram = "\n".join(
        f"| {rates} | {count} |" for rates, count in held_out["firing_rate_histogram"].items()
    )
    files = "".join(f"- `{name}` {digest}\n" for name, digest in facts.get("data", {}).items())
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return f"""\
# {NAMES[architecture]} SAE of {card.model_name} at {card.hook_point}

{config.d_sae:,} latents on {config.d_in} dimensions, {STORED[architecture]} (SAELens 6).

| on {held_out["n_tokens"]:,} held-out tokens, float32 | |
|---|---|
| FVU, all dimensions together | {held_out["fvu"]:.4f} |
| FVU, median over dimensions | {held_out["fvu_median_dimension"]:.4f} |
| L0 (target {training["l0_target"]:g}) | {held_out["l0"]:.2f} |
| latents that fired on none of them | {held_out["dead_share"]:.2%} |
| latents silent on the last {training["dead_after_tokens"]:,} tokens of training \
| {training["dead_share"]:.2%} |
{_loss_rows(facts["loss_recovered"])}
A few dimensions can hold most of the variance and be easy: the median is what they cannot hide.
{_why_no_loss(facts["loss_recovered"])}
| firing rate | latents |
|---|---|
{histogram}

## Training
{training["tokens_seen"]:,} tokens of {training["contexts_seen"]:,} contexts of at most
{training["context_tokens"]} tokens, each begun with BOS (where the tokenizer has one); the first
position is not trained on. {training["seconds"]:,.0f} s on {training["device"]}, seed
{training["seed"]}, products in {training["dtype"]}. Every setting is in `cfg.json` under
`metadata.training`.

Model sha256 {facts["model_digest"]}; tokens sha256 {training["data_digest"]}.
{files}
{versions}.
"""


def _loss_rows(loss: dict[str, Any] | str) -> str:
    if isinstance(loss, str):
        return ""
    return (
        f"| next-token loss of the model, nats ({loss['n_tokens']:,} tokens) "
        f"| {loss['loss']:.4f} |\n"
        f"| with the reconstruction spliced in | {loss['spliced_loss']:.4f} |\n"
        f"| with zeros in its place | {loss['zero_loss']:.4f} |\n"
        f"| loss recovered | {loss['recovered']:.2%} |\n"
    )


def _why_no_loss(loss: dict[str, Any] | str) -> str:
    return f"\nLoss recovered was not measured: {loss}.\n" if isinstance(loss, str) else ""
