"""torchvision is stood in for while a model's module is imported, and only then."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.engine


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_names_are_there_while_it_is_stood_in_for_and_can_do_nothing() -> None:
    from metier.runtime.plugin.without_torchvision import stood_in

    with stood_in():
        functional = import_module("torchvision.transforms.v2").functional
        assert isinstance(functional.InterpolationMode.BICUBIC, type)

        class Resize(import_module("torchvision.transforms").Resize):  # type: ignore[misc]
            pass

        with pytest.raises(ImportError, match="part of torchvision, which is not installed"):
            functional.resize(None)
        with pytest.raises(ImportError, match="Resize is part of torchvision"):
            Resize()
    assert find_spec("torchvision") is None and not [n for n in sys.modules if n.startswith("torchvision")]
    with pytest.raises(ModuleNotFoundError):
        import_module("torchvision.transforms.v2")
