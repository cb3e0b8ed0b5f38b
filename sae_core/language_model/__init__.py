"""The language model: the only package that imports transformers.

loading    a model folder -> LanguageModel, only the layers and tensors that are needed
checkpoint tensors of a model folder by the module's names, fused where the module fuses them
model      LanguageModel: one packed step over many streams, activations at the hook points
families   a table: where each architecture keeps its parts
sites      a hook point -> the module that carries it
processing Hugging Face's activations -> those of a processed TransformerLens model
encoders   T5 and ViT: one plain forward pass, residual streams only
device_map one model's blocks on several devices of this process
tensor_parallel  which parts of a model each of several processes holds, by transformers' plan
ranks      those processes: one plans each step, all run it, and what happens when one dies
mirrored   a stream of the first process, and its like in the others
token_streams  the keys and values of one stream, in buffers that grow
packed     attention over a ragged batch, each stream against its own keys and values
span_attention  attention of one stream's last tokens: torch's fused kernel, or blocks by oneDNN
compiled_rows  RMS norms and the attention of single tokens on the CPU, as `compiled_loops` by numba
span_workers  threads for the attention of many single tokens
paged      the same over pages that streams share (`pages`), with the kernel of `varlen`
products   which library multiplies a model's matrices on the CPU, in which data type
tokenizer  text and conversations -> token ids with roles
text_tokens  the same of a text that grows, at the cost of what is new
freed_memory  what loading freed, given back to the operating system; what steps free, kept
gguf       a GGUF file -> a checked model folder in bfloat16
"""
