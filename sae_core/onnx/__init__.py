"""The ONNX Runtime backend: model, encoders and heads as one graph, and what runs it.

attention  attention over ragged segments in standard ONNX operators
encoders   SAE encoders as tracing can follow them
manifest   what a graph was made of, and its layout
export     a scorer -> a folder with the graph
session    a folder -> a session that runs it
scorer     the graph behind the interface of `LanguageModel` and `Scorer`
quantize   int8 weights for the model's matrices
"""
