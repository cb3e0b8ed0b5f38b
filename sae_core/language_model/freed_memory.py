"""Memory that was freed, given back to the operating system.

glibc keeps what was freed between two pieces that are still in use. After a tokenizer of 262,144
pieces was read these were 190 MB (benchmarks/LOG.md, 2026-11-24). Other allocators are left alone.
"""

from __future__ import annotations

import ctypes


def give_back_freed_memory() -> None:
    """Takes some milliseconds; call it after loading, not at work."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
