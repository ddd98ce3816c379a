"""The report as one HTML file that needs nothing else: images and text are inside it."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lctw_megatron.report.coloured_text import style

_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#111;
background:#fff}
h1{font-size:1.5rem} h2{font-size:1.1rem;margin-top:2.2rem}
table{border-collapse:collapse;margin:.8rem 0} td,th{padding:.25rem .8rem;text-align:right}
td:first-child,th:first-child{text-align:left} tr{border-bottom:1px solid #ddd}
thead tr{border-bottom:2px solid #555} img{max-width:100%;height:auto}
.note{border-left:4px solid #D55E00;padding:.4rem .8rem;background:#faf5f0} .small{color:#444}
.legend span{padding:.1rem .2rem}
{{ style }}
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if note %}<p class="note">{{ note }}</p>{% endif %}
{% for section in sections %}
<h2>{{ section.title }}</h2>
{% for rows in section.tables %}
<table><thead><tr>{% for cell in rows[0] %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows[1:] %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table>
{% endfor %}
{% if section.image %}<img alt="{{ section.title }}" src="{{ section.image }}">{% endif %}
{% for line in section.lines %}<p class="small">{{ line }}</p>{% endfor %}
{{ section.body }}
{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it; everything but ``body`` is escaped."""

    title: str
    tables: Sequence[list[list[str]]] = ()
    """Each with its heading row first."""
    png: bytes | None = None
    lines: Sequence[str] = ()
    body: str = ""
    """HTML from ``coloured_text``."""


def render_page(title: str, sections: Sequence[Section], note: str | None = None) -> str:
    """The whole HTML file."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_TEMPLATE).render(
        title=title,
        note=note,
        style=Markup(style()),
        sections=[
            {
                "title": section.title,
                "tables": section.tables,
                "lines": section.lines,
                "image": _inline(section.png),
                "body": Markup(section.body),
            }
            for section in sections
        ],
    )


def _inline(png: bytes | None) -> str:
    return "" if png is None else "data:image/png;base64," + base64.b64encode(png).decode()
