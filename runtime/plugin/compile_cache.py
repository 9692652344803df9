"""Letting vLLM reload a model it compiled before, on the CPU.

vLLM 0.32 keeps the compiled model on disk and loads it at the next start, which takes seconds instead of a minute.
On the CPU the load always fails: it calls `finalize_loading`, which only the objects of the GPU's piecewise backend
have, and the model is compiled again. A function that needs no finalising gets one that does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from vllm.compilation import decorators

__all__ = ["install"]


def _finalizable(load: Callable[..., Any]) -> Callable[..., Any]:
    def load_compiled_function(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        compiled = loaded._artifacts.compiled_fn
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = lambda vllm_config: None
        return loaded

    return load_compiled_function


def _patched_load(original: Callable[..., Any]) -> Callable[..., Any]:
    def _try_load_aot_compiled_fn(model: Any, aot_compilation_path: str) -> Any:
        with patch.object(
            torch.compiler, "load_compiled_function", _finalizable(torch.compiler.load_compiled_function)
        ):
            return original(model, aot_compilation_path)

    return _try_load_aot_compiled_fn


def install() -> str:
    """Wrap vLLM's loader of compiled models; returns "active"."""
    decorators._try_load_aot_compiled_fn = _patched_load(decorators._try_load_aot_compiled_fn)
    return "active"
