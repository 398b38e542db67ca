"""One HTML file that holds everything, Plotly's script included, and asks the network for nothing."""

from __future__ import annotations

import json
import os
from html import escape
from pathlib import Path

from moesim.report.assets import SCRIPT, STYLE
from moesim.report.figures import Figure

__all__ = ["Page", "write_page"]

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; form-action 'none'; base-uri 'none'"
)
"""Forbids the browser every request, whatever the script holds."""


class Page:
    """HTML in order, and the figures' data beside it."""

    def __init__(self) -> None:
        self.body: list[str] = []
        self.data: list[str] = []

    def add(self, html: str) -> None:
        """Append HTML; what comes from a person is escaped by who calls."""
        self.body.append(html)

    def figure(self, figure: Figure | None, description: str, max_width: int | None = None) -> None:
        """Append a figure, or nothing.

        Parameters
        ----------
        figure
            Plotly's ``data`` and ``layout``.
        description
            What it shows, for those who do not see it.
        max_width
            Of a figure that should not fill the page [pixels].
        """
        if figure is None:
            return
        name = f"figure-{len(self.data) + 1}"
        text = json.dumps(figure, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        # a "</script>" or "<!--" in a name would end the element that holds the data
        safe = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
        self.data.append(f'<script type="application/json" id="{name}">{safe}</script>')
        height = int(figure["layout"]["height"])
        width = f";max-width:{max_width}px" if max_width else ""
        self.add(
            f'<figure><div class="plot" data-figure="{name}" role="img" aria-label="{escape(description)}" '
            f'style="min-height:{height}px{width}"></div></figure>'
        )

    def html(self, title: str, plotly: str) -> str:
        """The whole document.

        Parameters
        ----------
        title
            Not escaped yet.
        plotly
            Source of plotly.js; left out where no figure needs it.
        """
        scripts = [
            *self.data,
            f"<script>{plotly}</script>" if self.data else "",
            f"<script>{SCRIPT}</script>",
        ]
        hint = "<noscript><p>The figures need JavaScript; the tables do not.</p></noscript>"
        return "\n".join(
            (
                '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
                f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
                hint,
                *self.body,
                *scripts,
                "</body>\n</html>\n",
            )
        )


def write_page(path: Path | str, page: Page, title: str) -> Path:
    """Write a page beside its place, then rename it, so that no half-written page is ever there."""
    from plotly.offline import get_plotlyjs  # only here: the command line starts without it

    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    plotly = get_plotlyjs() if page.data else ""
    try:
        unfinished.write_text(page.html(title, plotly), encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
