"""Tiny real things built in code, for tests, benchmarks and demos: no download, no GPU.

Rooms:

    models     a random Hugging Face model folder of each supported family, with a real tokenizer
    planted    SAEs and clusters that fire on chosen words, and only there
    oracle     the plain, whole Hugging Face model in float64
    attention  what a GPU's attention kernel does, written out
"""
