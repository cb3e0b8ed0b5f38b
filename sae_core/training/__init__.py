"""From texts to a bundle: activations, the SAE, its clusters, their heads, their fusion.

corpus          a folder of JSON lines -> texts in a reproducible mixture
activations     texts -> contexts -> residual activations, shuffled
batch_topk      the SAE while it learns: one optimiser step
sae_trainer     activations -> a BatchTopK SAE in a SAELens folder, with checkpoints
sae_report      an SAE and held-out activations -> FVU, L0, dead share, firing rates
examples        labelled texts -> their residual streams, kept on disk
token_features  residuals -> rolling means, latent acts, token logits, text scores
discovery       labelled latent acts -> candidate latents of each cluster, labels
pooled_heads    features -> linear heads trained for the deployed aggregation
dense_heads     dense heads, SAE heads, and their fusion on folds of whole data sets
recipe          the choices behind the default bundle
build           the stages in order, resumable, to a bundle folder
probes, card, bundle_files   what lies in the folder beside the numbers
"""
