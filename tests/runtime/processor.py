"""What the processor at hand can do, asked the way vLLM asks it: tests that need more say so and are skipped."""

from __future__ import annotations

import pytest
import torch

__all__ = ["skip_without_int4_kernels"]


def skip_without_int4_kernels() -> None:
    """Skip the test where vLLM has no kernel for four-bit weights: its library for AVX2 is built without one."""
    if not torch.cpu._is_avx512_supported():
        pytest.skip("four-bit weights need AVX-512: vLLM has no kernel for them below it")
