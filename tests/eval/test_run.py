"""A run asks every question once, writes everything down, and goes on where it was stopped."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest

from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import DataError, RecipeError, TinyModalError
from tinymodal.core.types import Audio, Image, Message, Sample, Text
from tinymodal.eval.benchmark import Benchmark, Judging, Question, Score, by_category
from tinymodal.eval.folder import LOCK, digest, fingerprint
from tinymodal.eval.judge import UNGRADED
from tinymodal.eval.names import benchmark, benchmarks
from tinymodal.eval.results import tables
from tinymodal.eval.rules.answers import exact
from tinymodal.eval.run import UNREADABLE, evaluate, run
from tinymodal.infer.engine import Engine, Reply

UNREAD = "questions that cannot be read"


class Parrot:
    """An engine that answers ``red`` and remembers what it was asked. Raises on demand, as a kill would."""

    def __init__(self, model=None, stop_after: int | None = None, says: str = "red"):
        self._engine = Engine(model or tiny_model())
        self.model, self.encoder = self._engine.model, self._engine.encoder
        self.composed = self._engine.composed
        self.asked, self.stop_after, self.says = [], stop_after, says

    def reply(self, samples, sampling, batch_size, done):
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked += [sample.id for sample in samples]
        done(len(samples))
        return [Reply(self.says, 10, 1, "stop", "prompt of " + sample.id) for sample in samples]


def questions(number: int = 10) -> list[Question]:
    picture = Image(PIL.Image.new("RGB", (24, 24), "red"))
    return [
        Question(
            Sample((Message("user", (picture, Text("what"))),), f"q{i}"),
            "red" if i % 2 else "blue",
            {"kind": "odd" if i % 2 else "even"},
        )
        for i in range(number)
    ]


def colours(load=questions, name: str = "colours", **more) -> Benchmark:
    return Benchmark(name=name, load=load, score=exact, reduce=by_category("kind"), source="here", **more)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_every_prompt_reply_and_score_is_written_down(model, tmp_path):
    result = run(colours(), Parrot(model), tmp_path)
    assert result.numbers == {"even": 0.0, "odd": 1.0, "mean": 0.5}
    rows = [json.loads(line) for line in (tmp_path / "colours.replies.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"q{i}" for i in range(10)]
    assert rows[1] == {
        "id": "q1",
        "prompt": "prompt of q1",
        "reply": "red",
        "stopped_by": "stop",
        "answer": "red",
        "parsed": "red",
        "score": 1.0,
        "meta": {"kind": "odd"},
        "digest": digest(questions()[1]),
        "run": rows[0]["run"],
    }


def test_a_stopped_run_goes_on_and_asks_nothing_twice(model, tmp_path, monkeypatch):
    monkeypatch.setattr("tinymodal.eval.run.SAVE_EVERY", 4)
    first = Parrot(model, stop_after=8)
    with pytest.raises(KeyboardInterrupt):
        run(colours(), first, tmp_path)
    assert len(first.asked) == 8
    # A kill in the middle of a line leaves half of it.
    with (tmp_path / "colours.replies.jsonl").open("a") as file:
        file.write('{"id": "q8", "rep')
    second = Parrot(model)
    result = run(colours(), second, tmp_path)
    assert second.asked == ["q8", "q9"]
    assert len(result.answered) == 10
    rows = [json.loads(line)["id"] for line in (tmp_path / "colours.replies.jsonl").read_text().splitlines()]
    assert rows == [f"q{i}" for i in range(10)]


def test_pictures_are_read_once_for_their_digests_and_the_model_once_for_its_mark(
    model, tmp_path, monkeypatch
):
    hashed, marked = [], []
    monkeypatch.setattr("tinymodal.eval.run.digest", lambda q: hashed.append(q.sample.id) or digest(q))
    monkeypatch.setattr("tinymodal.eval.run.fingerprint", lambda e: marked.append(e) or fingerprint(e))
    for times in (1, 2):  # asked, and found answered
        run(colours(), Parrot(model), tmp_path)
        assert sorted(hashed) == sorted([f"q{i}" for i in range(10)] * times)
        assert len(marked) == times


def test_another_model_is_asked_again(model, tmp_path):
    run(colours(), Parrot(model), tmp_path)
    other = Parrot(tiny_model(seed=1), says="blue")
    assert run(colours(), other, tmp_path).numbers["even"] == 1.0
    assert len(other.asked) == 10


def test_a_changed_answer_is_scored_anew_and_other_limits_keep_their_rows(model, tmp_path):
    run(colours(), Parrot(model), tmp_path)
    few = Parrot(model)
    assert run(colours(), few, tmp_path, limit=3).limit == 3
    assert few.asked == []
    again = Parrot(model)
    run(colours(), again, tmp_path)
    assert again.asked == []
    changed = [Question(q.sample, "green", q.meta) for q in questions()]
    run(colours(lambda: changed), again, tmp_path)
    assert len(again.asked) == 10


def changed_question(what: str, folder) -> Question:
    picture, words = Image(PIL.Image.new("RGB", (24, 24), "red")), Text("what")
    if what == "words":
        words = Text("what?")
    elif what == "pixel":
        picture.source.putpixel((3, 4), (0, 0, 0))
    elif what in ("file", "other file"):
        path = folder / "a.png"
        PIL.Image.new("RGB", (24, 24), "red" if what == "file" else "blue").save(path)
        picture = Image(path)
    elif what == "bytes":
        picture = Image((folder / "a.png").read_bytes())
    elif what == "tiles":
        picture = Image(picture.source, max_tiles=1)
    parts = (words, picture) if what == "order" else (picture, words)
    return Question(Sample((Message("user", parts),), "q0"), "red")


def test_a_changed_question_or_picture_is_asked_again(model, tmp_path):
    """The id and the answer stay the same in all of these."""
    PIL.Image.new("RGB", (24, 24), "green").save(tmp_path / "a.png")
    whats = ("", "words", "pixel", "order", "tiles", "bytes", "file", "other file")
    for what in whats:
        question = changed_question(what, tmp_path)
        for expected in (["q0"], []):
            parrot = Parrot(model)
            run(colours(lambda question=question: [question]), parrot, tmp_path)
            assert parrot.asked == expected, what


def test_a_kept_reply_is_written_with_the_score_that_counts_now(model, tmp_path):
    run(colours(), Parrot(model), tmp_path)
    again = Parrot(model)
    strict = replace(colours(), score=lambda question, reply: Score(0.5, parsed="half"))
    assert run(strict, again, tmp_path).numbers["mean"] == 0.5
    assert again.asked == []
    rows = [json.loads(line) for line in (tmp_path / "colours.replies.jsonl").read_text().splitlines()]
    assert {(row["score"], row["parsed"]) for row in rows} == {(0.5, "half")}


OTHERS = (
    '{"image": null, "question": "what", "answer": "red"}\n',
    '{"id": "q0", "image": null, "question": "what", "answer": "red"}',
    "notes\n",
    "notes",
    "[]\n",
)


@pytest.mark.parametrize("content", OTHERS)
def test_a_file_that_holds_other_rows_is_left_alone(model, tmp_path, content):
    path = tmp_path / "colours.replies.jsonl"
    path.write_text(content)
    parrot = Parrot(model)
    with pytest.raises(DataError, match=r"colours\.replies\.jsonl: .*--out"):
        run(colours(), parrot, tmp_path)
    assert path.read_text() == content
    assert parrot.asked == []


@pytest.mark.parametrize("content", ['[{"image": null}]', '{"lr": 1}', '{"a": {"b": 1}}', "notes", ""])
def test_a_file_called_as_the_results_is_left_alone(model, tmp_path, content):
    """Before anything is asked, not after hours of replies."""
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinymodal.eval.names.TASKS", {"one": colours(name="one")})
        with pytest.raises(DataError, match=r"results\.json: .*--out"):
            evaluate(model, ["one"], folder=tmp_path, limit=1)
    assert path.read_text() == content
    assert not (tmp_path / "one.replies.jsonl").exists()


def test_the_second_benchmarks_file_is_looked_at_before_the_first_is_asked(model, tmp_path):
    (tmp_path / "two.replies.jsonl").write_text("notes\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinymodal.eval.names.TASKS", {"one": colours(name="one"), "two": colours(name="two")})
        with pytest.raises(DataError, match=r"two\.replies\.jsonl"):
            evaluate(model, ["one", "two"], folder=tmp_path, limit=1)
    assert not (tmp_path / "one.replies.jsonl").exists()


def test_half_a_character_is_no_rows_end(model, tmp_path):
    """A kill may cut a file inside a character."""
    run(colours(), Parrot(model, says="é"), tmp_path)
    path = tmp_path / "colours.replies.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex("é".encode()) + 1])
    again = Parrot(model, says="é")
    run(colours(), again, tmp_path)
    assert again.asked == ["q9"]
    assert path.read_bytes() == whole


def test_two_processes_do_not_write_into_one_folder(model, tmp_path):
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); "
        "print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / LOCK)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        other.stdout.readline()
        parrot = Parrot(model)
        with pytest.raises(DataError, match="--out"):
            run(colours(), parrot, tmp_path)
        with pytest.raises(DataError, match="--out"):
            evaluate(model, ["scenes"], folder=tmp_path, limit=1)
        assert parrot.asked == []
        other.communicate("\n")
    run(colours(), parrot, tmp_path)
    assert len(parrot.asked) == 10


def test_a_line_end_inside_a_reply_is_no_line_end_of_the_file(model, tmp_path):
    odd = Parrot(model, says="red\u2028and\x85blue")
    run(colours(), odd, tmp_path)
    again = Parrot(model)
    assert run(colours(), again, tmp_path).answered[0].reply == "red\u2028and\x85blue"
    assert again.asked == []


def test_a_longer_reply_is_another_run(model, tmp_path):
    run(colours(), Parrot(model), tmp_path)
    longer = Parrot(model)
    run(colours(max_new_tokens=65), longer, tmp_path)
    assert len(longer.asked) == 10


def test_no_questions_are_refused(model, tmp_path):
    with pytest.raises(DataError, match="no questions"):
        run(colours(list), Parrot(model), tmp_path)


def test_of_two_questions_with_one_id_the_first_counts_and_the_score_is_incomplete(model, tmp_path):
    result = run(colours(lambda: questions(2) + questions(1)), Parrot(model), tmp_path)
    told = result.summary()
    assert (told["n"], told["complete"]) == (2, False)
    assert told["problems"] == {"questions with the id of another": {"count": 1, "named": ["q0"]}}


def test_a_real_model_is_scored_end_to_end(model, tmp_path):
    monkey = {"one": colours(name="one"), "two": colours(name="two", max_new_tokens=2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinymodal.eval.names.TASKS", monkey)
        results = evaluate(model, ["one", "two"], folder=tmp_path, limit=4)
    told = json.loads((tmp_path / "results.json").read_text())
    assert set(told) == {"one", "two"}
    assert told["one"]["n"] == 4
    assert told["one"]["limit"] == 4
    assert told["one"]["best_constant"]["odd"] == {"answer": "red", "accuracy": 1.0}
    assert len(tables(results)) == 2


def test_results_of_other_benchmarks_stay_in_the_file(model, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinymodal.eval.names.TASKS", {"one": colours(name="one"), "two": colours(name="two")})
        evaluate(model, ["one"], folder=tmp_path, limit=2)
        evaluate(model, ["two"], folder=tmp_path, limit=2)
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"one", "two"}


def test_numbers_of_other_weights_do_not_stay_beside_these(model, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        tasks = {"one": colours(name="one"), "two": colours(name="two", max_new_tokens=2)}
        patch.setattr("tinymodal.eval.names.TASKS", tasks)
        evaluate(model, ["one", "two"], folder=tmp_path, limit=2)
        other = tiny_model(seed=1)
        evaluate(other, ["two"], folder=tmp_path, limit=2)
    told = json.loads((tmp_path / "results.json").read_text())
    assert set(told) == {"two"}
    assert told["two"]["run"] == fingerprint(Engine(other))


def test_a_family_shares_one_table(model, tmp_path):
    from rich.console import Console

    both = [
        run(colours(name=name, family="pair"), Parrot(model), tmp_path)
        for name in ("colours", "colours-again")
    ]
    (table,) = tables(both)
    console = Console(width=100, record=True, quiet=False)
    with console.capture() as captured:
        console.print(table)
    for word in ("colours-again", "best constant", "odd", "50.0", "100.0"):
        assert word in captured.get()


def test_rows_of_your_own_are_a_benchmark(model, tmp_path):
    PIL.Image.new("RGB", (30, 20), "blue").save(tmp_path / "a.png")
    path = tmp_path / "mine.jsonl"
    rows = [
        {"image": "a.png", "question": "what colour", "answer": "blue", "kind": "colour"},
        {"image": None, "question": "how many", "answer": "2"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = benchmark(str(path))
    first, second = mine.load()
    assert first.answer == "blue"
    assert first.meta == {"kind": "colour"}
    assert [message.role for message in first.sample.messages] == ["user"]
    assert len(list(first.sample.media())) == 1
    assert not list(second.sample.media())
    (result,) = evaluate(model, [str(path)], folder=tmp_path / "out")
    assert set(result.numbers) == {"colour", "other", "mean"}


def test_rows_of_your_own_may_be_heard(tmp_path):
    """A sound goes behind the picture, and is the question where there is no other."""
    PIL.Image.new("RGB", (30, 20), "blue").save(tmp_path / "a.png")
    (tmp_path / "a.wav").write_bytes(b"a sound")
    rows = [
        {"image": "a.png", "audio": "a.wav", "answer": "blue", "kind": "heard"},
        {"audio": "a.wav", "question": "how many", "answer": "2"},
        {"image": "a.png", "question": "what colour", "answer": "blue"},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = list(benchmark(str(path)).load())
    kinds = [[type(part) for part in q.sample.messages[0].parts] for q in asked]
    assert kinds == [[Image, Audio], [Audio, Text], [Image, Text]]
    assert [q.answer for q in asked] == ["blue", "2", "blue"]
    assert [q.meta for q in asked] == [{"kind": "heard"}, {}, {}]
    assert len({digest(q) for q in asked}) == 3


def test_the_users_file_is_not_written_to(model, tmp_path):
    """``eval --on mine.jsonl --out .``: replies and questions in one folder."""
    path = tmp_path / "mine.jsonl"
    path.write_text('{"image": null, "question": "how many", "answer": "2"}\n')
    before = path.read_bytes()
    for _ in range(2):
        evaluate(model, [str(path)], folder=tmp_path)
    assert path.read_bytes() == before
    assert len((tmp_path / "mine.replies.jsonl").read_text().splitlines()) == 1


def test_two_benchmarks_of_one_name_are_refused(model, tmp_path):
    row = '{"image": null, "question": "how many", "answer": "2"}\n'
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        for name in ("q", "scenes"):
            (tmp_path / folder / f"{name}.jsonl").write_text(row)
    x, y = str(tmp_path / "x" / "q.jsonl"), str(tmp_path / "y" / "q.jsonl")
    assert [each.name for each in benchmarks([x])] == ["q"]
    with pytest.raises(DataError, match=r"x/q\.jsonl and .*y/q\.jsonl"):
        evaluate(model, [x, y], folder=tmp_path / "out")
    with pytest.raises(DataError, match="twice"):
        evaluate(model, [x, x], folder=tmp_path / "out")
    with pytest.raises(DataError, match=r"scenes\.jsonl: .*built"):
        evaluate(model, [str(tmp_path / "x" / "scenes.jsonl")], folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"answer": "\ud83d"}, r"mine\.jsonl:1: .*half a character .U\+D83D"),
        ({"answer": "2", "kind": "\ud83d"}, r"mine\.jsonl:1: .*half a character .U\+D83D"),
        ({"answer": "2", "kind": "mean"}, r"mine\.jsonl:1: .*'mean'"),
    ],
)
def test_a_row_that_cannot_be_written_down_is_named_before_anything_is_asked(model, tmp_path, row, told):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"image": None, "question": "how many"} | row) + "\n")
    with pytest.raises(DataError, match=told):
        evaluate(model, [str(path)], folder=tmp_path / "out")
    assert not (tmp_path / "out" / "mine.replies.jsonl").exists()


def test_every_file_is_utf8_whatever_the_locale(model, tmp_path, monkeypatch):
    own, opened = Path.open, []

    def opening(path, mode="r", buffering=-1, encoding=None, **more):
        if path.is_relative_to(tmp_path) and "b" not in mode:
            opened.append((path.name, encoding))
        return own(path, mode, buffering, encoding, **more)

    monkeypatch.setattr(Path, "open", opening)
    monkeypatch.setattr("tinymodal.eval.names.TASKS", {"one": colours(name="one")})
    for _ in range(2):
        evaluate(model, ["one"], folder=tmp_path, limit=1)
    files = ("one.replies.jsonl", "one.replies.jsonl.part", "results.json", "results.json.part")
    assert set(opened) == {(name, "utf-8") for name in files}


def test_a_benchmark_of_your_own_is_named_by_file_and_name(tmp_path):
    path = tmp_path / "my_bench.py"
    path.write_text(
        "from tinymodal.eval.rules.answers import exact\n"
        "from tinymodal.eval.benchmark import Benchmark\n"
        "BENCHMARK = Benchmark(name='mine', load=list, score=exact, source='here')\n"
        "OTHER = 3\n"
    )
    assert benchmark(f"{path}:BENCHMARK").name == "mine"
    with pytest.raises(DataError, match="found int"):
        benchmark(f"{path}:OTHER")


@pytest.mark.parametrize(("name", "told"), [("scene", "scenes"), ("nowhere.jsonl", "nowhere.jsonl")])
def test_a_name_that_nobody_knows_is_told_before_anything_is_asked(model, tmp_path, name, told):
    with pytest.raises(TinyModalError, match=told):
        evaluate(model, ["scenes", name], folder=tmp_path)
    assert not list(tmp_path.iterdir())
    assert issubclass(RecipeError, TinyModalError)


def test_a_bad_row_of_your_own_is_named_by_file_and_row(model, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"image": "gone.png", "question": "what", "answer": "x"}\n')
    with pytest.raises(DataError, match=r"mine\.jsonl:1: .*gone\.png"):
        evaluate(model, [str(path)], folder=tmp_path)


def test_questions_that_cannot_be_asked_are_named_and_counted_and_the_others_are_asked(model, tmp_path):
    """A picture that is not there, one that is broken, a question longer than the model reads."""
    PIL.Image.new("RGB", (24, 24), "red").save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:60])
    rows = [{"image": "red.png", "question": f"which {n}?", "answer": "x"} for n in range(5)]
    rows[1]["image"], rows[3]["image"] = "gone.png", "broken.png"
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = replace(benchmark(str(path)), max_new_tokens=2)
    told = run(few, Engine(model), tmp_path / "out").summary()
    assert (told["n"], told["complete"]) == (3, False)
    assert {kind: one["count"] for kind, one in told["problems"].items()} == {UNREAD: 1, UNREADABLE: 1}
    assert "gone.png" in told["problems"][UNREAD]["named"][0]
    assert "broken.png" in told["problems"][UNREADABLE]["named"][0]
    replies = (tmp_path / "out" / "asked.replies.jsonl").read_text().splitlines()
    assert [json.loads(text)["prompt"].count("which") for text in replies] == [1, 1, 1]
    # Mended, the two are asked and the score is whole.
    for name in ("gone", "broken"):
        PIL.Image.new("RGB", (24, 24), "blue").save(tmp_path / f"{name}.png")
    whole = run(few, Engine(model), tmp_path / "out").summary()
    assert (whole["n"], whole["complete"], whole["problems"]) == (5, True, {})


def test_where_no_question_can_be_asked_the_run_is_refused(model, tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text('{"image": "gone.png", "question": "which?", "answer": "x"}\n')
    with pytest.raises(DataError, match=r"no questions; .*gone\.png"):
        run(benchmark(str(path)), Engine(model), tmp_path / "out")
    gone = Question(Sample((Message("user", (Image(tmp_path / "gone.png"), Text("what"))),), "q"), "x")
    with pytest.raises(DataError, match=r"no question has its picture; 1 questions whose .*gone\.png"):
        run(colours(lambda: [gone]), Engine(model), tmp_path / "out")


def test_results_tell_how_they_were_made(model, tmp_path):
    told = run(colours(max_new_tokens=2), Engine(model), tmp_path, limit=3).summary()
    protocol = told["protocol"]
    assert (protocol["decoding"], protocol["precision"], protocol["source"]) == ("greedy", "float32", "here")
    assert protocol["checkpoint"] == fingerprint(Engine(model))
    assert "what" in protocol["prompt"]
    assert {"torch", "python"} <= set(protocol["versions"])
    assert protocol["image"]["preparation"]
    # Only a part was asked: such a number is no result of the benchmark.
    assert (told["n"], told["limit"], told["complete"]) == (3, 3, False)


# Graded by a language model


class Grader:
    """A judge that gives each reply one grade, but for the questions it leaves open."""

    def __init__(self, value: float, *open_ones: str) -> None:
        self.value, self.open_ones = value, open_ones

    def grade_all(self, judging, asked, problems):
        return [None if q.sample.id in self.open_ones else Score(self.value, "graded") for q, _ in asked]

    def told(self, judging):
        return {}

    def bill(self):
        return "judge: nothing"


def test_replies_without_a_grade_have_no_score_in_their_rows_nor_that_of_an_earlier_judge(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr("tinymodal.infer.engine.Engine", lambda composed: Parrot(model))
    judged = colours(lambda: questions(3), judge=Judging(prompt=lambda *_: [{}], read=exact))
    monkeypatch.setattr("tinymodal.eval.run.benchmarks", lambda *_: [judged])

    def rows(judge=None, limit=None):
        evaluate(model, ["colours"], folder=tmp_path, judge=judge, limit=limit)
        lines = (tmp_path / "colours.replies.jsonl").read_text().splitlines()
        return [(row["score"], row["parsed"]) for row in map(json.loads, lines)]

    assert rows() == [(None, "")] * 3
    assert rows(Grader(0.5)) == [(0.5, "graded")] * 3
    assert rows(Grader(1.0, "q1")) == [(1.0, "graded"), (None, ""), (1.0, "graded")]
    assert rows(Grader(0.25), limit=1) == [(0.25, "graded"), (None, ""), (None, "")]


# Code of the user's own


def test_a_judging_of_your_own_that_fails_costs_no_reply(model, tmp_path):
    judging = Judging(prompt=lambda question, _: [{}[question.sample.id]], read=exact)
    result = run(colours(lambda: questions(3), judge=judging), Parrot(model), tmp_path)
    assert result.problems.counts == {UNGRADED: 3}
    assert len((tmp_path / "colours.replies.jsonl").read_text().splitlines()) == 3


def test_a_scorer_that_fails_is_told_with_benchmark_question_and_reason(model, tmp_path):
    def broken(question, reply):
        return Score(1.0) if question.sample.id != "q2" else {}["colour"]

    with pytest.raises(DataError, match="colours: its scorer fails at question 'q2': KeyError: 'colour'"):
        run(replace(colours(), score=broken), Parrot(model), tmp_path)
    for nothing, shown in ((Score(math.nan), "nan"), (None, "None"), (0.5, "0.5")):
        odd = replace(colours(), score=lambda *_, made=nothing: made)
        with pytest.raises(DataError, match=rf"makes .*{shown}.* of question 'q0'; expected Score"):
            run(odd, Parrot(model), tmp_path / shown)
    with pytest.raises(DataError, match="colours: its numbers over 10 scores fail: ZeroDivisionError"):
        _ = run(replace(colours(), reduce=lambda _: 1 / 0), Parrot(model), tmp_path / "x").numbers


@pytest.mark.parametrize("name", ["../escape", "a/b", "", ".", "..", "a\\b", "a\nb"])
def test_a_benchmark_whose_name_is_no_plain_file_name_is_refused(model, tmp_path, name):
    with pytest.raises(DataError, match="expected one without folders"):
        run(colours(name=name), Parrot(model), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_numbers_are_written_after_each_benchmark_so_that_the_next_may_fail(model, tmp_path, monkeypatch):
    monkeypatch.setattr("tinymodal.infer.engine.Engine", lambda composed: Parrot(model))
    both = [colours(), colours(lambda: [], name="empty")]
    monkeypatch.setattr("tinymodal.eval.run.benchmarks", lambda *_: both)
    with pytest.raises(DataError, match="empty: no questions"):
        evaluate(model, ["colours", "empty"], folder=tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["colours"]["n"] == 10
