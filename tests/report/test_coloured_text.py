"""Coloured text: nothing in a token can act on a page or a terminal; colours tell numbers apart."""

import re
from html.parser import HTMLParser

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lctw_megatron.report.coloured_text import (
    LEVELS,
    UNKNOWN,
    Scale,
    colour,
    heavy_from,
    ink,
    legend_html,
    scale_for,
    style,
    to_html,
    to_plain,
    to_terminal,
    visible,
)

NAN = float("nan")


class Reader(HTMLParser):
    """Collects the text and the tags of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.tags = "", []

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))


def test_html_in_tokens_and_titles_is_text():
    texts = ['<script>alert("1")</script>', " & <b", "x"]
    page = to_html(
        texts, np.array([1.0, 0.5, NAN]), Scale(1.0, False), ['a" onclick="b', "<i>", ""]
    )
    reader = Reader()
    reader.feed(page)
    assert reader.text == "".join(texts)
    assert [tag for tag, _ in reader.tags] == ["span"] * 3
    assert set(reader.tags[0][1]) == {"class", "title"}
    assert reader.tags[0][1]["title"] == 'a" onclick="b'


@given(st.lists(st.text(max_size=5), max_size=6))
def test_a_page_reads_back_as_its_tokens(texts):
    page = to_html(texts, np.zeros(len(texts)), Scale(1.0, True))
    reader = Reader()
    reader.feed(page)
    reader.close()
    expected = visible("".join(texts)).replace("\n", "\u21b5\n")
    assert reader.text == expected.replace("\r", "\n")


@given(st.lists(st.text(max_size=5), max_size=6))
def test_no_token_can_send_an_escape_to_the_terminal(texts):
    shown = to_terminal(texts, np.ones(len(texts)), Scale(1.0, False))
    plain = re.sub(r"\x1b\[(48;2;\d+;\d+;\d+;38;2;\d+;\d+;\d+|0)m", "", shown)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", plain)
    assert plain == visible("".join(texts))


def test_control_characters_show_as_signs():
    assert visible("a\x1b[31m\r\t\n\x7f\u202eb") == "a\u241b[31m\u240d\t\n\u00b7\u00b7b"


def test_colour_ends_before_a_line_break():
    shown = to_terminal(["a\n", "b"], np.array([1.0, 0.0]), Scale(1.0, False))
    assert "a\x1b[0m\n" in shown


def test_plain_text_marks_the_heaviest_tokens():
    values = np.array([0.0, 5.0, -5.0, NAN])
    assert to_plain([" a", " b", "c\n", "d"], values, 5.0) == " a ⟦b⟧⟦c⟧\nd"
    assert heavy_from(np.array([1.0, 1.0, 1.0])) == np.inf
    assert heavy_from(np.array([0.0] * 95 + [5.0] * 5)) == 5.0
    assert heavy_from(np.arange(101.0)) == 90.0


def test_shades_grow_with_the_number_on_both_sides_of_zero():
    scale = Scale(4.0, True)
    assert scale.level(0.0) == 0 and scale.level(NAN) is None
    assert scale.level(1.0) == LEVELS // 2 and scale.level(-1.0) == -LEVELS // 2
    assert scale.level(9.0) == LEVELS and scale.level(-9.0) == -LEVELS
    assert Scale(4.0, False).level(-1.0) == 0
    assert Scale(3.0, False, zero=0.75).level(0.75) == 0
    assert colour(None) == UNKNOWN and colour(0) == (255, 255, 255)


def test_darker_is_more_also_without_seeing_hues():
    def luminance(rgb: tuple[int, int, int]) -> float:
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for sign in (1, -1):
        shades = [luminance(colour(sign * level)) for level in range(LEVELS + 1)]
        assert all(a > b for a, b in zip(shades, shades[1:], strict=False))
    for level in [None, *range(-LEVELS, LEVELS + 1)]:
        lighter, darker = sorted((luminance(colour(level)), luminance(ink(colour(level)))))[::-1]
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, level  # WCAG AA for text


def test_the_scale_begins_at_the_floor_of_mixed_weights_and_ends_at_99_percent():
    weights = np.concatenate([np.full(980, 0.75), np.full(19, 2.0), [50.0]])
    scale = scale_for(weights, signed=False)
    assert (scale.zero, scale.limit) == (0.75, 2.0)
    assert scale_for(np.array([NAN]), True).limit == 1.0
    assert scale_for(np.zeros(5), False).level(0.0) == 0
    assert scale_for(np.ones(5), False).level(1.0) == 0


def test_every_shade_has_a_rule():
    rules = style()
    page = to_html(["x"] * 60, np.append(np.linspace(-1, 1, 59), NAN), Scale(1.0, True))
    page += legend_html(Scale(1.0, True), "d")
    for name in set(re.findall(r'class="(\w+)"', page)) - {"legend"}:
        assert f".{name}{{" in rules
