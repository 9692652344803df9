"""docs/models.md says what is: every cell is made anew and compared with the page (`make models`)."""

from __future__ import annotations

import pytest

from scripts.write_models_page import in_own_process, read_page
from tests.models.cells import CAPABILITIES, RIGHT
from tests.tiny_families import FAMILIES


@pytest.mark.models
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_the_page(family: str) -> None:
    assert in_own_process(family) == read_page()[family]


def test_the_page_has_a_row_for_every_family_and_a_reason_for_every_refusal() -> None:
    page = read_page()
    assert list(page) == list(FAMILIES)
    for cells in page.values():
        assert list(cells) == list(CAPABILITIES)
        assert all(text == RIGHT or len(text) > 20 for text in cells.values())
    assert sum(text == RIGHT for cells in page.values() for text in cells.values()) > 100
