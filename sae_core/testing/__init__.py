"""Tiny real things built in code, for tests, benchmarks and demos: no download, no GPU.

Two rooms:

    models   a random Hugging Face model folder of each supported family, with a real tokenizer
    planted  SAEs and clusters that fire on chosen words, and only there
"""
