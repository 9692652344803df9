"""What the processor at hand can do: tests that need more say so and are skipped."""

from __future__ import annotations

import pytest

from metier.specializers.machine.machine import processor_flags

__all__ = ["skip_without_int4_kernels", "skip_without_int8_kernels"]


def skip_without_int4_kernels() -> None:
    """Skip the test where vLLM has no kernel for four-bit weights: its library for AVX2 is built without one."""
    if "avx512f" not in processor_flags():
        pytest.skip("four-bit weights need AVX-512: vLLM has no kernel for them below it")


def skip_without_int8_kernels() -> None:
    """Skip the test where products of int8 are not exact.

    Without VNNI oneDNN adds pairs of products in 16 bits, which overflow: logits of W8A8 layers are off by a nat.
    """
    if not processor_flags() & {"avx512_vnni", "avx_vnni"}:
        pytest.skip("W8A8 layers need VNNI: without it oneDNN's int8 products saturate")
