"""Energy of the whole machine from its own counters (RAPL, through Linux's powercap), where it lets us read them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Energy", "EnergyMeter"]

POWERCAP = Path("/sys/class/powercap")
MICROJOULES = 1e-6


@dataclass(frozen=True)
class Energy:
    """What the machine drew over a span of time, in joules; `zones` names the counters it is the sum of."""

    seconds: float
    joules: float
    zones: tuple[str, ...]


@dataclass(frozen=True)
class _Reading:
    microjoules: int
    wraps_at: int


class EnergyMeter:
    """Reads the energy counters of processor packages and memory; one that is gone or may not be read counts nothing.

    The counters know of no process: whatever else ran on the machine is in the sum. They wrap around after some
    minutes at full load, and are seen to do so once between two readings, so a longer span is an underestimate
    unless `take` is called meanwhile; current kernels extend them to 64 bits. `folder` is where powercap is.
    """

    def __init__(self, folder: Path = POWERCAP) -> None:
        self._folder = folder
        self._last: dict[str, _Reading] = {}
        self._last_s = 0.0

    def start(self) -> None:
        """Begin a span; one that was begun is begun anew."""
        self._last, self._last_s = self._read(), time.monotonic()

    def take(self) -> Energy | None:
        """What was drawn since the span began, and begin the next; None where the machine does not say."""
        before, before_s = self._last, self._last_s
        self.start()
        zones = sorted(before.keys() & self._last.keys())
        if not zones:
            return None
        drawn = sum(_difference(before[zone], self._last[zone]) for zone in zones)
        return Energy(self._last_s - before_s, drawn * MICROJOULES, tuple(zones))

    def _read(self) -> dict[str, _Reading]:
        readings = {}
        for zone in sorted(self._folder.glob("intel-rapl:*")):
            try:
                name = (zone / "name").read_text().strip()
                # Cores are part of their package, and `psys` of everything: counting them would count twice.
                if not name.startswith(("package", "dram")):
                    continue
                drawn = int((zone / "energy_uj").read_text())
                wraps_at = int((zone / "max_energy_range_uj").read_text())
            except (OSError, ValueError):
                continue  # readable by root only, or not there
            readings[f"{zone.name} {name}"] = _Reading(drawn, wraps_at)
        return readings


def _difference(before: _Reading, after: _Reading) -> int:
    drawn = after.microjoules - before.microjoules
    return drawn if drawn >= 0 else drawn + before.wraps_at
