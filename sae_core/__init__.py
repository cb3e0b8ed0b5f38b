"""The numbers of sae-monitor: tensors in, tensors out, no knowledge of any service.

    errors                what this package raises, as one tree
    activation_functions  relu, jumprelu, topk, batchtopk as pure functions
    hook_points           names such as blocks.8.hook_resid_post and the module each one means
    elementary            exp, sigmoid and tanh with the same bits wherever a number lies
    sae_config, sae_weights, stored   an SAE's formula, its numbers, and where they lie
    exact_product         matrix products with the same bits in whatever company
    columns, encoder      some latents, or all, of an SAE: pre-activations and gates
    ranking, leaders      TopK: which registered latents are among a token's k first
    kernels               Triton kernels that nothing uses until they are shown faster
    sae                   SAE: encode, encode only some latents, decode
    formats/              one file per checkpoint format on disk, each path -> SAE
    language_model/       loads the LLM up to the layer needed, packed forward, tokenizer, GGUF
    heads                 clusters of latents and dense heads: resid, latent_acts -> token logits
    aggregation           token logits -> running evidence per stream
    activation_source     our own forward pass, or activations that somebody gives
    scorer                LM + SAEs + heads as one step
    training/             activations -> SAE; labelled text -> heads, clusters, thresholds
    testing/              tiny language models, SAEs and bundles built in code

Import from the module that has the thing: `from sae_core.sae import SAE`.
"""
