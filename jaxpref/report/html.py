"""Self-contained HTML pages with text, tables, and figures."""

import base64
import dataclasses
import html
import math
import mimetypes
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from jaxpref.errors import InputError
from jaxpref.files import write_whole
from jaxpref.report import browse
from jaxpref.report.seeds import mean_and_deviation
from jaxpref.report.style import CSS


@dataclasses.dataclass(frozen=True)
class Link:
    """A text that leads to another place, as a paragraph or a cell of a table."""

    text: str
    target: str
    """`#anchor`, or the name of a page in the same folder, with or without one."""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; the first column names its rows."""

    columns: Sequence[str]
    """Headings."""
    rows: Sequence[Sequence[object]]
    """Cells: text as is, floats with four significant digits, None as a dash, or a
    `Link`."""
    caption: str = ""
    """Description of the numbers and their units."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """An image file with a caption; its bytes are embedded in the page."""

    path: str | Path
    caption: str = ""
    """Description of the image, which is also its alternative text."""


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """Texts side by side, with their line breaks."""

    columns: Sequence[tuple[str, str]]
    """Heading and text of each column."""
    title: str = ""
    above: str = ""
    """Text above the columns, e.g. the prompt; collapsed if it is long."""


@dataclasses.dataclass(frozen=True)
class Browse:
    """A table, or texts side by side, to search and filter; tables can be sorted."""

    content: Table | Sequence[SideBySide]
    """What is shown."""
    keys: Sequence[str]
    """What each row, or each of the texts side by side, is filtered by."""
    label: str = ""
    """Description of the keys; without several keys, there is no filter."""
    first: str = ""
    """The key that is shown at first; all if it is empty."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and the parts under it, in order.

    Text is split into paragraphs at blank lines.  A paragraph whose lines are all
    indented is shown verbatim (a command), and `backticks` mark code.
    """

    title: str
    parts: Sequence[str | Link | Table | Figure | SideBySide | Browse]
    anchor: str = ""
    """Name for links to this section; `s1`, `s2`, ... if it is empty."""


def write_html(
    path: str | Path, title: str, sections: Sequence[Section], *, summary: str = ""
) -> None:
    """Writes the report as one file that needs no other files and no network.

    All inputs are escaped; none is interpreted as HTML.  The file is written
    atomically.

    Args:
      path: where to write.
      title: title of the page.
      sections: contents of the page, in order.
      summary: the result in a sentence or two, shown under the title.

    Raises:
      InputError: if a figure cannot be read or the report cannot be written.
      ValueError: if a table row does not have one cell per column.
    """
    body = "\n".join(_section(number, s) for number, s in enumerate(sections, 1))
    lead = f'<div class="lead">{_text(summary)}</div>' if summary else ""
    parts = [part for section in sections for part in section.parts]
    more = {"css": CSS, "policy": "", "script": ""}
    if any(isinstance(part, Browse) for part in parts):
        script = f"<script>{browse.SCRIPT}</script>\n"
        more = {"css": CSS + browse.CSS, "policy": browse.policy(), "script": script}
    page = _PAGE.format(title=html.escape(title), lead=lead, body=body, **more)
    write_whole(path, page)


def mean_spread(values: Sequence[float], *, digits: int = 2) -> str:
    """Formats `mean ± standard deviation` over seeds for a table cell.

    Args:
      values: one number per run; a single one is shown without a deviation.
      digits: number of decimals.

    Returns:
      The text; an en dash if there are no values.
    """
    if len(values) == 0:
        return "–"
    mean, deviation = mean_and_deviation(values)
    spread = f" ± {deviation:.{digits}f}" if len(values) > 1 else ""
    return _minus(f"{mean:.{digits}f}{spread}")


LONG = 400
"""Characters of the text above columns that are shown before it is expanded."""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'{policy}">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
<header><h1>{title}</h1>
{lead}</header>
{body}
</main>
{script}</body>
</html>
"""


def _section(number: int, section: Section) -> str:
    parts = "\n".join(_part(part) for part in section.parts)
    title = html.escape(section.title)
    anchor = html.escape(section.anchor or f"s{number}")
    return f'<section id="{anchor}">\n<h2>{title}</h2>\n{parts}\n</section>'


def _part(part: str | Link | Table | Figure | SideBySide | Browse) -> str:
    if isinstance(part, Link):
        return f"<p>{_linked(part, _inline(part.text))}</p>"
    if isinstance(part, Browse):
        return _browse(part)
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Figure):
        return _figure(part)
    if isinstance(part, SideBySide):
        return _side_by_side(part)
    return _text(part)


