"""Mixtures of experts: which of a checkpoint's layers are experts or choose among them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from .tensor_files import TensorInfo

__all__ = ["adaptable_names", "first_in_mixture", "mixtures"]

_EXPERTS = re.compile(r"(?P<mixture>.+)\.experts\.")


def mixtures(names: Iterable[str]) -> frozenset[str]:
    """Prefixes of a checkpoint's mixtures, such as `model.layers.0.mlp`; empty for a model without experts."""
    found = (_EXPERTS.match(name) for name in names)
    return frozenset(match["mixture"] for match in found if match)


def first_in_mixture(names: Iterable[str], layers: Iterable[str]) -> str | None:
    """The first of `names` that is an expert or the router beside them, None where none is.

    `layers` are the names in the base's checkpoint. An adapter names a router as transformers does (`mlp.gate`), also
    where the checkpoint has an older name for its block (`block_sparse_moe`).
    """
    found = mixtures(layers)
    routers = {f"{mixture.rpartition('.')[0]}.mlp.gate" for mixture in found}
    inside = tuple(f"{mixture}." for mixture in found)
    return next((name for name in names if ".experts." in name or name in routers or name.startswith(inside)), None)


def adaptable_names(layers: Mapping[str, TensorInfo]) -> list[str] | None:
    """Last names of the layers that adapters may change in a model with experts, None for one without any.

    Engines on CPU have no kernel for adapters of experts, and would fail at the first ask for having room for them.
    """
    found = mixtures(layers)
    if not found:
        return None
    names = (name.removesuffix(".weight") for name, info in layers.items() if len(info.shape) == 2)
    inside = tuple(f"{mixture}." for mixture in found)
    return sorted({name.rpartition(".")[2] for name in names if not name.startswith(inside)})
