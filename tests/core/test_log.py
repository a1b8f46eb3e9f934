from __future__ import annotations

import io
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tinymodal.core import log
from tinymodal.core.log import Metrics, Progress, clock, json_line


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (75.2, "1:15"), (3700, "1:01:40"), (59.6, "1:00")]
)
def test_time_is_written_as_on_a_clock(seconds, text):
    assert clock(seconds) == text


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_one_object_a_line_and_go_on_after_a_restart(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    for n in (1, 2):
        metrics = Metrics(path)
        metrics.log({"step": n})
        metrics.close()
    assert rows(path) == [{"step": 1}, {"step": 2}]


def test_steps_that_are_done_again_are_forgotten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.log({"step": 1})
    length = metrics.flush()
    metrics.log({"step": 2})
    metrics.close()

    again = Metrics(path)
    again.rewind(length)
    again.log({"step": 2, "again": True})
    again.rewind(10_000)  # more than there is: nothing to forget
    again.close()
    assert rows(path) == [{"step": 1}, {"step": 2, "again": True}]


def test_progress_tells_rate_and_time_left_on_lines_where_there_is_no_terminal(capsys, monkeypatch):
    log.console.cache_clear()
    now = iter([0.0, 0.0, 5.0, 20.0, 20.0, 20.0])
    monkeypatch.setattr(log.time, "monotonic", lambda: next(now, 20.0))
    with Progress("align", total=40, start=10) as bar:
        bar.advance(5)
        bar.advance(5, note="loss 1.5")
    told = capsys.readouterr().err.splitlines()
    log.console.cache_clear()
    assert told[0] == "align  20/40  2.0 s/step  0:40 left  loss 1.5"
    assert len(told) == 2  # one on the way, one at the end


def test_without_a_total_the_share_that_is_done_tells_the_time_left(capsys, monkeypatch):
    log.console.cache_clear()
    now = iter([0.0, 0.0, 20.0])
    monkeypatch.setattr(log.time, "monotonic", lambda: next(now, 20.0))
    with Progress("align", total=None, start=100, share=0.5) as bar:
        bar.advance(40, share=0.6)
    told = capsys.readouterr().err.splitlines()
    log.console.cache_clear()
    assert told[0] == "align  140 (60 %)  2.0 steps/s  1:20 left"


def test_the_end_tells_how_long_it_took(capsys, monkeypatch):
    for total in (2, None):
        log.console.cache_clear()
        now = iter([0.0, 0.0, 75.0])
        monkeypatch.setattr(log.time, "monotonic", lambda: next(now, 75.0))  # noqa: B023
        with Progress("align", total=total) as bar:
            bar.advance(2, share=1.0)
        assert capsys.readouterr().err.splitlines()[-1].endswith("37.5 s/step  1:15")
    log.console.cache_clear()


@given(
    st.dictionaries(
        st.text(max_size=5), st.one_of(st.floats(), st.integers(), st.text(), st.none(), st.lists(st.text()))
    )
)
def test_a_line_is_strict_json_whatever_is_in_it(row):
    """Half a character of a file's name and a loss that is not a number included."""

    def refuse(word):
        raise AssertionError(word)

    written = json_line(row)
    assert written.count(b"\n") == 1
    read = json.loads(written, parse_constant=refuse)
    for key, value in row.items():
        lost = isinstance(value, float) and not math.isfinite(value)
        assert read[key] == (None if lost else value)


def test_lines_appended_by_several_processes_do_not_mix(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tinymodal.core.log import append\n"
        "for n in range(40): append(Path(sys.argv[1]), {'who': sys.argv[2], 'n': n, 'long': 'x' * 5000})"
    )
    path = tmp_path / "new" / "lines.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), who]) for who in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    for who in "ab":
        assert [row["n"] for row in rows(path) if row["who"] == who] == list(range(40))


def test_progress_that_is_not_shown_says_nothing(capsys):
    with Progress("align", total=2, shown=False) as bar:
        bar.advance(2)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_bar_shows_rate_and_time_left(monkeypatch):
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=100)
    monkeypatch.setattr(log, "console", lambda: terminal)
    now = iter([0.0, 0.0, 10.0])
    monkeypatch.setattr(log.time, "monotonic", lambda: next(now, 10.0))
    with Progress("align", total=40) as bar:
        bar.advance(20, note="loss 1.5")
    assert "20/40" in out.getvalue()
    assert "2.0 steps/s  0:10 left  loss 1.5" in out.getvalue()


def test_the_program_is_named_as_it_can_be_called_again(tmp_path, monkeypatch):
    """After ``make demo`` the command lies in ``.venv/bin`` and nowhere on the path."""
    script = tmp_path / ".venv" / "bin" / "tinymodal"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(script), "demo"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert log.program() == ".venv/bin/tinymodal"
    monkeypatch.setenv("PATH", str(script.parent))
    assert log.program() == "tinymodal"
    monkeypatch.setattr("sys.argv", ["pytest"])
    monkeypatch.setenv("PATH", "")
    assert log.program().endswith(" -m tinymodal")
