"""What makes training on a CPU fast, and what gives memory back, without changing what is learned.

torch is imported inside the functions, so that settings and recipes load without it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

__all__ = [
    "give_back_freed_memory",
    "hold_frozen_weights_in_bfloat16",
    "kept_pages",
]

# glibc's mallopt: numbers of its parameters, and values in bytes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _MAPPED_FROM_BYTES, _USUAL_TRIM_BYTES = 2**31 - 1, 32 << 20, 64 << 20


def hold_frozen_weights_in_bfloat16(model: Any) -> None:
    """Hold the matrices of `model`'s linear layers, but for the output head, in bfloat16; for models that stay frozen.

    Autocast rounds them at every use anyway: the same products, without the rounding and in half the memory.
    """
    import torch

    head = model.get_output_embeddings()  # often the embedding's own matrix, whose rows are read in float32
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            module.weight = torch.nn.Parameter(module.weight.detach().to(torch.bfloat16), requires_grad=False)


@contextlib.contextmanager
def kept_pages() -> Iterator[None]:
    """Within, memory that a step frees stays with the process for the next (glibc; elsewhere nothing changes).

    glibc otherwise gives a step's activations back to the system when they are freed, and the next step pays for
    every page again.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)
    libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
    try:
        yield
    finally:
        libc.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM_BYTES)


def give_back_freed_memory() -> None:
    """Hand pages that were freed back to the system, where the C library can (glibc).

    A training step leaves the heap in pieces, most of them free, and glibc keeps them: on the 135M base two thirds of
    what the process holds after training, on top of which a merge would need its own.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
