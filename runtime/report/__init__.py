"""Reports of runs, finished or broken, from the store alone: one document, for a page, as Markdown, for a terminal."""

from .markdown import render_markdown
from .page import render_html
from .terminal import render_report

__all__ = ["render_html", "render_markdown", "render_report"]
