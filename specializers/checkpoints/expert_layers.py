"""Mixtures of experts: which of a checkpoint's layers are experts or choose among them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .tensor_files import TensorInfo

__all__ = ["adaptable_names", "mixtures", "within_mixture"]

_EXPERTS = re.compile(r"(?P<mixture>.+)\.experts\.")


def mixtures(names: Iterable[str]) -> frozenset[str]:
    """Prefixes of a checkpoint's mixtures, such as `model.layers.0.mlp`; empty for a model without experts."""
    found = (_EXPERTS.match(name) for name in names)
    return frozenset(match["mixture"] for match in found if match)


def within_mixture(name: str, layers: Iterable[str]) -> bool:
    """Whether a layer is an expert, or the router beside them; `layers` are the names in the base's checkpoint.

    An adapter may name a mixture as transformers does (`mlp`) where the checkpoint has an older name for it
    (`block_sparse_moe`), so what belongs to the same block and is not attention counts too.
    """
    found = mixtures(layers)
    if any(name.startswith(f"{mixture}.") for mixture in found):
        return True
    return ".experts." in name or any(name == f"{mixture.rpartition('.')[0]}.mlp.gate" for mixture in found)


def adaptable_names(layers: Mapping[str, TensorInfo]) -> list[str] | None:
    """Last names of the layers that adapters may change in a model with experts, None for one without any.

    Engines on CPU have no kernel for adapters of experts, and would fail at the first ask for having room for them.
    """
    found = mixtures(layers)
    if not found:
        return None
    names = (name.removesuffix(".weight") for name, info in layers.items() if len(info.shape) == 2)
    outside = (name for name in names if not any(name.startswith(f"{mixture}.") for mixture in found))
    return sorted({name.rpartition(".")[2] for name in outside})
