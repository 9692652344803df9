"""transformers' model classes stay usable beside an engine in the same process.

For families without a class of its own vLLM 0.32 runs transformers' class, and changes that class in place: whoever
makes an object of it afterwards (training, quantising) fails for lack of a vLLM configuration. Here only vLLM's own
objects get what vLLM adds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.models.transformers import base

__all__ = ["install"]


def install() -> str:
    """Have what vLLM adds to transformers' classes leave other people's objects alone; returns "active"."""
    original = base.support_torch_compile

    def support_torch_compile(**options: Any) -> Callable[[Any], Any]:
        decorate: Callable[[Any], Any] = original(**options)

        def decorated(kind: Any) -> Any:
            if TorchCompileWithNoGuardsWrapper in kind.__bases__:
                return decorate(kind)  # it was before, and is now as below
            plain: Callable[..., None] = kind.__init__
            changed = decorate(kind)
            for_engines: Callable[..., None] = changed.__init__

            @functools.wraps(plain)
            def start(self: Any, *args: Any, **kwargs: Any) -> None:
                if get_current_vllm_config_or_none() is not None:
                    for_engines(self, *args, **kwargs)
                    return
                plain(self, *args, **kwargs)
                self.do_not_compile = True

            changed.__init__ = start
            return changed

        return decorated

    base.support_torch_compile = support_torch_compile
    return "active"
