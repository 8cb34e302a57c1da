"""The parts that pages are made of: their style, tables and pictures."""

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  color: #1b1f24; background: #fff; max-width: 1200px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #d8dde3; }
p { margin: .4rem 0; }
.verdict { padding: .8rem 1.1rem; border-left: .5rem solid; margin: 1rem 0; }
.verdict strong { font-size: 1.35rem; margin-right: .6rem; }
.pass { background: #e8f5e9; border-color: #2e7d32; } .fail { background: #fdecea;
  border-color: #b3261e; }
table { border-collapse: collapse; font-size: .84rem; margin: .5rem 0; }
th, td { text-align: right; white-space: nowrap; padding: .22rem .45rem;
  border-bottom: 1px solid #e6e9ed; font-variant-numeric: tabular-nums; }
th { color: #4a5560; font-weight: 600; border-bottom: 1px solid #aab2bb; vertical-align: bottom;
  white-space: normal; }
th:first-child, td:first-child, .text { text-align: left; white-space: normal; }
tr.over td { background: #fdecea; }
td.ok { color: #2e7d32; } td.over { color: #b3261e; font-weight: 600; }
.wide { overflow-x: auto; }
code { font: .8rem ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
img { max-width: 100%; display: block; margin: .6rem 0; }
.thumbnail { max-width: none; margin: 0; }
.planes, .charts { height: auto; }
.planes { max-width: 820px; }
.warning { padding: .35rem .8rem; border-left: .3rem solid #d99a1b; background: #fdf5e3; }
.note { color: #4a5560; font-size: .88rem; }
@page { size: A4 landscape; margin: 12mm; }
@media print { html { font-size: 10.5px; } body { font-size: 1rem; margin: 0; max-width: none; }
  h2 { break-after: avoid; } tr, img { break-inside: avoid; }
  .planes { max-height: 165mm; } .wide { overflow: visible; }
  * { print-color-adjust: exact; } }
"""
# what a page may do: run what stands in it, and ask nobody for anything
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
Cell = tuple[str, str]  # text, and its class


class Html(str):
    """Text that is HTML already."""


def page(title: str, parts: Iterable[str], *, head: str = "") -> str:
    """Return a page that needs nothing but a browser, and nothing from elsewhere."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>\n{head}</head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def json_script(content: Any, kind: str) -> str:
    """Return data of a page for its scripts, and for programs."""
    text = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")
    return f'<script type="application/json" class="{kind}">{text}</script>\n'


def section(title: str, content: str) -> str:
    """Return content under a heading, nothing for no content."""
    return f"<h2>{escape(title)}</h2>\n{content}" if content else ""


def note(text: str) -> str:
    """Return a paragraph in small print."""
    return f'<p class="note">{escape(text)}</p>\n'


def cells(*texts: str) -> tuple[Cell, ...]:
    """Return plain cells."""
    return tuple((text, "") for text in texts)


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    *,
    text_columns: Sequence[int] = (),
    marked: Sequence[bool] = (),
) -> str:
    """Return a table.

    Parameters
    ----------
    head
        The columns' names; without any there is no line of them.
    rows
        Cells, each with its class.
    text_columns
        Columns besides the first that hold words and not numbers.
    marked
        Which rows to make stand out.

    Returns
    -------
    str
        Without the columns that hold nothing but dashes.
    """
    rows = list(rows)
    filled = [n for n in range(len(head)) if not rows or any(row[n][0] != "-" for row in rows)]
    head, rows = [head[n] for n in filled], [[row[n] for n in filled] for row in rows]
    words = {new for new, old in enumerate(filled) if old in text_columns}

    def row(tag: str, row_cells: Sequence[Cell], kind: str = "") -> str:
        made = "".join(
            f"<{tag}{_class(c, 'text' if n in words else '')}>{_html(text)}</{tag}>"
            for n, (text, c) in enumerate(row_cells)
        )
        return f"<tr{_class(kind)}>{made}</tr>\n"

    lines = [row("th", cells(*head))] if any(head) else []
    for n, one in enumerate(rows):
        lines.append(row("td", one, "over" if n < len(marked) and marked[n] else ""))
    return f'<div class="wide"><table>\n{"".join(lines)}</table></div>\n'


def picture(png: bytes, description: str, kind: str) -> str:
    """Return a PNG that is part of the page."""
    source = png_source(base64.b64encode(png).decode())
    return f'<img class="{kind}" alt="{escape(description)}" src="{source}">\n'


def png_source(png_base64: str) -> str:
    """Return what shows a PNG that is part of the page."""
    return f"data:image/png;base64,{png_base64}"


def _html(text: str) -> str:
    return text if isinstance(text, Html) else escape(text)


def _class(*names: str) -> str:
    joined = " ".join(name for name in names if name)
    return f' class="{joined}"' if joined else ""
