"""What objects look like in a notebook: small HTML, escaped, with no script and nothing from the network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape


def framed(page: str, title: str) -> str:
    """A whole page within a notebook's, whose styles stay its own."""
    return (
        f'<iframe srcdoc="{escape(page)}" title="{escape(title)}" sandbox '
        'style="width:100%;height:36em;border:1px solid #8888"></iframe>'
    )


def facts_table(title: str, facts: Mapping[str, object]) -> str:
    """A title, and a line for each fact."""
    lines = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(str(value))}</td></tr>'
        for name, value in facts.items()
    )
    return f"<div><strong>{escape(title)}</strong><table>{lines}</table></div>"


def grid(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], notes: Sequence[str] = ()) -> str:
    """A title, a table, and notes below it; numbers stand to the right, a missing value is empty."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div><strong>{escape(title)}</strong>{table}{below}</div>"


def _cell(value: object) -> str:
    shown = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    side = "right" if isinstance(value, (int, float)) and not isinstance(value, bool) else "left"
    return f'<td style="text-align:{side}">{escape(shown)}</td>'
