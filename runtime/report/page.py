"""The full report as one self-contained HTML page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from ...specializers.shelf.variant import Variant
from ..settings.report import ReportSettings
from ..store.store import RunStore
from .document import BatchSection, Document, read_document, role_costs
from .graph_picture import draw_workflow
from .plots import Plots, Series
from .reading import explained
from .slot_timeline import engine_timelines

__all__ = ["render_html", "render_page"]

HERE = Path(__file__).parent


def render_html(
    store: RunStore,
    batches: Sequence[str],
    probe: Path | None = None,
    curves: Sequence[Variant] = (),
    settings: ReportSettings | None = None,
) -> str:
    """One page with everything in it: no script, no font and no picture from elsewhere.

    `settings` say how many runs are shown in detail, folded, and whether with what was asked and answered.
    Raises: SettingsError without matplotlib; the others as `read_document`.
    """
    plots = Plots()
    return render_page(read_document(store, batches, probe, curves, settings or ReportSettings()), plots)


def render_page(document: Document, plots: Plots | None) -> str:
    """The page of a document, without the figures of matplotlib where `plots` is None."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    series = [Series(part.name, part.figures.completion_s, part.figures.bound_s) for part in document.parts]
    shown = [one for one in series if len(one.completion_s) > 1] if plots else []
    probed = document.probed
    return environment.get_template("page.html.j2").render(
        document=document,
        reading=explained(document.all_tables()),
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        dates=[_date(part) for part in document.parts],
        bounded=any(one.bound_s for one in shown),
        completion=Markup(plots.completion(shown)) if plots and shown else "",
        comparisons=[
            (found, table, Markup(plots.comparison(found)) if plots else "") for found, table in document.comparisons
        ],
        pictures=[_pictures(part, plots, number) for number, part in enumerate(document.parts)],
        front=Markup(plots.front(probed.front, probed.measured)) if plots and probed and probed.front else "",
        thought=[
            (one, Markup(plots.thinking(one.variant, one.points, one.curves)) if plots else "")
            for one in document.thought
        ],
    )


def _date(part: BatchSection) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(part.ledger.batch.created_at))


def _pictures(part: BatchSection, plots: Plots | None, number: int) -> dict[str, object]:
    costs = role_costs(part)
    timelines = [line for line in engine_timelines(part.ledger) if line.length_s > 0] if plots else []
    return {
        "workflow": Markup(draw_workflow(part.ledger, number)),
        "shares": Markup(plots.shares(costs)) if plots and costs else "",
        "timelines": [(line, Markup(plots.timeline(line))) for line in timelines if plots],
    }
