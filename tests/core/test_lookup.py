from __future__ import annotations

import pytest

from tinymodal.core.errors import RecipeError
from tinymodal.core.lookup import find

TABLE = {"llava": 1, "messages": 2, "caption": 3}


def test_a_short_name_is_found_in_the_table():
    assert find("caption", TABLE, "format") == 3


def test_an_unknown_name_lists_the_table_and_the_nearest():
    with pytest.raises(RecipeError) as caught:
        find("lava", TABLE, "format")
    told = str(caught.value)
    assert "unknown format 'lava'; known: caption, llava, messages; your own is named 'file.py:Name'" in told
    assert told.endswith("; did you mean 'llava'?")


def test_your_own_file_is_loaded_once(tmp_path):
    path = tmp_path / "my_rows.py"
    path.write_text("class Thing: pass\n")
    assert find(f"{path}:Thing", TABLE, "format") is find(f"{path}:Thing", TABLE, "format")


def test_two_files_of_one_name_are_two_modules(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my_rows.py").write_text(f"NAME = '{folder}'\n")
    assert [find(f"{tmp_path / f}/my_rows.py:NAME", {}, "format") for f in ("a", "b")] == ["a", "b"]


@pytest.mark.parametrize(
    ("code", "name", "told"),
    [
        (None, "Thing", "does not exist"),
        ("def convert(): pass\n", "covnert", "does not define 'covnert'; did you mean 'convert'?"),
        ("x = 1 +\n", "x", "line 1 does not load: SyntaxError"),
        ("import nothing_of_that_name\n", "x", "does not load: ModuleNotFoundError"),
    ],
)
def test_a_file_that_does_not_hold_it_is_named(tmp_path, code, name, told):
    path = tmp_path / "mine.py"
    if code is not None:
        path.write_text(code)
    with pytest.raises(RecipeError, match=r"mine\.py") as caught:
        find(f"{path}:{name}", TABLE, "format")
    assert told in str(caught.value)


def test_a_file_that_failed_is_read_again_when_mended(tmp_path):
    path = tmp_path / "mended.py"
    path.write_text("oops\n")
    with pytest.raises(RecipeError):
        find(f"{path}:x", {}, "format")
    path.write_text("x = 3\n")
    assert find(f"{path}:x", {}, "format") == 3
