"""A benchmark is found by its name, and what must lie on disk is told before anything is asked."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tinymodal.core.errors import DataError, RecipeError
from tinymodal.eval.names import benchmark, places
from tinymodal.eval.tasks.table import ON_DISK, TASKS
from tinymodal.verbs.evaluate import show_places


def test_all_that_the_field_is_measured_by_is_known():
    expected = (
        "vqav2 gqa scienceqa textvqa textvqa_ocr pope mme mmbench mmbench_circular mmvet llava_bench mmmu "
        "vizwiz seedbench textcaps refcoco refcoco+ refcocog docvqa chartqa mmstar librispeech"
    )
    assert set(expected.split()) <= set(ON_DISK)
    assert benchmark("speech_roundtrip") is TASKS["speech-roundtrip"]


@pytest.mark.parametrize("name", ON_DISK)
def test_each_says_what_it_needs_and_where_that_is_from(name, tmp_path):
    task = ON_DISK[name]
    assert task.name == name
    assert task.title
    assert "http" in task.source
    assert task.files
    for file in task.files:
        assert file.what
        assert file.origin
    with pytest.raises(DataError, match=rf"{name.replace('+', '[+]')}: needs its files.*--where --on"):
        benchmark(name)
    with pytest.raises(DataError, match="no such folder"):
        benchmark(name, tmp_path / "none")


@pytest.mark.parametrize("name", ON_DISK)
def test_an_empty_folder_is_refused_with_the_file_that_is_missing(name, tmp_path):
    found = benchmark(name, tmp_path) if name != "librispeech" else None
    if found is None:
        pytest.skip("any folder may hold transcripts, at any depth; the run says that there are no questions")
    with pytest.raises(DataError, match=rf"{re.escape(name)}.*(holds no|expected)"):
        list(found.load())


def test_places_tell_what_is_there_and_what_is_not(tmp_path, capsys):
    (tmp_path / "pope").mkdir()
    (tmp_path / "pope" / "coco_pope_random.json").write_text("")
    (place,) = places(["pope"], tmp_path)
    assert place.folder == tmp_path / "pope"
    there = [file.patterns[0] for file, found in zip(place.task.files, place.found, strict=True) if found]
    assert there == ["coco_pope_random.json"]
    show_places(["pope"], tmp_path)
    told = capsys.readouterr().out
    assert f"there    coco_pope_random.json: {tmp_path / 'pope' / 'coco_pope_random.json'}" in told
    assert "missing  coco_pope_popular.json" in told
    assert "optional COCO_val2014_*.jpg" in told


def test_the_table_of_benchmarks_loads_no_torch():
    code = "import sys, tinymodal.eval.tasks.table; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_all_are_listed_where_none_is_named(capsys):
    show_places([], None)
    told = capsys.readouterr().out
    assert all(f"{name}: " in told for name in ON_DISK)
    assert "Nothing is downloaded." in told


def test_a_misspelt_name_is_told_with_the_nearest(tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'pope'"):
        benchmark("poep", tmp_path)
    with pytest.raises(RecipeError, match="did you mean 'mmbench'"):
        places(["mmbnech"], Path())


def test_files_in_the_folder_of_another_benchmark_are_not_taken(tmp_path, capsys):
    (tmp_path / "mme").mkdir()
    (tmp_path / "mme" / "test-00000-of-00001.parquet").touch()
    with pytest.raises(DataError, match=r"holds no folder mmstar, and .* is in that of mme"):
        benchmark("mmstar", tmp_path)
    (place,) = places(["mmstar"], tmp_path)
    assert place.found[0] is None
