"""The page: complete, self-contained, and safe with whatever a model says."""

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import soundfile
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinymodal.core.types import Audio, Image, Message, Sample, Text
from tinymodal.eval.pages.curves import Curve, curves
from tinymodal.eval.pages.playable import MAX_S, RATE_HZ, playable, sounds_of
from tinymodal.eval.pages.report import Card, margin, page, terminal_sounds, terminal_table

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


# Sounds

SOUND = {
    "hear": {"wer_seen_voices": 0.021, "wer_unseen_voices": 0.034, "shuffled": 0.97},
    "spoken_questions": {"mean_new": 0.881, "mean_written": 0.902},
    "speak": {"wer": 0.045, "cer": 0.012, "first_sound_ms": 123.4, "real_time_factor": 0.314},
}


def tone(seconds: float = 0.5, rate_hz: int = 16_000) -> torch.Tensor:
    return 0.5 * torch.sin(torch.arange(round(seconds * rate_hz)) * (2 * torch.pi * 440 / rate_hz))


def test_a_card_plays_its_question_and_its_answer():
    ogg = playable(tone(), 16_000)
    wav = io.BytesIO()
    soundfile.write(wav, tone(0.1).numpy(), 16_000, format="WAV")
    card = Card(
        (), "", "red", "red", "colour", True, sounds=(ogg, wav.getvalue()), spoken=ogg, heard="read <b>"
    )
    html = page(report(), gallery=[card])
    found = outline(html)
    assert found.tags.count("audio") == 3
    assert "img" not in found.tags
    files = [base64.b64decode(data) for data in re.findall(r'src="data:audio/\w+;base64,([^"]*)"', html)]
    assert files == [ogg, wav.getvalue(), ogg]
    assert re.findall(r'src="(data:audio/\w+);', html) == [
        "data:audio/ogg",
        "data:audio/wav",
        "data:audio/ogg",
    ]
    assert "read <b>" in found.text
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(", re.sub(r"base64,[^\"]*", "", html))


def test_a_playable_sound_is_the_sound_and_small():
    file = playable(tone(2.0), 16_000)
    assert len(file) < 2 * 9_000
    heard, rate_hz = soundfile.read(io.BytesIO(file), dtype="float32")
    assert rate_hz == 16_000
    assert len(heard) == 32_000
    peak = torch.fft.rfft(torch.from_numpy(heard)).abs().argmax() / 2.0
    assert peak == pytest.approx(440, abs=1)


def test_a_long_or_a_fine_sound_is_cut_or_thinned_and_no_sound_is_no_file():
    assert soundfile.info(io.BytesIO(playable(torch.zeros(8_000 * 60), 8_000))).duration == pytest.approx(
        MAX_S
    )
    fine = soundfile.info(io.BytesIO(playable(tone(1.0, 48_000), 48_000)))
    assert (fine.samplerate, fine.duration) == (RATE_HZ, pytest.approx(1.0, abs=0.01))
    assert playable(torch.zeros(0), 16_000) == b""


def test_the_sounds_of_a_question_are_the_stretches_that_are_heard(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(2.0).numpy(), 16_000)
    parts = (Audio(tmp_path / "a.wav", start_s=0.5, end_s=1.0), Text("?"), Audio(tone(0.25, 8_000), 8_000))
    sample = Sample((Message("user", (Image(tmp_path / "none.png"), *parts)),), "s")
    lengths = [soundfile.info(io.BytesIO(file)).duration for file in sounds_of(sample)]
    assert lengths == pytest.approx([0.5, 0.25], abs=0.01)


def test_what_is_told_of_sound_stands_in_a_table_of_its_own():
    told = report() | SOUND
    told["starter"] = told["starter"] | {"speak": {"wer": 0.0111, "cer": 0.001}}
    found = outline(page(told))
    text = " ".join(found.text)
    for shown in ("2.1 %", "3.4 %", "97.0 %", "88.1 %", "90.2 %", "4.5 %", "123 ms", "0.31", "1.1 %"):
        assert shown in text
    assert "Hearing and speaking" not in " ".join(outline(page(report())).text)


def test_the_terminal_tells_the_same_of_sound():
    from rich.console import Console

    assert terminal_sounds(report()) is None
    told = report() | SOUND
    told["starter"] = told["starter"] | {"speak": {"wer": 0.0111, "cer": None}}
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(terminal_sounds(told))
    text = console.export_text()
    for shown in ("starter model", "3.4 %", "123 ms", "0.31", "1.1 %", "–"):
        assert shown in text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_can_play_the_sounds_of_a_page(tmp_path):
    """It knows their length: it has decoded them."""
    card = Card((), "", "red", "red", "colour", True, sounds=(playable(tone(1.5), 16_000),))
    asks = "<script>addEventListener('load',()=>{const a=document.querySelector('audio');"
    asks += "a.onloadedmetadata=()=>{document.title='lasts '+a.duration.toFixed(1)};a.load()})</script>"
    file = tmp_path / "page.html"
    file.write_text(page(report(), gallery=[card]).replace("</body>", f"{asks}</body>"))
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom")
    done = subprocess.run(
        ["chromium", *flags, f"--user-data-dir={tmp_path / 'profile'}", f"file://{file}"],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert "<title>lasts 1.5</title>" in done.stdout
