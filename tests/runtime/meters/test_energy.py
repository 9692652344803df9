"""Energy from counters as Linux shows them, in a folder made for the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from metier.runtime.meters.energy import EnergyMeter


def zone(folder: Path, number: str, name: str, microjoules: int, wraps_at: int = 1_000_000) -> None:
    place = folder / f"intel-rapl:{number}"
    place.mkdir(parents=True, exist_ok=True)
    for file, value in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", wraps_at)):
        (place / file).write_text(f"{value}\n")


def test_packages_and_memory_add_up_and_cores_are_not_counted_twice(tmp_path: Path) -> None:
    for number, name in (("0", "package-0"), ("0:0", "core"), ("0:1", "dram"), ("1", "psys")):
        zone(tmp_path, number, name, 100_000)
    meter = EnergyMeter(tmp_path)
    meter.start()
    for number, name in (("0", "package-0"), ("0:0", "core"), ("0:1", "dram"), ("1", "psys")):
        zone(tmp_path, number, name, 400_000)
    energy = meter.take()
    assert energy is not None
    assert energy.joules == pytest.approx(0.6)
    assert energy.zones == ("intel-rapl:0 package-0", "intel-rapl:0:1 dram")
    again = meter.take()
    assert again is not None and again.joules == 0.0


def test_a_counter_that_wraps_around_counts_on(tmp_path: Path) -> None:
    zone(tmp_path, "0", "package-0", 900_000)
    meter = EnergyMeter(tmp_path)
    meter.start()
    zone(tmp_path, "0", "package-0", 100_000)
    energy = meter.take()
    assert energy is not None and energy.joules == pytest.approx(0.2)


def test_a_machine_without_counters_says_nothing(tmp_path: Path) -> None:
    meter = EnergyMeter(tmp_path / "none")
    meter.start()
    assert meter.take() is None
