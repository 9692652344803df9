"""Compiling our operators: once, in the cache folder that was chosen, with an error that says what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier.agents.errors import PluginError
from metier.runtime.plugin.fier.fier_cpu import KERNEL_SOURCE
from metier.runtime.plugin.native_build import build_library, library_path


def test_a_library_that_was_built_is_found_without_a_compiler_run(monkeypatch: pytest.MonkeyPatch) -> None:
    library = build_library(KERNEL_SOURCE)
    assert library == library_path(KERNEL_SOURCE)
    monkeypatch.setenv("CXX", "/bin/false")
    assert build_library(KERNEL_SOURCE) == library


def test_the_library_is_kept_in_the_chosen_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"  # writes what it is told to write, at once
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho built > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "users"))
    monkeypatch.setenv("METIER_CACHE", str(tmp_path / "chosen"))
    library = build_library(KERNEL_SOURCE)
    assert library.read_text() == "built\n"
    assert library.parent == tmp_path / "chosen" / "native"
    monkeypatch.delenv("METIER_CACHE")
    assert build_library(KERNEL_SOURCE).parent == tmp_path / "users" / "metier" / "native"


def test_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("METIER_CACHE", str(tmp_path))
    with pytest.raises(PluginError, match="no C\\+\\+ compiler"):
        build_library(KERNEL_SOURCE)
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(PluginError, match=r"refused fier_cpu_kernel\.cpp"):
        build_library(KERNEL_SOURCE)
    assert not list(library_path(KERNEL_SOURCE).parent.glob("*.part"))
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("METIER_CACHE", str(blocked))
    with pytest.raises(PluginError, match="cannot be written.*METIER_CACHE"):
        build_library(KERNEL_SOURCE)
