"""The report as one HTML file that needs nothing else: images and text are inside it."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lctw_megatron.report.coloured_text import style
from lctw_megatron.report.table import BETTER, WORSE

MARK = '<meta name="generator" content="LCTW-Megatron">'
"""By which a page is known as ours."""

_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{{ mark }}
<title>{{ title }}</title>
<style>
body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;color:#111;
background:#fff}
h1{font-size:1.5rem} h2{font-size:1.1rem;margin-top:2.2rem}
table{border-collapse:collapse;margin:.8rem 0;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .5rem;text-align:right} th{vertical-align:bottom}
td:first-child,th:first-child{text-align:left} tr{border-bottom:1px solid #ddd}
.wide{overflow-x:auto;font-size:.9rem} .wide td{white-space:nowrap} td.better{background:#dcebf7}
td.worse{background:#fde8cf} summary{cursor:pointer;margin:.8rem 0}
thead tr{border-bottom:2px solid #555} img{max-width:100%;height:auto}
.note{border-left:4px solid #D55E00;padding:.4rem .8rem;background:#faf5f0}
.lead{margin:.4rem 0}
.small{color:#444;margin:.4rem 0}
.legend span{padding:.1rem .2rem}
{{ style }}
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if note %}<p class="note">{{ note }}</p>{% endif %}
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% if section.folded %}<details><summary>{{ section.folded }}</summary>{% endif %}
{% for line in section.lead %}<p class="lead">{{ line }}</p>{% endfor %}
{% for rows in section.tables %}
<div class="wide"><table>
<thead><tr>{% for cell in rows[0] %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows[1:] %}
<tr>{% for cell in row %}<td{{ shade(cell) }}>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% endfor %}
{% if section.image %}<img alt="{{ section.title }}" src="{{ section.image }}">{% endif %}
{% for line in section.lines %}<p class="small">{{ line }}</p>{% endfor %}
{{ section.body }}
{% if section.folded %}</details>{% endif %}
{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it; everything but ``body`` is escaped."""

    title: str
    lead: Sequence[str] = ()
    """What is said first."""
    tables: Sequence[list[list[str]]] = ()
    """Each with its heading row first."""
    png: bytes | None = None
    lines: Sequence[str] = ()
    body: str = ""
    """HTML from ``coloured_text``."""
    folded: str = ""
    """Not empty: the section opens on a click on these words."""


def render_page(title: str, sections: Sequence[Section], note: str | None = None) -> str:
    """The whole HTML file."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_TEMPLATE).render(
        title=title,
        note=note,
        mark=Markup(MARK),
        style=Markup(style()),
        shade=_shade,
        sections=[
            {
                "title": section.title,
                "lead": section.lead,
                "tables": section.tables,
                "lines": section.lines,
                "image": _inline(section.png),
                "body": Markup(section.body),
                "folded": section.folded,
            }
            for section in sections
        ],
    )


def _shade(cell: str) -> str:
    """The class of a table's cell that says better or worse."""
    marks = {BETTER: "better", WORSE: "worse"}
    return Markup(f' class="{marks[cell[-1]]}"') if cell and cell[-1] in marks else ""


def _inline(png: bytes | None) -> str:
    return "" if png is None else "data:image/png;base64," + base64.b64encode(png).decode()
