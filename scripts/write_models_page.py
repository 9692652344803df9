"""Write the table of docs/models.md from what is made and served here: python scripts/write_models_page.py [FAMILY …].

About half an hour, or a minute or so for each family that is named; the rows of others stay. Each family has a process
of its own.
"""

from __future__ import annotations

import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # for tests.*

from tests.models.cells import CAPABILITIES, RIGHT, cells_of  # noqa: E402
from tests.tiny_families import FAMILIES  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- begin: written by scripts/write_models_page.py -->", "<!-- end -->"

Table = dict[str, dict[str, str]]


def in_own_process(family: str) -> dict[str, str]:
    """A family's cells; vLLM keeps some of a process's first engine for later ones, so each has its own."""
    with tempfile.TemporaryDirectory() as work, ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(cells_of, family, Path(work)).result()


def written(table: Table) -> str:
    """The table in Markdown, the reasons below it."""
    reasons: list[str] = []

    def cell(text: str) -> str:
        if text == RIGHT:
            return RIGHT
        if text not in reasons:
            reasons.append(text)
        return f"no ({reasons.index(text) + 1})"

    head = f"| family | {' | '.join(CAPABILITIES)} |\n|---|{'---|' * len(CAPABILITIES)}"
    rows = [
        f"| `{family}` | {' | '.join(cell(cells[name]) for name in CAPABILITIES)} |" for family, cells in table.items()
    ]
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([head, *rows, "", *notes])


def read_page() -> Table:
    """What the page says now."""
    block = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()
    lines = block.splitlines()
    notes = dict(line.split(". ", 1) for line in lines if line[:1].isdigit())
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    reason = {f"no ({number})": text for number, text in notes.items()}
    return {
        row[0].strip("`"): {name: reason.get(text, text) for name, text in zip(CAPABILITIES, row[1:], strict=True)}
        for row in rows
    }


def main(chosen: list[str]) -> None:
    """Make the cells of the chosen families, or of all, and write the page."""
    unknown = sorted(set(chosen) - set(FAMILIES))
    if unknown:
        sys.exit(f"no family {unknown[0]!r}; expected some of {', '.join(FAMILIES)}")
    made, families = read_page(), chosen or list(FAMILIES)
    began_s = time.monotonic()
    for number, family in enumerate(families, 1):
        made[family] = in_own_process(family)
        left_s = (time.monotonic() - began_s) / number * (len(families) - number)
        print(f"{number} of {len(families)}: {family}, about {left_s / 60:.0f} min left", file=sys.stderr)
    table = {family: made[family] for family in FAMILIES if family in made}
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{written(table)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
