from __future__ import annotations

import json

import pytest

from tinymodal.core.errors import DataError
from tinymodal.train.bad_steps import FILE, BadSteps
from tinymodal.train.step import LOSS_SCALE

from .test_meter import REPORT as GOOD

BAD = GOOD._replace(skipped=True, why="the loss is not finite", bad_ids=("a.jsonl:3", "a.jsonl:9"))


def rows(folder):
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_a_bad_step_is_named_and_listed(tmp_path, capsys):
    steps = BadSteps(tmp_path, "align", limit=2)
    steps.see(1, GOOD)
    assert not (tmp_path / FILE).exists()
    steps.see(2, BAD)
    assert rows(tmp_path) == [
        {
            "stage": "align",
            "step": 2,
            "why": "the loss is not finite",
            "samples": ["a.jsonl:3", "a.jsonl:9"],
        }
    ]
    said = capsys.readouterr().err
    assert "align: step 2 skipped: the loss is not finite. It read: a.jsonl:3, a.jsonl:9" in said


def test_one_more_in_a_row_than_is_allowed_ends_the_run(tmp_path):
    steps = BadSteps(tmp_path, "align", limit=1)
    for step in range(1, 20, 2):
        steps.see(step, BAD)
        steps.see(step + 1, GOOD)
    steps.see(21, BAD)
    with pytest.raises(DataError, match=r"align: 2 steps in a row were skipped \(21, 22\).*a\.jsonl:3"):
        steps.see(22, BAD)
    assert len(rows(tmp_path)) == 12


@pytest.mark.parametrize("killed", range(2, 8))
@pytest.mark.parametrize("saved", range(1, 8))
def test_a_resumed_run_counts_and_lists_as_one_that_was_never_stopped(tmp_path, saved, killed):
    """Wherever it was saved and killed: bad steps 3, 4, 6 and 7, of which three in a row would end it."""
    plan = {step: BAD if step in (3, 4, 6, 7) else GOOD for step in range(1, 8)}

    def run(folder, begun, end):
        steps = BadSteps(folder, "b", limit=2, begun=begun)
        for step in range(begun + 1, end + 1):
            steps.see(step, plan[step])
        return steps

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        BadSteps(folder, "a", limit=8).see(5, BAD)  # a stage before
    expected = run(whole, 0, 7)
    run(cut, 0, max(saved, killed))
    again = run(cut, saved, 7)
    assert rows(cut) == rows(whole)
    with pytest.raises(DataError, match="3 steps in a row"):
        again.see(8, BAD)
    with pytest.raises(DataError, match="3 steps in a row"):
        expected.see(8, BAD)


def test_half_a_line_of_a_kill_is_taken_back(tmp_path):
    BadSteps(tmp_path, "a", limit=8).see(1, BAD)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"stage": "a", "st')
    BadSteps(tmp_path, "a", limit=8, begun=1).see(2, BAD)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_ranks_other_than_the_first_count_but_neither_write_nor_say(tmp_path, capsys):
    steps = BadSteps(tmp_path, "a", limit=1, writes=False)
    steps.see(1, BAD)
    with pytest.raises(DataError):
        steps.see(2, BAD)
    assert not (tmp_path / FILE).exists()
    assert capsys.readouterr().err == ""


def test_a_message_names_a_few_samples_and_the_file_has_all(tmp_path):
    many = BAD._replace(bad_ids=tuple(f"row {n}" for n in range(30)))
    with pytest.raises(DataError, match=r"row 7 and 22 more"):
        BadSteps(tmp_path, "a", limit=0).see(1, many)
    assert len(rows(tmp_path)[0]["samples"]) == 30


def test_a_loss_scale_that_was_too_large_is_no_fault(tmp_path, capsys):
    steps = BadSteps(tmp_path, "a", limit=1)
    for step in range(1, 20):
        steps.see(step, GOOD._replace(skipped=True, why=LOSS_SCALE))
    steps.see(20, BAD)
    steps.see(21, GOOD._replace(skipped=True, why=LOSS_SCALE))
    steps.see(22, BAD)
    assert [row["step"] for row in rows(tmp_path)] == [20, 22]
