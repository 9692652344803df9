"""Compiling a C++ source of ours into a torch operator library, once per machine, in metier's cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from ...agents.errors import PluginError
from ...agents.whole_files import whole_file
from ...specializers.shelf.base_model import cache_folder

__all__ = ["build_library", "library_path"]

BUILD_LIMIT_S = 300.0

# -march=native: the library never leaves the machine it was built on (the processor is part of its name).
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++20", "-fPIC", "-shared", "-fopenmp")


def build_library(source: Path) -> Path:
    """Return the compiled library of `source`, compiling it first where this machine has none yet.

    Two processes that start together compile once: the second waits for the first. The library gets its final name only
    when it is complete. Raises PluginError when there is no compiler or it refuses the source.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise PluginError(
            "no C++ compiler was found on PATH",
            expected="g++ or clang++, or the environment variable CXX",
            remedy="Install one (Debian, Ubuntu: the package g++).",
        )
    library = library_path(source)
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with library.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                _compile(compiler, source, library)
    except OSError as error:
        raise PluginError(
            f"the compiled operators cannot be written to {library.parent}: {error}",
            expected="a writable cache folder",
            remedy="Set METIER_CACHE to a folder you may write to.",
        ) from error
    return library


def library_path(source: Path) -> Path:
    """Where the library of `source` belongs, below `cache_folder()`.

    The name changes with the source, torch and the processor.
    """
    digest = hashlib.sha256()
    digest.update(source.read_bytes())
    digest.update(" ".join((*_FLAGS, torch.__version__, platform.machine(), _processor())).encode())
    return cache_folder() / "native" / f"{source.stem}-{digest.hexdigest()[:16]}.so"


def _compile(compiler: str, source: Path, library: Path) -> None:
    torch_root = Path(torch.__file__).parent
    with whole_file(library) as unfinished:
        command = [
            compiler,
            *_FLAGS,
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            f"-I{torch_root / 'include'}",
            f"-I{torch_root / 'include/torch/csrc/api/include'}",
            str(source),
            "-o",
            str(unfinished),
            f"-L{torch_root / 'lib'}",
            "-ltorch_cpu",
            "-lc10",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_LIMIT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise PluginError(
                f"compiling {source.name} took longer than {BUILD_LIMIT_S:.0f} s",
                remedy="Try again on a less busy machine.",
            ) from error
        if done.returncode != 0:
            raise PluginError(
                f"{compiler} refused {source.name} (exit code {done.returncode}): {done.stderr.strip()[-600:]}",
                expected="a compiler that knows C++20 and OpenMP",
                remedy="Use g++ 11 or later, or name another compiler with CXX.",
            )


def _processor() -> str:
    """What -march=native depends on: the instruction sets of this processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    except OSError:
        pass
    return platform.processor()
