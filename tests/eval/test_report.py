"""The page: complete, self-contained, and safe with whatever a model says."""

import io
import re
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinymodal.eval.curves import Curve, curves
from tinymodal.eval.report import Card, margin, page, terminal_table

VOID = {"meta", "img", "link", "br", "hr", "line", "polyline"}


def report(kinds=("colour", "number")):
    row = {"new": 0.9, "unseen_pairs": 0.8, "shuffled": 0.3, "constant": 0.25, "n": 120}
    scores = {
        "kinds": {kind: dict(row, unseen_pairs=None if kind == "number" else 0.8) for kind in kinds},
        "mean": {"new": 0.9, "unseen_pairs": 0.8, "shuffled": 0.3, "constant": 0.25},
    }
    return scores | {
        "name": "demo",
        "stages": {
            "align": {"mean_new": 0.4},
            "instruct": {"mean_new": 0.9},
            "instruct_without_align": {"mean_new": 0.6},
        },
        "starter": scores,
        "seconds": 301.5,
        "cpu_seconds": 555.0,
        "peak_memory_mb": 900.0,
        "machine": {"cpu": "a <fast> one", "cores": 2},
        "versions": {"torch": "2.13.0"},
        "commit": "abc123",
        "test_seed": 7,
    }


CARD = Card((b"\x89PNG",), "What colour?", "red", "blue", "colour", False)
CURVES = [
    Curve("align", "with align", tuple((i, 3.0 / (i + 1)) for i in range(500))),
    Curve("instruct", "with align", ((0, 2.0), (1, 1.0))),
    Curve("instruct", "without align", ((0, 3.0), (1, 2.0))),
]


class Outline(HTMLParser):
    """Tags that are open, and text that is shown."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def outline(html: str) -> Outline:
    found = Outline()
    found.feed(html)
    assert found.open == []
    return found


def test_the_page_shows_every_number_question_and_curve():
    html = page(report(), CURVES, [CARD], "tinymodal chat runs/demo/model --image runs/demo/sample.png")
    found = outline(html)
    text = " ".join(found.text)
    for shown in (
        "90.0 %",
        "80.0 %",
        "30.0 %",
        "25.0 %",
        "40.0 %",
        "60.0 %",
        "5 min 02 s",
        "900 MB",
        "abc123",
    ):
        assert shown in text
    for shown in ("What colour?", "red", "blue", "wrong", "tinymodal chat", "a <fast> one", "torch 2.13.0"):
        assert shown in text
    assert found.tags.count("svg") == 2
    assert found.tags.count("img") == 1


def test_the_page_points_to_nothing_outside_itself():
    html = page(report(), CURVES, [CARD], "x")
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(", html)
    assert set(re.findall(r'src="([^,"]*)', html)) == {"data:image/png;base64"}


def test_the_page_has_a_dark_side():
    html = page(report())
    assert "prefers-color-scheme:dark" in html
    assert '<meta name="color-scheme" content="light dark">' in html


@settings(deadline=None)
@given(st.text(max_size=40))
def test_whatever_a_model_says_is_text_and_not_markup(said):
    evil = f'<script>alert("{said}")</script>{said}'
    card = Card((), evil, evil, evil, evil, True, note=evil)
    base = report(kinds=(evil,))
    found = outline(page(base, [Curve(evil, evil, ((0, 1.0),))], [card], command=evil))
    assert "script" not in found.tags


def test_parts_that_are_missing_are_left_out():
    bare = {key: report()[key] for key in ("kinds", "mean")}
    found = outline(page(bare))
    assert found.tags.count("section") == 1


def test_curves_come_from_metrics_by_stage_and_skip_what_is_no_number():
    rows = [
        {"stage": "align", "step": 2, "loss": 1.0},
        {"stage": "align", "step": 1, "loss": 2.0},
        {"stage": "align", "step": 3, "loss": float("nan")},
        {"stage": "align", "saved": True},
        {"stage": "instruct", "step": 1, "loss": 0.5},
    ]
    found = curves(rows, "run")
    assert [(c.panel, c.points) for c in found] == [
        ("align", ((1.0, 2.0), (2.0, 1.0))),
        ("instruct", ((1.0, 0.5),)),
    ]


@settings(deadline=None)
@example([5e-324], 1.0)
@example([0.0, 0.0], 1.0)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=700), st.floats(1e-6, 1e6))
def test_every_point_of_a_curve_lies_inside_its_chart(values, scale):
    line = Curve("s", "l", tuple((i * scale, value) for i, value in enumerate(values)))
    html = page(report(), [line])
    outline(html)
    for points in re.findall(r'points="([^"]*)"', html):
        for point in points.split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 460
            assert 0 <= y <= 230


@pytest.mark.parametrize(
    ("accuracy", "n", "expected"), [(0.95, 120, 0.042), (0.5, 120, 0.088), (0.5, 0, 1.0)]
)
def test_the_margin_is_half_a_wilson_interval(accuracy, n, expected):
    assert margin(accuracy, n) == pytest.approx(expected, abs=0.002)


def test_the_terminal_table_shows_kinds_and_mean():
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(terminal_table(report(), "This model"))
    text = console.export_text()
    assert "colour" in text
    assert "–" in text
    assert "mean" in text
