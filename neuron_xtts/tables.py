"""Tables of strings, as text, as Markdown and as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

#: A header and rows that are as long as it.
Table = tuple[tuple[str, ...], Sequence[tuple[str, ...]]]


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A text table with aligned columns and a line of dashes below the header."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def markdown(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def html(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """An HTML table; cells are escaped."""

    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
