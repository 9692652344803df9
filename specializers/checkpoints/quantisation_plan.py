"""Which layer gets how many bits: the two schemes, patterns of layer names, and what the engine's kernels want."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...agents.errors import RecipeError

__all__ = ["FUSED_LAYERS", "LAYER_NAMES", "Scheme", "check_fused", "check_plan", "choose_schemes", "fused_with"]

LAYER_NAMES = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("qkv_proj", "gate_up_proj"),  # where a family stores fused matrices
)
# vLLM computes each of these as one matrix, so their members share a scheme.
FUSED_LAYERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Not quantised whatever a recipe says: where head and embedding are tied they are one tensor.
HEADS = ("lm_head", "model.embed_tokens")
# What the int4 kernel wants of both sizes of a (fused) matrix.
INT4_MULTIPLE = 32


@dataclass(frozen=True)
class Scheme:
    """How a layer is stored and computed: W8A8 (8 bits, activations too) or W4A16 in groups of inputs."""

    bits: int
    group_size: int | None = None

    @property
    def name(self) -> str:
        """`w8a8`, or `w4a16` with its group size."""
        return "w8a8" if self.bits == 8 else f"w4a16-g{self.group_size}"

    @property
    def format(self) -> str:
        """Name of the layout, as compressed-tensors calls it."""
        return "int-quantized" if self.bits == 8 else "pack-quantized"

    def config(self, targets: list[str]) -> dict[str, Any]:
        """The scheme as a config group for `targets`."""
        weights: dict[str, Any] = {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False}
        activations = None
        if self.bits == 8:
            weights["strategy"] = "channel"
            activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        else:
            weights |= {"strategy": "group", "group_size": self.group_size}
        return {
            "targets": targets,
            "weights": weights,
            "input_activations": activations,
            "output_activations": None,
            "format": self.format,
        }


def choose_schemes(
    layers: Iterable[str], default: Scheme | None, overrides: Mapping[str, Scheme | None]
) -> dict[str, Scheme]:
    """Layer → scheme; None leaves a layer as it is. The last pattern (as in a shell, `*.o_proj`) that matches wins.

    Raises: RecipeError for a pattern that matches nothing.
    """
    names = list(layers)
    for pattern in overrides:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            head = any(fnmatch.fnmatchcase(name, pattern) for name in HEADS)
            raise RecipeError(
                f"pattern {pattern!r} matches no layer that can be quantised",
                expected=f"layers such as {names[0]}",
                remedy="The output head, which often is the embedding itself, stays as it is: leave the pattern out."
                if head
                else "Correct the pattern; `*` stands for anything.",
            )
    plan: dict[str, Scheme] = {}
    for name in names:
        scheme = default
        for pattern, other in overrides.items():
            if fnmatch.fnmatchcase(name, pattern):
                scheme = other
        if scheme is not None:
            plan[name] = scheme
    return plan


def fused_with(layer: str, layers: Iterable[str]) -> list[str]:
    """The layers that the engine computes as one matrix with this one, itself included, in their order."""
    block, _, member = layer.rpartition(".")
    members = next((names for names in FUSED_LAYERS if member in names), (member,))
    return [name for name in (f"{block}.{other}" for other in members) if name == layer or name in layers]


def check_fused(plan: Mapping[str, Scheme], layers: Collection[str]) -> None:
    """Check that the members of a fused matrix have one scheme; raises RecipeError that names two that differ."""
    for name in layers:
        fused = fused_with(name, layers)
        for other in fused:
            if plan.get(other) != plan.get(name):
                members = ", ".join(member.rpartition(".")[2] for member in fused)
                raise RecipeError(
                    f"{name} has scheme {_shown(plan.get(name))} and {other.rpartition('.')[2]} has "
                    f"{_shown(plan.get(other))}",
                    expected=f"one scheme for {members}, which the engine computes as one matrix",
                    remedy="Name all of them in the pattern.",
                )


def check_plan(plan: Mapping[str, Scheme], layers: Mapping[str, tuple[int, ...]]) -> None:
    """Check what the kernels want: one scheme over the members of a fused matrix, sizes and groups that divide.

    Raises: RecipeError that names the layer.
    """
    if not plan:
        raise RecipeError("no layer is left to quantise", expected="at least one", remedy="Ignore less.")
    check_fused(plan, layers)
    for name, (_, inputs) in layers.items():
        scheme, fused = plan.get(name), fused_with(name, layers)
        if scheme is None or scheme.bits == 8:
            continue
        if scheme.group_size is None or inputs % scheme.group_size:
            raise RecipeError(
                f"group_size {scheme.group_size} does not divide the {inputs} inputs of {name}",
                expected=f"a divisor, such as {_divisors(inputs)}",
                remedy="Change group_size, or leave the layer out with `ignore`.",
            )
        width = sum(layers[member][0] for member in fused)
        for size, what in ((inputs, "inputs"), (width, "outputs")):
            if size % INT4_MULTIPLE:
                raise RecipeError(
                    f"{name} has {size} {what}{' with its fused neighbours' if len(fused) > 1 else ''}",
                    expected=f"a multiple of {INT4_MULTIPLE} for 4 bits",
                    remedy="Use w8a8, or leave the layer out with `ignore`.",
                )


def _shown(scheme: Scheme | None) -> str:
    return "none" if scheme is None else scheme.name


def _divisors(inputs: int) -> str:
    return ", ".join(str(size) for size in (32, 64, 128) if inputs % size == 0) or "none of 32, 64, 128"
