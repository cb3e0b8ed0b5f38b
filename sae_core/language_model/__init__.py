"""The language model: the only package that imports transformers.

loading    a model folder -> LanguageModel, only the layers and tensors that are needed
checkpoint tensors of a model folder by the module's names, fused where the module fuses them
model      LanguageModel: one packed step over many streams, activations at the hook points
families   a table: where each architecture keeps its parts
sites      a hook point -> the module that carries it
processing Hugging Face's activations -> those of a processed TransformerLens model
encoders   T5 and ViT: one plain forward pass, residual streams only
packed     attention over a ragged batch, each stream against its own keys and values
tokenizer  text and conversations -> token ids with roles
gguf       a GGUF file -> a checked model folder in bfloat16
"""
