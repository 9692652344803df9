"""What all sides of the comparison are started with: one base, three random adapters of rank 16, the same sizes."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflow import INSTRUCTIONS, model_of

from metier.router import Assignment, RoleAssignment
from metier.runtime import Settings, load_settings
from metier.specializers.shelf.base_model import find_base
from metier.specializers.shelf.shelf import Shelf

BENCHMARKS = Path(__file__).parents[1]
RANK = 16
NEVER_WRITTEN = {"eos_token": "<repo_name>", "eos_token_id": 3}
"""A word of SmolLM2's vocabulary that its chats do not use, in place of the one that ends an answer."""


@dataclass(frozen=True)
class Parts:
    """Where the base and each role's adapter are, and the assignment that names them."""

    base: Path
    adapters: dict[str, Path]
    assignment: Assignment


def settings_of(folder: Path) -> Settings:
    """An engine's sizes; the stock server gets the same (`servers.py`)."""
    return load_settings(None, overrides_of(folder))


def overrides_of(folder: Path) -> dict[str, Any]:
    """The settings that differ from the defaults."""
    return {"shelf": str(folder / "shelf"), "engine.adapter_slots": len(INSTRUCTIONS), "engine.slot_rank": RANK}


def make_parts(folder: Path, base: str) -> None:
    """Write the base that never ends an answer, the adapters, and the assignment's file; once per folder.

    A server of ours knows no `ignore_eos`, and not every client sends it; this way all sides write every token.
    """
    from random_adapters import shelve_random_adapters

    if (folder / "assignment.yaml").exists():
        return
    source, copied = find_base(base), folder / "base"
    copied.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        target = copied / path.name
        target.unlink(missing_ok=True)
        if path.name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            kept = json.loads(path.read_text(encoding="utf-8"))
            changed = {name: value for name, value in NEVER_WRITTEN.items() if name in kept}
            target.write_text(json.dumps(kept | changed), encoding="utf-8")
        else:
            target.symlink_to(path.resolve())
    shelve_random_adapters(folder, copied, list(INSTRUCTIONS), rank=RANK)
    roles = "".join(f"  {role}: {{variant: {model_of(role)}}}\n" for role in INSTRUCTIONS)
    (folder / "assignment.yaml").write_text(f"roles:\n{roles}", encoding="utf-8")


def load_parts(folder: Path) -> Parts:
    """What `make_parts` has written."""
    shelf = Shelf(folder / "shelf")
    adapters = {role: shelf.path(model_of(role)) / "adapter" for role in INSTRUCTIONS}
    assigned = {role: RoleAssignment(variant=model_of(role)) for role in INSTRUCTIONS}
    return Parts(folder / "base", adapters, Assignment(roles=assigned))


sys.path.insert(0, str(BENCHMARKS))
