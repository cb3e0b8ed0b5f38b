"""Tiny real things built in code, for tests, benchmarks and demos: no download, no GPU.

    models  a random Hugging Face model folder of each supported family, with a real tokenizer
"""
