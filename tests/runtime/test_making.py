"""What `metier make` opens to measure what it makes."""

from __future__ import annotations

import pytest

from metier.runtime.engine_settings import EngineSettings
from metier.runtime.making import with_room_for
from metier.specializers import Variant
from metier.specializers.variant import AskSpec


@pytest.mark.parametrize(
    ("ranks", "asked", "given"), [([], 16, 16), ([8, 24], 16, 32), ([8], 16, 16), ([600], 16, 512)]
)
def test_engines_that_measure_a_recipe_have_slots_for_its_variants(ranks: list[int], asked: int, given: int) -> None:
    variants = [Variant.model_construct(ask=AskSpec(adapter="lora", rank=rank)) for rank in ranks]
    assert with_room_for(variants, EngineSettings(slot_rank=asked)).slot_rank == given  # type: ignore[arg-type]
