"""Variants and adapters to and from a repository of Hugging Face's hub, checked whole before the shelf takes them.

Nothing is sent or fetched but by these two functions: to and from the hub that `HF_ENDPOINT` names unless they are
given another, for whoever `hf auth login` has logged in.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ...agents.errors import MetierError, VariantError
from ..shelf.shelf import MOST_RECORD_MIB, RECORD, Shelf, read_variant
from ..shelf.variant import Variant
from .adoption import adopt_adapter, new_staging

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["MOST_GIB", "pull_variant", "push_variant"]

MOST_GIB = 20.0
"""Most that is fetched of one repository unless told otherwise, in GiB."""

MOST_FILES = 1_000
"""Most files that are fetched of one repository."""

CONFIG = "adapter_config.json"

CAN_RUN = (".py", ".so", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Endings of files that are code, or from which reading makes objects of any kind."""


def push_variant(name: str, repo: str, *, shelf: Shelf, public: bool = False, endpoint: str | None = None) -> str:
    """Send a variant's record and files to a repository, made if it is not there, and return the commit's address.

    A new repository is private unless `public`. What lies in the variant's folder beside its record's files is not
    sent; files that the repository has besides stay there. `endpoint` is the address of another hub.
    Raises: UnknownVariantError, VariantError when the hub cannot be reached or refuses.
    """
    variant = shelf.get(name)
    with new_staging(shelf) as staging, _speaking_of(repo, "sent to", endpoint) as api:
        folder = shelf.export(variant, staging / "out")
        api.create_repo(repo, private=not public, exist_ok=True)
        sent = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=f"metier variant {variant.name} ({variant.id})"
        )
        return str(sent.commit_url)


def pull_variant(
    repo: str,
    *,
    name: str | None = None,
    shelf: Shelf,
    base: str | Path,
    revision: str | None = None,
    max_gib: float = MOST_GIB,
    endpoint: str | None = None,
    on_file: Callable[[str, int], None] = lambda _file, _size: None,
) -> Variant:
    """Fetch a variant, or an adapter in the peft layout, check it whole against `base`, and put it on the shelf.

    Of a variant its record and the files that the record names are fetched, of an adapter its configuration and its
    safetensors: nothing that could be run. `revision` is a branch, a tag or a commit. `name` is by default the
    variant's own, or the repository's. `on_file` is told of each file and its bytes before it is fetched.
    Raises: VariantError when the hub cannot be reached, the repository is too large or holds neither; otherwise what
    `adopt_adapter` raises.
    """
    with new_staging(shelf) as staging:
        folder = staging / "in"
        with _speaking_of(repo, "fetched from", endpoint) as api:
            commit = str(api.model_info(repo, revision=revision).sha)
            sizes = _sizes(api, repo, commit)

            def fetch(files: Iterable[str]) -> None:
                for file in files:
                    on_file(file, sizes[file])
                    api.hf_hub_download(repo, file, revision=commit, local_dir=folder)

            if RECORD in sizes:
                _check_room(repo, {RECORD: sizes[RECORD]}, MOST_RECORD_MIB / 1024)
                fetch([RECORD])
                variant = read_variant(folder)
                name = name or variant.name
                wanted = [_safe(repo, file) for file in variant.files]
            else:
                wanted = _adapter_files(repo, sizes)
            missing = sorted(set(wanted) - sizes.keys())
            if missing:
                raise VariantError(
                    f"repository {repo} lacks {missing[0]}, which its record names",
                    expected="every file of the record",
                    remedy="Push the variant again, whole.",
                )
            _check_room(repo, {file: sizes[file] for file in wanted}, max_gib)
            fetch(wanted)
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub's own notes on what it fetched
        return adopt_adapter(folder, name=name or repo.rpartition("/")[2].lower(), shelf=shelf, base=base)


def _sizes(api: HfApi, repo: str, commit: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for entry in api.list_repo_tree(repo, recursive=True, revision=commit):
        size: Any = getattr(entry, "size", None)
        if size is None:
            continue  # a folder
        sizes[entry.path] = int(size)
        if len(sizes) > MOST_FILES:
            raise VariantError(
                f"repository {repo} holds more than {MOST_FILES} files",
                expected="a variant's files, or an adapter's",
                remedy="Push what is wanted to a repository of its own.",
            )
    return sizes


def _adapter_files(repo: str, sizes: Mapping[str, int]) -> list[str]:
    weights = [file for file in sizes if "/" not in file and file.endswith((".safetensors", ".safetensors.index.json"))]
    if CONFIG not in sizes or not weights:
        raise VariantError(
            f"repository {repo} holds {', '.join(sorted(sizes)[:10]) or 'nothing'}",
            expected=f"a variant's {RECORD}, or {CONFIG} and weights in safetensors",
            remedy="Weights in other formats are not fetched: they can run code when they are read.",
        )
    return [CONFIG, *sorted(weights)]


def _safe(repo: str, file: str) -> str:
    path = PurePosixPath(file)
    outside = path.is_absolute() or ".." in path.parts or "\\" in file or path.parts[:1] == (".cache",)
    if outside or path.suffix in CAN_RUN:
        raise VariantError(
            f"the record of repository {repo} names the file {file!r}",
            expected="files below the variant's folder, none that can run code when it is read",
            remedy="Do not use this repository.",
        )
    return file


def _check_room(repo: str, sizes: Mapping[str, int], max_gib: float) -> None:
    total_gib = sum(sizes.values()) / 2**30
    if total_gib > max_gib:
        raise VariantError(
            f"{len(sizes)} files of repository {repo} are {total_gib:.2f} GiB",
            expected=f"at most {max_gib:g} GiB",
            remedy="Allow more with --max-gib.",
        )


@contextmanager
def _speaking_of(repo: str, what: str, endpoint: str | None) -> Iterator[HfApi]:
    """The hub, whose errors and the network's are told as ours."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise VariantError(
            "the hub needs huggingface_hub, which is not installed",
            expected="huggingface_hub",
            remedy="Run pip install huggingface_hub: it comes with the engine's extra.",
        ) from error
    try:
        yield HfApi(endpoint=endpoint)
    except MetierError:
        raise
    except Exception as error:  # of the hub's client, of the HTTP library that its version uses, of the system
        raise VariantError(
            f"nothing could be {what} repository {repo}: {str(error).strip().partition(chr(10))[0]}",
            expected="a repository OWNER/NAME of the hub that you may use",
            remedy="Check its name, the network, and `hf auth login`.",
        ) from error
