"""From texts to a bundle: activations, the SAE, its clusters, their heads, their fusion.

corpus             files of JSON lines -> texts in a reproducible mixture
activations        texts -> contexts -> activations at several hook points
activation_buffer  activations of many documents -> batches in random order
sae_train_config   every setting of a training run
input_transform    raw activations -> the space that SAEs learn in
gates              BatchTopK, TopK, JumpReLU, ReLU while they are trained
latent_entries     products over the active latents only
sae_learner        an SAE while it learns: one optimiser step
sae_checkpoint     a run on disk, to be taken up with the same bits
sae_trainer        the loop: SAEs at several hook points, of several widths, from one forward pass
pace               what a token takes -> how long a run will
sae_report         an SAE and held-out activations -> FVU, L0, dead share, firing rates
loss_recovered     what the whole model loses with the reconstruction spliced in
train_saes, sae_card   all of it, from a model folder to SAELens folders and their cards
examples           labelled texts -> their residual streams, kept on disk
token_features     residuals -> text means, latent acts, token logits, text scores
discovery          labelled latent acts -> candidate latents of each cluster, labels
linear_heads       means of texts -> logistic regressions, many at once
dense_heads        dense heads, SAE heads, and their fusion on folds of whole data sets
recipe             the choices behind the default bundle
build_heads, build  the stages in order, resumable, to a bundle folder
probes, card, bundle_files   what lies in the folder beside the numbers
"""
