"""The shelf: variants as content-addressed folders, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...agents.errors import UnknownVariantError, VariantError, did_you_mean
from ...agents.record_files import read_record
from ...agents.whole_files import whole_folder, write_whole
from .variant import Variant, content_id

__all__ = ["RECORD", "Shelf", "hash_file", "hash_files", "read_variant"]

RECORD = "variant.json"

MOST_RECORD_MIB = 16
"""Largest record read, in MiB."""


class Shelf:
    """Folders of variants, each holding `variant.json` and its `adapter/` or `weights/`.

    `folder` is where new variants go, one folder per content id; it is made when the first is added.
    `also` are read-only places: variant folders, or folders of them, such as those that ship with examples.
    A name may be used again: it then means the variant added last, and names on `folder` go before those in
    `also`; a content id always means the same variant.

    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     shelf = Shelf(Path(folder))
    ...     staging = Path(folder) / "staging"
    ...     (staging / "adapter").mkdir(parents=True)
    ...     record = {"base": "b", "prompt_layout": 1, "engine": {"base": "b"}, "ask": {"adapter": "lora", "rank": 8}}
    ...     made = shelf.add(staging, name="solver", record=record)
    ...     shelf.get("solver").id == made.id
    True
    """

    def __init__(self, folder: Path, *, also: Sequence[Path] = ()) -> None:
        self.folder = Path(folder)
        self.also = tuple(Path(path) for path in also)

    def add(self, staging: Path, *, name: str, record: dict[str, Any]) -> Variant:
        """Move a staged folder onto the shelf and return its variant; `staging` is used up.

        `record` gives the fields of Variant but `id`, `name` and `files`. The same content is kept once: adding
        it again only renames it and replaces its card.
        Raises: VariantError when the shelf cannot be written or the record is no variant.
        """
        content = {k: v for k, v in record.items() if k != "card"} | {"files": hash_files(staging)}
        whole = Variant(id="", name=name, **content).model_dump(mode="json")
        variant = Variant(**{**whole, "id": content_id(whole), "card": record.get("card", {})})
        _write_record(staging, variant)
        target = self.folder / variant.id
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if target.exists():
                _write_record(target, variant)
                os.utime(target)
                shutil.rmtree(staging)
                return variant
            with whole_folder(target) as landing:  # a move across file systems is a copy, which takes its time
                shutil.move(staging, landing)
                os.utime(landing)
        except OSError as error:
            raise VariantError(
                f"variant {name!r} cannot be put on the shelf {self.folder}: {error.strerror or error}",
                expected="a folder that can be written",
                remedy="Free space there, or choose another shelf.",
            ) from error
        return variant

    def list(self) -> list[Variant]:
        """All variants, those on the shelf itself first and the newest first.

        Unfinished folders are left out, and those whose record cannot be read: see `damaged`.
        """
        return [variant for variant, _ in self._found()]

    def damaged(self) -> Sequence[tuple[Path, VariantError]]:
        """Folders whose record cannot be read, each with what is wrong; the rest of the shelf is not affected."""
        return self._read()[1]

    def get(self, name_or_id: str) -> Variant:
        """Find a variant by name (the one added last) or content id.

        Raises: UnknownVariantError that lists what there is, and close names.
        """
        return self._find(name_or_id)[0]

    def path(self, variant: Variant | str) -> Path:
        """Folder of a variant; raises UnknownVariantError when it is not here."""
        return self._find(variant if isinstance(variant, str) else variant.id)[1]

    def verify(self, variant: Variant | str) -> None:
        """Hash every file of a variant against its record.

        Raises: VariantError that names the first file missing, changed or unexpected.
        """
        record, folder = self._find(variant if isinstance(variant, str) else variant.id)
        remedy = "Make the variant again from its recipe, or copy its folder again."
        found = hash_files(folder)
        for file, expected in record.files.items():
            if file not in found:
                raise VariantError(f"variant {record.name!r} lacks {file}", expected="the file", remedy=remedy)
            if found[file] != expected:
                raise VariantError(
                    f"variant {record.name!r}: {file} has SHA-256 {found[file]}", expected=expected, remedy=remedy
                )
        extra = sorted(set(found) - set(record.files))
        if extra:
            raise VariantError(
                f"variant {record.name!r} holds {extra[0]}", expected="only the files of its record", remedy=remedy
            )
        if content_id(record.model_dump(mode="json")) != record.id:
            raise VariantError(
                f"variant {record.name!r}: its record was changed by hand", expected=f"id {record.id}", remedy=remedy
            )

    def annotate(self, variant: Variant | str, card: dict[str, Any]) -> Variant:
        """Add measurements to a variant's card (its identity stays) and return the new record."""
        record, folder = self._find(variant if isinstance(variant, str) else variant.id)
        changed = record.model_copy(update={"card": {**record.card, **card}})
        added = folder.stat().st_mtime_ns
        _write_record(folder, changed)
        os.utime(folder, ns=(added, added))  # when it was added decides what its name means
        return changed

    def remove(self, variant: Variant | str) -> None:
        """Delete a variant from the shelf.

        Raises: UnknownVariantError, or VariantError for one that lies in a read-only place or whose weights another
        variant needs.
        """
        record, folder = self._find(variant if isinstance(variant, str) else variant.id)
        needing = sorted({v.name for v, _ in self._found() if v.engine.weights == record.id})
        if needing:
            raise VariantError(
                f"variant {record.name!r} holds the weights of {', '.join(needing)}",
                expected="one that no other needs",
                remedy="Remove those first.",
            )
        if folder.parent != self.folder:
            raise VariantError(f"variant {record.name!r} lies in {folder}", expected=f"one on the shelf {self.folder}")
        going = self.folder / f".{record.id}-{uuid.uuid4().hex[:8]}"
        folder.rename(going)
        shutil.rmtree(going)

    def export(
        self, variant: Variant | str, folder: Path, *, on_left_out: Callable[[str], None] = lambda _file: None
    ) -> Path:
        """Copy a variant's record and its files to `folder` (which must not exist), to ship it; whole or not at all.

        Only regular files of the record are copied: a link would ship what it points to. `on_left_out` is told of
        everything else that lies in the folder.
        Raises: VariantError when `folder` exists or cannot be written, or a file of the record is missing or a link.
        """
        record, source = self._find(variant if isinstance(variant, str) else variant.id)
        if folder.exists():
            raise VariantError(f"{folder} exists", expected="a new folder", remedy="Remove it, or choose another.")
        regular, others = _files_below(source)
        for file in (RECORD, *record.files):
            if file not in regular:
                raise VariantError(
                    f"variant {record.name!r}: {file} in {source} is missing or no regular file",
                    expected="the files of its record, none of them a link",
                    remedy="Make the variant again from its recipe, or copy its folder again.",
                )
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with whole_folder(folder) as part:
                for file in (RECORD, *record.files):
                    (part / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source / file, part / file, follow_symlinks=False)
        except OSError as error:
            raise VariantError(
                f"variant {record.name!r} cannot be written to {folder}: {error}",
                expected="a new folder on a disk with room",
                remedy="Free space there, or choose another.",
            ) from error
        for file in sorted({*regular, *others} - {RECORD, *record.files}):
            on_left_out(file)
        return folder

    def _find(self, name_or_id: str) -> tuple[Variant, Path]:
        found = self._found()
        for by in ("id", "name"):
            for variant, folder in found:
                if getattr(variant, by) == name_or_id:
                    return variant, folder
        for folder, error in self.damaged():
            if folder.name == name_or_id:
                raise error
        names = sorted({variant.name for variant, _ in found})
        raise UnknownVariantError(
            f"no variant {name_or_id!r} on the shelf {self.folder}",
            expected=f"one of {', '.join(names)}" if names else "a variant (the shelf is empty)",
            remedy=did_you_mean(
                name_or_id,
                names,
                "Make it with `metier make RECIPE.yaml`, or name the folder it lies in with `--shelf`.",
                most=3,
            ),
        )

    def _found(self) -> Sequence[tuple[Variant, Path]]:
        return self._read()[0]

    def _read(self) -> tuple[Sequence[tuple[Variant, Path]], Sequence[tuple[Path, VariantError]]]:
        """Variants with their folders, and folders whose record cannot be read with what is wrong."""
        own = _variant_folders(self.folder)
        own.sort(key=lambda folder: (-folder.stat().st_mtime_ns, folder.name))
        others = [folder for place in self.also for folder in _variant_folders(place)]
        read = [(folder, _read_or_error(folder)) for folder in [*own, *others]]
        good = [(found, folder) for folder, found in read if isinstance(found, Variant)]
        bad = [(folder, found) for folder, found in read if isinstance(found, VariantError)]
        return good, bad


