"""Draw a Markdown report as SVG, as a terminal shows it: python scripts/report_picture.py REPORT.md OUT.svg."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

COLUMNS = 112


def main(report: Path, out: Path) -> None:
    """Draw the tables of a report, up to its workflow picture."""
    text = report.read_text(encoding="utf-8").partition("\n## Workflow")[0]
    with open("/dev/null", "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        console.print(Markdown(text))
        out.write_text(console.export_svg(title="metier demo"), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
