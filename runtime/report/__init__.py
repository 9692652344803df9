"""Reports of runs, finished or broken, from the run store alone: brief for a terminal, full as a page or Markdown."""

from .brief import render_report
from .page import render_html, render_markdown

__all__ = ["render_html", "render_markdown", "render_report"]
