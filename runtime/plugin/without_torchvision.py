"""Families whose module vLLM imports beside one that sees start without torchvision, which our install has none of.

vLLM 0.32 keeps the text-only Qwen3.5 in one module with the Qwen3.5 that takes pictures, and that imports torchvision
to name types and functions. There is no build of torchvision for the CPU build of torch on package registries. So
where torchvision is not installed, it is stood in for while a model's module is imported, and only then: whoever asks
for it afterwards is told that it is not there, and whatever would use it for a picture raises ImportError.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from vllm.model_executor.models import registry

__all__ = ["install", "stood_in"]

NAME = "torchvision"


class _Absent(type):
    """What the stand-in holds under any name: a class, so that it can be a base class and stand in annotations."""

    def __call__(cls, *_args: Any, **_options: Any) -> Any:
        raise ImportError(f"{cls.__name__} is part of {NAME}, which is not installed: no pictures or films")

    def __getattr__(cls, name: str) -> Any:
        return _absent(name)


def _absent(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Absent(name, (), {})


class _StandIn(ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return _absent(name)


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] == NAME else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def stood_in() -> Iterator[None]:
    """Within it `import torchvision`, and all below it, gives modules that have every name and can do nothing."""
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
            del sys.modules[name]


def install() -> str:
    """Stand in for torchvision while vLLM imports a model's module, where it is not installed; returns the status."""
    if find_spec(NAME) is not None:
        return "off (torchvision is installed)"
    original = registry._LazyRegisteredModel.load_model_cls

    def load_model_cls(self: Any) -> Any:
        with stood_in():
            return original(self)

    registry._LazyRegisteredModel.load_model_cls = load_model_cls
    return "active"
