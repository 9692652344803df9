"""A report as text that draws itself in a notebook."""

from __future__ import annotations

from html import escape
from typing import Self

from ...agents.errors import SettingsError
from .document import Document
from .page import render_page
from .plots import Plots

__all__ = ["ReportText"]

MOST_PAGE_CHARACTERS = 2_000_000
"""Characters of the page that a notebook gets; of a longer one it shows the text."""

MOST_TEXT_CHARACTERS = 200_000
"""Characters of the text that a notebook gets."""

HEIGHT_PX = 560


class ReportText(str):
    """A report as Markdown; as the last value of a notebook's cell the report's page, in a frame without rights."""

    document: Document | None

    def __new__(cls, text: str, document: Document | None = None) -> Self:
        made = super().__new__(cls, text)
        made.document = document
        return made

    def _repr_html_(self) -> str:
        page = "" if self.document is None else render_page(self.document, _plots())
        if not page or len(page) > MOST_PAGE_CHARACTERS:
            shown = str(self[:MOST_TEXT_CHARACTERS])
            return f"<pre>{escape(shown)}</pre>"
        return (
            f'<iframe sandbox title="metier report" style="width:100%;height:{HEIGHT_PX}px;border:0" '
            f'srcdoc="{escape(page)}"></iframe>'
        )


def _plots() -> Plots | None:
    try:
        return Plots()
    except SettingsError:  # without matplotlib the page has its tables and the workflow
        return None