def _browse(part: Browse) -> str:
    by = [f' data-by="{html.escape(key)}"' for key in part.keys]
    names = list(dict.fromkeys(part.keys))
    option = lambda x, text: (
        f'<option value="{x}"{" selected" if x == html.escape(part.first) else ""}>'
        f"{text}</option>"
    )
    escaped = map(html.escape, names)
    options = option("", "all") + "".join(option(x, x) for x in escaped)
    select = f"<label>{html.escape(part.label)}<select>{options}</select></label>"
    search = '<label>Search<input type="search"></label><output></output>'
    if isinstance(part.content, Table):
        body = _table(part.content, by)
    else:
        body = "\n".join(_side_by_side(x, key) for x, key in zip(part.content, by))
    return (
        f'<div class="browse"><p class="controls" hidden>'
        f"{select if len(names) > 1 else ''}{search}</p>\n{body}</div>"
    )


def _side_by_side(part: SideBySide, by: str = "") -> str:
    above = f'<div class="above">{html.escape(part.above.strip())}</div>'
    if len(part.above) > LONG:
        beginning = html.escape(part.above.strip()[:LONG].rsplit(None, 1)[0])
        above = f"<details><summary>{beginning} …</summary>{above}</details>"
    columns = "".join(
        f"<div><h4>{_inline(heading)}</h4>{html.escape(text.strip())}</div>"
        for heading, text in part.columns
    )
    title = f"<h3>{_inline(part.title)}</h3>" if part.title else ""
    return (
        f'<article class="beside"{by}>{title}{above if part.above else ""}'
        f'<div class="columns">{columns}</div></article>'
    )


def _text(text: str) -> str:
    blocks = re.split(r"\n\s*\n", textwrap.dedent(text).strip("\n"))
    return "\n".join(_paragraph(block) for block in blocks if block.strip())


def _paragraph(block: str) -> str:
    if all(line.startswith("  ") for line in block.splitlines() if line.strip()):
        return f"<pre>{html.escape(textwrap.dedent(block))}</pre>"
    return f"<p>{_inline(block)}</p>"


def _inline(text: str) -> str:
    return re.sub(r"`([^`\n]+)`", r"<code>\1</code>", html.escape(text.strip()))


def _table(table: Table, by: Sequence[str] = ()) -> str:
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(
                f"Expected {len(table.columns)} cells for {list(table.columns)}, "
                f"got {list(row)}."
            )
    cells = [[_cell(value) for value in row] for row in table.rows]
    shown = [[_linked(value, _inline(_cell(value))) for value in r] for r in table.rows]
    numeric = [
        bool(cells) and all(re.match(r"([−+.]?\d|–$|$)", row[c]) for row in cells)
        for c in range(len(table.columns))
    ]
    style = lambda c: ' class="n"' if numeric[c] and c else ""
    head = "".join(
        f'<th scope="col"{style(c)}>{_inline(name)}</th>'
        for c, name in enumerate(table.columns)
    )
    body = "\n".join(
        f'<tr{key}><th scope="row">{row[0]}</th>'
        + "".join(f"<td{style(c)}>{row[c]}</td>" for c in range(1, len(row)))
        + "</tr>"
        for row, key in zip(shown, by or [""] * len(cells))
    )
    caption = f"<caption>{_inline(table.caption)}</caption>" if table.caption else ""
    return (
        f'<div class="scroll"><table>{caption}\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(value: object) -> str:
    if isinstance(value, Link):
        return value.text
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return _minus(f"{value:.4g}")
    if isinstance(value, int) and not isinstance(value, bool):
        return _minus(str(value))
    return str(value)


def _linked(value: object, shown: str) -> str:
    if not isinstance(value, Link):
        return shown
    return f'<a href="{html.escape(value.target)}">{shown}</a>'


def _minus(number: str) -> str:
    return number.replace("-", "−")


def _figure(figure: Figure) -> str:
    path = Path(figure.path)
    kind, _ = mimetypes.guess_type(path.name)
    if kind not in {"image/png", "image/jpeg", "image/svg+xml"}:
        raise InputError(
            f"{path}: not a PNG, JPEG or SVG image; save the figure in one of these"
        )
    try:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
    except OSError as error:
        raise InputError(
            f"{path}: cannot read the figure ({error.strerror}); "
            "draw it before writing the report"
        ) from error
    alt = html.escape(figure.caption.replace("`", ""))
    caption = f"<figcaption>{_inline(figure.caption)}</figcaption>"
    return (
        f'<figure><img alt="{alt}" src="data:{kind};base64,{data}">'
        f"{caption if figure.caption else ''}</figure>"
    )
