"""A picture is shown in the way that the terminal announces."""

import base64
import io
import re

import PIL.Image
import pytest

from tinymodal.infer.preview import ROWS, preview, way_of


@pytest.mark.parametrize(
    ("environment", "way"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm", "TMUX": "1"}, "256 colours"),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "24 bit"),
        ({"TERM": "xterm-256color"}, "256 colours"),
        ({"TERM": "xterm-kitty", "NO_COLOR": "1"}, None),
        ({"TERM": "dumb"}, None),
        ({}, None),
    ],
)
def test_the_way_is_read_off_the_environment(environment, way):
    assert way_of(environment) == way


@pytest.fixture
def path(tmp_path):
    """Red over blue, wider than high."""
    picture = PIL.Image.new("RGB", (200, 100), "red")
    picture.paste("blue", (0, 50, 200, 100))
    picture.save(tmp_path / "two.png")
    return tmp_path / "two.png"


def test_blocks_are_the_pictures_colours_in_their_places(path):
    lines = preview(path, "24 bit").splitlines()
    assert len(lines) == 10
    assert all(line.count("\u2580") == 40 and line.endswith("\033[0m") for line in lines)
    assert "38;2;255;0;0;48;2;255;0;0m" in lines[0]
    assert "38;2;0;0;255;48;2;0;0;255m" in lines[-1]
    assert "38;5;196;48;5;196m" in preview(path, "256 colours").splitlines()[0]
    assert len(preview(path, "24 bit", columns=8).splitlines()) == 2


def test_a_tall_picture_is_no_higher_than_the_rows(tmp_path):
    PIL.Image.new("RGB", (50, 900)).save(tmp_path / "tall.png")
    assert len(preview(tmp_path / "tall.png", "24 bit").splitlines()) == ROWS


@pytest.mark.parametrize("way", ["kitty", "iterm2"])
def test_pixels_arrive_whole(way, tmp_path):
    noise = PIL.Image.effect_noise((600, 300), 80).convert("RGB")
    noise.save(tmp_path / "noise.png")
    sent = preview(tmp_path / "noise.png", way)
    if way == "kitty":
        parts = re.findall("\033_G(?:a=T,f=100,)?m=([01]);([^\033]*)\033\\\\", sent)
        assert [more for more, _ in parts] == ["1"] * (len(parts) - 1) + ["0"]
        assert all(len(data) <= 4096 for _, data in parts)
        data = "".join(data for _, data in parts)
    else:
        data = re.fullmatch("\033]1337;File=inline=1;size=\\d+;preserveAspectRatio=1:(.*)\a\n", sent)[1]
    with PIL.Image.open(io.BytesIO(base64.b64decode(data))) as shown:
        assert shown.size == (480, 240)


def test_what_is_no_picture_shows_nothing(tmp_path):
    (tmp_path / "no.png").write_bytes(b"no picture")
    assert preview(tmp_path / "no.png", "24 bit") == ""
