"""Write the tables of docs/adapters.md from the forms that tests make: python scripts/write_adapters_page.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.specializers.adapters.adapter_forms import WHY, Form, kind_forms, lora_forms  # noqa: E402

PAGE = ROOT / "docs" / "adapters.md"
_TABLES = re.compile(r"(?<=<!-- forms -->\n).*(?=<!-- end of forms -->)", re.S)


def adapters_page() -> str:
    """The whole page, with its tables as they should be."""
    parts = ["## Forms of LoRA", _table(lora_forms()), "## Other kinds", _table(kind_forms())]
    text = "\n" + "\n\n".join(parts) + "\n\n"
    return _TABLES.sub(lambda _: text, PAGE.read_text(encoding="utf-8"))


def _table(forms: list[Form]) -> str:
    rows = [f"| {form.name} | {form.outcome} | {WHY.get(form.name, '')} |" for form in forms]
    return "\n".join(["| form | outcome | why, or where |", "|---|---|---|", *rows])


if __name__ == "__main__":
    PAGE.write_text(adapters_page(), encoding="utf-8")
