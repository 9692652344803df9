"""Whether what a method made is kept: the role's quality, through a backend, against what the method started from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anyio

from ...agents.backend import Backend
from ...agents.content_hash import content_hash
from ...agents.errors import TrainingError
from ...agents.record_files import read_record
from ...agents.traffic import data_fingerprint
from ...agents.whole_files import write_whole
from ..methods.role_quality import RoleQuality, measure_role, paired_interval
from ..shelf.shelf import Shelf
from ..shelf.variant import Variant
from .recipe import Acceptance, Recipe, read_rows

__all__ = ["Judge", "OpenBackend", "Verdict"]

OpenBackend = Callable[[Shelf], AbstractAsyncContextManager[Backend]]
"""Opens a backend that serves the base and the variants of a shelf."""

Verdict = tuple[bool, dict[str, Any]]
"""Whether a candidate is kept, and what the card says of its quality."""


class Judge:
    """Measures candidates at a recipe's role, once each: what was measured before a kill is read from `work_dir`.

    `shelf` holds the candidates beside what they descend from. Raises: RecipeError when role, rows or score cannot be
    used; UnknownVariantError when `against` is on no shelf.
    """

    def __init__(
        self,
        recipe: Recipe,
        accept: Acceptance,
        *,
        shelf: Shelf,
        work_dir: Path,
        open_backend: OpenBackend,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        self._accept, self.shelf, self._open = accept, shelf, open_backend
        self._tell = on_note or (lambda note: None)
        self._rows = read_rows(recipe, accept.data)
        self._role, self._score = accept.load(recipe.folder, self._rows, f"recipe {recipe.name!r}: accept.")
        self._against = None if accept.against in (None, "base") else shelf.get(str(accept.against))
        settings = accept.model_dump(mode="json", exclude={"margin"})
        self._key = content_hash([settings, data_fingerprint(self._rows)])
        self._known = work_dir / "quality.json"

    def judge(self, candidate: Variant, started_from: Variant | None) -> Verdict:
        """Compare a candidate with the variant its method started from, None for the base, on the same rows.

        Raises: what the backend raises.
        """
        reference = self._against if self._accept.against is not None else started_from
        qualities = self._measured([reference, candidate])
        was, now = qualities
        difference, low, high = paired_interval(now.scores, was.scores)
        card = {
            "role": self._role.name,
            "asks": len(self._rows),
            "quality": round(now.mean, 4),
            "quality_before": round(was.mean, 4),
            "quality_change": [round(value, 4) for value in (difference, low, high)],
            "compared_with": "base" if reference is None else reference.name,
            "cpu_ms_per_ask": round(now.cpu_ms_per_ask, 2),
            "cpu_ms_per_ask_before": round(was.cpu_ms_per_ask, 2),
            "margin": self._accept.margin,
        }
        return difference >= -self._accept.margin, card

    def _measured(self, variants: Sequence[Variant | None]) -> list[RoleQuality]:
        known = self._known_before()
        missing = [v for v in dict.fromkeys(_id(v) for v in variants) if f"{self._key}/{v}" not in known]
        if missing:
            for variant, quality in anyio.run(self._measure, missing).items():
                known[f"{self._key}/{variant}"] = quality
                write_whole(self._known, json.dumps({name: asdict(one) for name, one in known.items()}))
        return [known[f"{self._key}/{_id(v)}"] for v in variants]

    def _known_before(self) -> dict[str, RoleQuality]:
        path = self._known
        if not path.exists():
            return {}
        return read_record(
            path,
            dict[str, RoleQuality],
            TrainingError,
            what="record of qualities",
            expected="what `metier make` measured",
            remedy=f"Remove {path}: it is then measured again.",
        )

    async def _measure(self, variants: Sequence[str]) -> dict[str, RoleQuality]:
        """One after the other, so that what each costs is its own."""
        measured = {}
        async with self._open(self.shelf) as backend:
            for name in variants:
                title = "the base" if name == "base" else self.shelf.get(name).name

                def say(done: int, title: str = title) -> None:
                    if done % max(1, len(self._rows) // 4) == 0:
                        self._tell(f"{self._role.name} on {title}: {done} of {len(self._rows)} asks answered")

                variant = None if name == "base" else name
                measured[name] = await measure_role(backend, self._role, self._rows, variant, self._score, on_reply=say)
        return measured


def _id(variant: Variant | None) -> str:
    return "base" if variant is None else variant.id