def read_variant(folder: Path) -> Variant:
    """Read the record of a variant folder; raises VariantError when it is no record."""
    return read_record(
        folder / RECORD,
        Variant,
        VariantError,
        what="variant record",
        expected="a record that `metier make` wrote",
        remedy="Remove the folder, or copy it again.",
        most_mib=MOST_RECORD_MIB,
    )


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder but its record, by relative path."""
    digests: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != RECORD:
            digests[name] = hash_file(path)
    return digests


def hash_file(path: Path) -> str:
    """SHA-256 of a file, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_or_error(folder: Path) -> Variant | VariantError:
    try:
        return read_variant(folder)
    except VariantError as error:
        return error


def _variant_folders(place: Path) -> list[Path]:
    if os.path.lexists(place / RECORD):
        return [place]
    if not place.is_dir():
        return []
    try:
        return sorted(f for f in place.iterdir() if not f.name.startswith(".") and os.path.lexists(f / RECORD))
    except OSError as error:
        raise VariantError(
            f"the shelf {place} cannot be read: {error.strerror or error}", expected="a folder that can be read"
        ) from error


def _files_below(folder: Path) -> tuple[set[str], set[str]]:
    """Regular files below a folder by relative path, and what is neither a file nor a folder; no link is followed."""
    regular: set[str] = set()
    others: set[str] = set()
    for place, folders, files in os.walk(folder):
        for name in (*files, *folders):
            path = Path(place, name)
            mode = path.lstat().st_mode
            if not stat.S_ISDIR(mode):
                (regular if stat.S_ISREG(mode) else others).add(path.relative_to(folder).as_posix())
    return regular, others


def _write_record(folder: Path, variant: Variant) -> None:
    text = json.dumps(variant.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False)
    write_whole(folder / RECORD, text + "\n")
