"""What a probe and an assignment left in a folder, as a report shows it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from ...agents.errors import ProfileError
from ...agents.text_files import parse_json, read_bounded
from ...router.probing.profile import read_profiles
from .figures import FrontPoint
from .table import Table, count, number

__all__ = ["Probed", "read_probed"]


@dataclass(frozen=True)
class Probed:
    """What `metier probe` and `metier assign` left in a folder."""

    profiles: Table
    front: tuple[FrontPoint, ...] = ()
    measured: tuple[FrontPoint, ...] = ()


def read_probed(folder: Path) -> Probed:
    """Read a probe's folder; raises ProfileError for one that is none."""
    profiles = read_profiles(folder / "profiles.jsonl")
    rows = []
    for p in profiles:
        low, high = p.gain_interval
        measured_at = (str(p.part), str(p.candidate), count(p.n))
        quality = (f"{p.quality:.3f}", f"{p.gain:+.3f}", f"{low:+.2f} to {high:+.2f}")
        rows.append((*measured_at, *quality, number(p.cpu_s), number(p.seconds), number(p.tokens), p.dropped))
    heads = ("part", "variant", "tasks", "quality", "gain", "95 % interval", "CPU-s", "s", "tokens", "dropped")
    front, measured = _front(folder / "front.json")
    return Probed(Table(heads, tuple(rows), 2), front, measured)


def _front(path: Path) -> tuple[tuple[FrontPoint, ...], tuple[FrontPoint, ...]]:
    """The front `metier assign` predicted and what it measured; nothing where it has not run."""
    if not path.exists():
        return (), ()
    try:
        data = parse_json(read_bounded(path))
        front = tuple(FrontPoint(point["cpu_s"], point["quality"]) for point in data["front"])
        lines = [(line["name"], line["measured"]) for line in data["table"] if line["measured"]]
        measured = tuple(
            FrontPoint(m["cpu_s"], m["quality"], name, (m["quality_interval"][0], m["quality_interval"][1]))
            for name, m in lines
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ProfileError(
            f"{path} cannot be read: {error!r}",
            expected="what `metier assign` writes",
            remedy=f"Run `metier assign --probe {shlex.quote(str(path.parent))}` again, or remove the file.",
        ) from error
    return front, measured
