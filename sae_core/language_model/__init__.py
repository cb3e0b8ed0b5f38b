"""The language model: the only package that imports transformers.

loading    a model folder -> LanguageModel, only the layers and tensors that are needed
model      LanguageModel: one packed step over many streams, resid at the hook points
packed     attention over a ragged batch, each stream against its own keys and values
tokenizer  text and conversations -> token ids with roles
gguf       a GGUF file -> a checked model folder in bfloat16
"""
