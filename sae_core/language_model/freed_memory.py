"""What glibc does with memory that was freed: give it back once, after loading; keep it at work.

glibc keeps what was freed between two pieces that are still in use. After a tokenizer of 262,144
pieces was read these were 190 MB (benchmarks/LOG.md, 2026-11-24). What was freed at the end of its
heap it gives back at once, from some megabytes on, and every forward pass on the CPU then takes its
tensors from the system anew, a page fault for each 4 KB: up to a fifth of the pass. Other
allocators are left alone.
"""

from __future__ import annotations

import ctypes

KEPT_BYTES = 256 << 20
"""At the end of each heap: several times the largest tensors of a step."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20
"""glibc takes no larger one; setting it ends glibc's own adjusting of both."""


def give_back_freed_memory() -> None:
    """Takes some milliseconds; call it after loading, not at work."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def keep_freed_memory() -> None:
    """From now on the process keeps up to `KEPT_BYTES` of what it frees, for what it takes next."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        set_option(_M_TRIM_THRESHOLD, KEPT_BYTES)
