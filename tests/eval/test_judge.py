"""A judge is asked once for each verdict, gives up where there is no use, and never shows its key."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.core.errors import DataError, RecipeError
from tinymodal.core.types import Message, Sample, Text
from tinymodal.eval import judge as judges
from tinymodal.eval.benchmark import Benchmark, Judging, Problems, Question, Score
from tinymodal.eval.judge import UNGRADED, UNREAD, Judge
from tinymodal.eval.score import score_answers

KEY = "sk-secret-0123456789"


def completion(text, usage=(100, 3), model="judge-1"):
    told = {"model": model, "choices": [{"message": {"content": text}}]}
    if usage:
        told["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return 200, {}, told


class Endpoint:
    """An OpenAI endpoint on this computer; ``answer(body, number)`` -> (status, headers, value or bytes)."""

    def __init__(self, answer, port=0):
        self.bodies, self.headers, self.times, self.paths = [], [], [], []
        lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
                with lock:
                    endpoint.bodies.append(body)
                    endpoint.headers.append(dict(self.headers))
                    endpoint.times.append(time.monotonic())
                    endpoint.paths.append(self.path)
                    number = len(endpoint.bodies)
                status, headers, told = answer(body, number)
                content = told if isinstance(told, bytes) else json.dumps(told).encode()
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                    for _ in range(5 if told == b"drip" else 0):
                        time.sleep(0.1)
                        self.wfile.write(b" ")
                    while told == b"endless":
                        self.wfile.write(b" " * (1 << 16))
                except OSError:
                    pass  # the judge has gone

            do_GET = do_POST

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        # Looks for the end often: the default half second would be most of a test.
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    @property
    def asked(self):
        """The last message of each request."""
        return [body["messages"][-1]["content"] for body in self.bodies]


def question(i):
    return Question(Sample((Message("user", (Text(f"question {i}"),)),), f"q{i}"), "yes")


def read(question, reply, verdict):
    value = float(verdict)  # a ValueError where it is none
    return Score(value, parsed=verdict)


JUDGING = Judging(prompt=lambda q, reply: [{"role": "user", "content": f"{q.sample.id} {reply}"}], read=read)
ASKED = [(question(i), "hello") for i in range(12)]


def judge(url, folder, **options):
    return Judge(url, **{"folder": folder, "first_wait_s": 0.01, "timeout_s": 5.0, "tries": 3, **options})


def files(folder):
    return "".join(path.read_text() for path in folder.rglob("*") if path.is_file())


def test_replies_are_graded_several_at_once_and_scores_come_in_the_order_of_questions(tmp_path):
    together, most = [], []

    def answer(body, number):
        together.append(1)
        most.append(len(together))
        time.sleep(random.uniform(0.01, 0.05))
        together.pop()
        return completion(re.findall(r"\d+", body["messages"][0]["content"])[0])

    with Endpoint(answer) as endpoint:
        scores = judge(endpoint.url, tmp_path, parallel=4).grade_all(JUDGING, ASKED, problems := Problems())
    assert [score.value for score in scores] == list(range(12))
    assert len(endpoint.bodies) == 12
    assert 2 <= max(most) <= 4
    assert not problems
    assert set(endpoint.paths) == {"/v1/chat/completions"}
    sent = {key: value for key, value in endpoint.bodies[0].items() if key != "messages"}
    assert sent == {"model": "gpt-4", "temperature": 0.0, "max_tokens": 1024}


def test_a_verdict_is_asked_for_once(tmp_path):
    with Endpoint(lambda *_: completion("0.5")) as endpoint:
        first = judge(endpoint.url, tmp_path).grade_all(JUDGING, ASKED, Problems())
        again = judge(endpoint.url, tmp_path)
        assert again.grade_all(JUDGING, ASKED, Problems()) == first
        assert len(endpoint.bodies) == len((tmp_path / "judge.jsonl").read_text().splitlines()) == 12
        assert again.bill() == "judge: no new verdicts, 12 kept in judge.jsonl"
        judge(endpoint.url, tmp_path, model="other").grade(JUDGING, *ASKED[0], Problems())
        assert endpoint.bodies[-1]["model"] == "other"
        warmer = Judging(prompt=JUDGING.prompt, read=read, temperature=0.1)
        judge(endpoint.url, tmp_path).grade(warmer, *ASKED[0], Problems())
        assert len(endpoint.bodies) == 14


def test_the_bill_tells_verdicts_tokens_and_money(tmp_path):
    with Endpoint(lambda _, n: completion("1", None if n == 1 else (1_000, 50))) as endpoint:
        paid = judge(endpoint.url, tmp_path, price=(30.0, 60.0))
        paid.grade_all(JUDGING, ASKED[:3], Problems())
    assert paid.bill() == (
        "judge judge-1: 3 new verdicts; 2,000 tokens of prompts and 100 of replies; cost 0.0660 at 30 and 60 "
        "a million tokens; without those of 1 verdicts that came without their tokens"
    )


def test_an_endpoint_that_is_busy_is_given_the_rest_it_asks_for(tmp_path):
    def answer(body, number):
        return (429, {"Retry-After": "0.3"}, {}) if number == 1 else completion("1")

    with Endpoint(answer) as endpoint:
        scores = judge(endpoint.url, tmp_path, parallel=1).grade_all(JUDGING, ASKED[:2], Problems())
    assert [score.value for score in scores] == [1, 1]
    assert endpoint.times[1] - endpoint.times[0] >= 0.3
    assert len(endpoint.bodies) == 3


def test_retry_after_is_seconds_or_a_date():
    assert judges._retry_after("7") == 7
    assert 50 < judges._retry_after(formatdate(time.time() + 60, usegmt=True)) <= 60
    for nothing in (None, "", "soon", "-3", formatdate(0, usegmt=True)):
        assert judges._retry_after(nothing) == 0


def test_an_endpoint_that_asks_for_an_hour_has_failed(tmp_path, capsys):
    with Endpoint(lambda *_: (429, {"Retry-After": "3600"}, {})) as endpoint:
        scores = judge(endpoint.url, tmp_path, parallel=1).grade_all(JUDGING, ASKED, Problems())
    assert scores == [None] * 12
    assert len(endpoint.bodies) == 1
    assert "asks to come back in 3,600 s" in capsys.readouterr().err


def test_waits_between_tries_grow(tmp_path):
    with Endpoint(lambda *_: (503, {}, {})) as endpoint:
        judge(endpoint.url, tmp_path, tries=4, first_wait_s=0.1).grade(JUDGING, *ASKED[0], Problems())
    gaps = [b - a for a, b in zip(endpoint.times, endpoint.times[1:], strict=False)]
    # Drawn from the upper half of 0.1, 0.2 and 0.4 s.
    assert [gap >= floor for gap, floor in zip(gaps, (0.05, 0.1, 0.2), strict=True)] == [True] * 3


def test_what_was_judged_is_kept_when_the_endpoint_fails_for_good_and_the_rest_goes_on(tmp_path, capsys):
    with Endpoint(lambda _, n: completion("0.5") if n <= 5 else (500, {}, {})) as endpoint:
        problems = Problems()
        scores = judge(endpoint.url, tmp_path, parallel=2, tries=2).grade_all(JUDGING, ASKED, problems)
        num_asked = len(endpoint.bodies)
    assert sum(score is not None for score in scores) == 5
    assert problems.counts == {UNGRADED: 7}
    assert num_asked <= 5 + 2 * (judges.IN_A_ROW + 1), "a dead endpoint is asked about every question"
    said = capsys.readouterr().err.replace("\n", " ")
    assert "7 of 12 replies have no verdict" in said
    assert "HTTP 500" in said
    with Endpoint(lambda *_: completion("0.5"), endpoint.port) as endpoint:
        scores = judge(endpoint.url, tmp_path).grade_all(JUDGING, ASKED, problems := Problems())
        assert len(endpoint.bodies) == 7
    assert [score.value for score in scores] == [0.5] * 12
    assert not problems


@pytest.mark.parametrize(
    "garbage",
    [
        b"<html>",
        b"",
        b"[]",
        b"7",
        b"[" * 100_000,
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": 3}}]}',
    ],
    ids=lambda garbage: garbage[:12].decode(),
)
def test_a_response_that_is_no_completion_is_asked_for_again(tmp_path, garbage):
    with Endpoint(lambda _, n: (200, {}, garbage) if n == 1 else completion("1")) as endpoint:
        assert judge(endpoint.url, tmp_path).grade(JUDGING, *ASKED[0], Problems()) == Score(1.0, parsed="1")
        assert len(endpoint.bodies) == 2


def test_garbage_for_ever_is_named(tmp_path):
    with Endpoint(lambda *_: (200, {}, b"<html>sorry")) as endpoint:
        problems = Problems()
        assert judge(endpoint.url, tmp_path).grade(JUDGING, *ASKED[0], problems) is None
    assert "expected a chat completion, found '<html>sorry'" in problems.named[UNGRADED][0]
    assert not (tmp_path / "judge.jsonl").exists()


@pytest.mark.parametrize("slow", ["first byte", "drip"])
def test_a_slow_endpoint_is_not_waited_for(tmp_path, slow):
    def answer(*_):
        if slow == "drip":
            return 200, {}, b"drip"
        time.sleep(0.4)
        return completion("1")

    with Endpoint(answer) as endpoint:
        problems, started = Problems(), time.monotonic()
        judge(endpoint.url, tmp_path, timeout_s=0.15, tries=2).grade(JUDGING, *ASKED[0], problems)
    assert time.monotonic() - started < 1.2
    assert len(endpoint.bodies) == 2
    assert "no answer within 0.15 s" in problems.named[UNGRADED][0]


def test_a_huge_response_is_not_read_to_its_end(tmp_path):
    with Endpoint(lambda *_: (200, {}, b"endless")) as endpoint:
        problems = Problems()
        judge(endpoint.url, tmp_path).grade(JUDGING, *ASKED[0], problems)
    assert len(endpoint.bodies) == 1
    assert "more than 4,194,304 bytes" in problems.named[UNGRADED][0]


def test_nobody_there_is_told(tmp_path):
    with Endpoint(lambda *_: completion("1")) as endpoint:
        url = endpoint.url
    problems = Problems()
    judge(url, tmp_path).grade(JUDGING, *ASKED[0], problems)
    assert re.search("cannot be reached: .*refused", problems.named[UNGRADED][0])


def test_a_wrong_key_stops_at_once_and_says_where_the_key_is_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    refused = {"error": {"message": f"Incorrect API key provided: {KEY}", "code": "invalid_api_key"}}
    with Endpoint(lambda *_: (401, {}, refused)) as endpoint:
        problems = Problems()
        scores = judge(endpoint.url, tmp_path, parallel=2).grade_all(JUDGING, ASKED, problems)
    assert scores == [None] * 12
    assert len(endpoint.bodies) <= 2
    assert endpoint.headers[0]["Authorization"] == f"Bearer {KEY}"
    said = capsys.readouterr().err.replace("\n", " ")
    assert "the key in OPENAI_API_KEY is refused" in said
    assert KEY not in said + str(problems.told()) + files(tmp_path)


def test_no_key_is_sent_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Endpoint(lambda *_: (401, {}, {})) as endpoint:
        problems = Problems()
        judge(endpoint.url, tmp_path).grade(JUDGING, *ASKED[0], problems)
    assert "Authorization" not in endpoint.headers[0]
    assert "OPENAI_API_KEY is not set" in problems.named[UNGRADED][0]


def test_a_key_that_comes_back_in_a_verdict_is_in_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with Endpoint(lambda *_: completion(f"you sent {KEY}", model=f"m {KEY}")) as endpoint:
        problems = Problems()
        one = judge(endpoint.url, tmp_path, key_from="JUDGE_KEY")
        one.grade(JUDGING, *ASKED[0], problems)
    assert endpoint.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert "you sent ***" in files(tmp_path)
    told = (
        f"{one!r} {one.bill()} {one.told(JUDGING)} {problems.told()} {capsys.readouterr()} {files(tmp_path)}"
    )
    assert KEY not in told


def test_a_key_with_a_line_end_inside_is_refused_without_showing_it(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX: y")
    with pytest.raises(RecipeError, match="OPENAI_API_KEY: holds what no key can") as error:
        judge("http://localhost/v1", tmp_path)
    assert KEY not in str(error.value)


def test_a_redirect_is_not_followed_so_that_the_key_stays_here(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Endpoint(lambda *_: completion("1")) as other:
        with Endpoint(lambda *_: (302, {"Location": other.url}, {})) as endpoint:
            problems = Problems()
            judge(endpoint.url, tmp_path).grade(JUDGING, *ASKED[0], problems)
        assert not other.bodies
    assert f"it is at {other.url}; give that address" in problems.named[UNGRADED][0]


@pytest.mark.parametrize(
    ("status", "told", "sentence"),
    [
        (404, {"error": {"message": "no such model"}}, "no such model: no such address, or no model 'gpt-4'"),
        (429, {"error": {"message": "", "code": "insufficient_quota"}}, "no credit left"),
        (402, {"detail": "pay"}, "no credit left"),
        (403, b"<html>", "HTTP 403: the key"),
    ],
)
def test_what_no_second_try_can_help_stops_the_judge_with_a_sentence(
    tmp_path, status, told, sentence, capsys
):
    with Endpoint(lambda *_: (status, {}, told)) as endpoint:
        scores = judge(endpoint.url, tmp_path, parallel=1).grade_all(JUDGING, ASKED, Problems())
    assert scores == [None] * 12
    assert len(endpoint.bodies) == 1
    assert sentence in capsys.readouterr().err.replace("\n", " ")


def test_a_question_that_is_refused_does_not_keep_the_others_from_being_graded(tmp_path):
    def answer(body, number):
        if body["messages"][0]["content"].startswith("q3 "):
            return 400, {}, {"error": "too long"}
        return completion("1")

    with Endpoint(answer) as endpoint:
        scores = judge(endpoint.url, tmp_path).grade_all(JUDGING, ASKED, problems := Problems())
    assert [i for i, score in enumerate(scores) if score is None] == [3]
    assert len(endpoint.bodies) == 12
    assert re.fullmatch(r"q3: http.*: HTTP 400: too long\.", problems.named[UNGRADED][0])


def test_failures_with_successes_between_do_not_stop_the_judge(tmp_path):
    def answer(body, number):
        return (500, {}, {}) if number % 2 else completion("1")

    with Endpoint(answer) as endpoint:
        one = judge(endpoint.url, tmp_path, parallel=1, tries=1)
        scores = one.grade_all(JUDGING, ASKED, problems := Problems())
    assert len(endpoint.bodies) == 12
    assert sum(score is not None for score in scores) == 6
    assert problems.counts == {UNGRADED: 6}


def test_a_judge_that_has_stopped_tries_again_with_the_next_benchmark(tmp_path):
    with Endpoint(lambda _, n: (404, {}, {}) if n == 1 else completion("1")) as endpoint:
        one = judge(endpoint.url, tmp_path, parallel=1)
        assert one.grade_all(JUDGING, ASKED, Problems()) == [None] * 12
        assert None not in one.grade_all(JUDGING, ASKED, Problems())


def test_an_endpoint_that_refuses_everything_is_not_asked_about_everything(tmp_path):
    many = [(question(i), "hello") for i in range(100)]
    with Endpoint(lambda *_: (400, {}, {})) as endpoint:
        judge(endpoint.url, tmp_path, parallel=4).grade_all(JUDGING, many, Problems())
    assert judges.REFUSED_IN_A_ROW <= len(endpoint.bodies) < judges.REFUSED_IN_A_ROW + 4


def test_a_verdict_that_cannot_be_read_is_asked_for_again_as_mm_vets_scorer_does(tmp_path):
    judging = Judging(prompt=JUDGING.prompt, read=read, again=" A number!")
    with Endpoint(lambda *_: completion("well...")) as endpoint:
        problems = Problems()
        assert judge(endpoint.url, tmp_path).grade(judging, *ASKED[0], problems) is None
        assert [body["temperature"] for body in endpoint.bodies] == [0, 0, 0.5, 1.0, 1.5]
        assert endpoint.asked == ["q0 hello", *["q0 hello A number!"] * 4]
        assert problems.counts == {UNREAD: 1}
        judge(endpoint.url, tmp_path).grade(judging, *ASKED[0], Problems())
        assert len(endpoint.bodies) == 10, "what could not be read is not asked again by the next run"


def test_the_first_verdict_that_can_be_read_counts(tmp_path):
    def answer(body, number):
        return completion(None if number == 1 else "0.25")

    with Endpoint(answer) as endpoint:
        score = judge(endpoint.url, tmp_path).grade(JUDGING, *ASKED[0], Problems())
    assert score.value == 0.25
    assert [body["temperature"] for body in endpoint.bodies] == [0, 0.5]


def test_an_empty_verdict_is_not_kept_and_a_readable_one_behind_it_is_not_asked_for_again(tmp_path):
    with Endpoint(lambda _, number: completion(None if number == 1 else "0.25")) as endpoint:
        for _ in range(2):
            assert judge(endpoint.url, tmp_path).grade(JUDGING, *ASKED[0], Problems()).value == 0.25
        assert len(endpoint.bodies) == 2
        (row,) = map(json.loads, (tmp_path / "judge.jsonl").read_text().splitlines())
        assert (row["verdict"], row["temperature"]) == ("0.25", 0.5)


def test_a_reply_whose_verdicts_could_not_be_read_is_judged_by_the_next_run_and_then_kept(tmp_path):
    with Endpoint(lambda _, number: completion("well..." if number <= 5 else "1")) as endpoint:
        first = judge(endpoint.url, tmp_path)
        assert first.grade_all(JUDGING, ASKED[:1], Problems()) == [None]
        assert first.grade_all(JUDGING, ASKED[:1], Problems()) == [None]
        assert len(endpoint.bodies) == 5, "one run asks twice"
        for _ in range(2):
            assert judge(endpoint.url, tmp_path).grade(JUDGING, *ASKED[0], Problems()).value == 1
        assert len(endpoint.bodies) == 6


def test_verdicts_of_another_endpoint_are_not_taken_for_those_of_this_one(tmp_path):
    with Endpoint(lambda *_: completion("0")) as one, Endpoint(lambda *_: completion("1")) as other:
        grades = [
            judge(each.url, tmp_path).grade(JUDGING, *ASKED[0], Problems()).value
            for each in (one, other, one)
        ]
        assert (len(one.bodies), len(other.bodies)) == (1, 1)
    assert grades == [0, 1, 0]


def test_results_name_who_gave_the_kept_verdicts(tmp_path):
    with Endpoint(lambda *_: completion("1")) as endpoint:
        judge(endpoint.url, tmp_path).grade(JUDGING, *ASKED[0], Problems())
        resumed = judge(endpoint.url, tmp_path)
        assert resumed.told(JUDGING)["answered_by"] == []
        resumed.grade(JUDGING, *ASKED[0], Problems())
        assert resumed.told(JUDGING)["answered_by"] == ["judge-1"]


@pytest.mark.parametrize("given", [KEY, "", "MY KEY", "1KEY", "A=B", "KEY\n"])
def test_what_is_no_variables_name_is_refused_without_showing_it(tmp_path, given):
    with pytest.raises(RecipeError, match="expected the name of the environment variable") as error:
        judge("http://localhost/v1", tmp_path, key_from=given)
    assert KEY not in str(error.value)


def test_a_question_that_lacks_what_a_judge_needs_is_named_and_not_sent(tmp_path):
    def prompt(question, reply):
        if question.sample.id == "q1":
            raise ValueError("no reference answer")
        return JUDGING.prompt(question, reply)

    with Endpoint(lambda *_: completion("1")) as endpoint:
        judging = Judging(prompt=prompt, read=read)
        scores = judge(endpoint.url, tmp_path).grade_all(judging, ASKED[:3], problems := Problems())
    assert [score is None for score in scores] == [False, True, False]
    assert len(endpoint.bodies) == 2
    assert problems.named == {UNGRADED: ["q1: no reference answer"]}


KILLED = """
import sys
from pathlib import Path
from tests.eval.test_judge import ASKED, JUDGING, judge
from tinymodal.eval.benchmark import Problems
judge(sys.argv[1], Path(sys.argv[2]), parallel=2).grade_all(JUDGING, ASKED, Problems())
"""


def test_a_process_killed_while_it_judges_goes_on_with_what_is_not_judged(tmp_path):
    file = tmp_path / "judge.jsonl"

    def answer(body, number):
        if number > 5:
            time.sleep(30)
        return completion("0.5")

    with Endpoint(answer) as endpoint:
        root = Path(__file__).parents[2]
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, endpoint.url, str(tmp_path)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        deadline = time.monotonic() + 60
        while len(endpoint.bodies) < 7 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    lines = file.read_text().splitlines()
    assert len(lines) == 5
    file.write_text("\n".join(lines)[:-20])  # and the last of them only half
    with Endpoint(lambda *_: completion("0.5"), endpoint.port) as endpoint:
        scores = judge(endpoint.url, tmp_path).grade_all(JUDGING, ASKED, problems := Problems())
        assert len(endpoint.bodies) == 12 - 4
    done = {json.loads(line)["question"] for line in lines[:4]}
    assert not done & {asked.split()[0] for asked in endpoint.asked}
    assert [score.value for score in scores] == [0.5] * 12
    assert not problems
    with Endpoint(lambda *_: completion("0.5"), endpoint.port) as endpoint:
        judge(endpoint.url, tmp_path).grade_all(JUDGING, ASKED, Problems())
        assert not endpoint.bodies


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verdicts")
    with Endpoint(lambda *_: completion("0.5 \u2028 \ud800 ¼")) as endpoint:
        judging = Judging(prompt=JUDGING.prompt, read=lambda *_: Score(1.0))
        judge(endpoint.url, folder).grade_all(judging, ASKED[:4], Problems())
    return (folder / "judge.jsonl").read_bytes()


@given(share=st.floats(0, 1))
def test_a_file_cut_anywhere_gives_all_verdicts_before_the_cut(verdicts, tmp_path_factory, share):
    path = tmp_path_factory.mktemp("cut") / "judge.jsonl"
    cut = verdicts[: round(share * len(verdicts))]
    path.write_bytes(cut)
    found = judges._read_verdicts(path)
    num_whole = cut.count(b"\n")
    assert num_whole <= len(found) <= num_whole + 1
    assert set(found.values()) <= {("0.5 \u2028 \ud800 ¼", "judge-1")}
    with path.open("ab") as file:
        file.write(verdicts)
    assert len(judges._read_verdicts(path)) == 4, "a line that was written behind half a line is lost"


@pytest.mark.parametrize("content", ["my notes\n", '{"id": 1}\n', '{"key": "a", "verdict": "1"}\n[]\n'])
def test_a_file_of_somebodys_own_is_left_alone(tmp_path, content):
    (tmp_path / "judge.jsonl").write_text(content)
    with Endpoint(lambda *_: completion("1")) as endpoint:
        with pytest.raises(DataError, match=r"line [12]: expected verdicts of an earlier run"):
            judge(endpoint.url, tmp_path).grade(JUDGING, *ASKED[0], Problems())
        assert not endpoint.bodies
    assert (tmp_path / "judge.jsonl").read_text() == content


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://a.b/v1", "file:///etc/passwd", "https://", "http://a b/v1", "http://[::1/v1",
     "http://host:port/v1", "https://me:pass-word@a.b/v1", "https://a.b/v1?key=pass-word"],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(tmp_path, url):
    with pytest.raises(
        RecipeError, match=r"expected an address such as https://api\.openai\.com/v1"
    ) as error:
        judge(url, tmp_path)
    assert "pass-word" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://api.openai.com/v1/", False),
        ("http://localhost:8000/v1", False),
        ("http://127.1.2.3/v1", False),
        ("http://[::1]:8000/v1/chat/completions", False),
        ("http://judge.example/v1", True),
        ("http://10.0.0.7/v1", True),
    ],
)
def test_a_warning_is_given_once_where_the_key_would_travel_in_the_open(
    tmp_path, monkeypatch, capsys, url, told
):
    monkeypatch.setattr(Judge, "_post", lambda self, *_: judges._Verdict("1", "m", None))
    one = judge(url, tmp_path)
    one.grade(JUDGING, *ASKED[0], Problems())
    one.grade(JUDGING, *ASKED[1], Problems())
    assert capsys.readouterr().err.count("http is not encrypted") == told
    assert one.url.endswith("/v1/chat/completions")
    assert one.url.count("chat") == 1


@pytest.fixture
def opinions():
    """A benchmark of which one reply needs no judge."""
    return Benchmark(
        name="opinions",
        load=lambda: iter(question(i) for i in range(4)),
        score=lambda q, reply: Score(0.25, parsed="plain"),
        source="",
        judge=Judging(
            prompt=lambda q, reply: JUDGING.prompt(q, reply) if reply != "plain" else [], read=read
        ),
    )


@pytest.fixture
def replies(tmp_path):
    path = tmp_path / "replies.jsonl"
    words = ["a", "plain", "b", "c"]
    path.write_text(
        "".join(json.dumps({"id": f"q{i}", "reply": word}) + "\n" for i, word in enumerate(words))
    )
    return path


def test_answers_are_scored_with_a_judge_and_the_results_say_with_which(opinions, replies, tmp_path, capsys):
    out = tmp_path / "out"
    with Endpoint(lambda *_: completion("0.75")) as endpoint:
        result = score_answers(opinions, replies, out, judge=judge(endpoint.url, out, model="mine"))
        assert sorted(endpoint.asked) == ["q0 a", "q2 b", "q3 c"]
    assert [row.score.value for row in result.answered] == [0.75, 0.25, 0.75, 0.75]
    told = json.loads((out / "results.json").read_text())["opinions"]
    assert told["complete"] is True
    assert told["protocol"]["judge"] == {
        "model": "mine",
        "official_model": "gpt-4",
        "answered_by": ["judge-1"],
        "endpoint": endpoint.url + "/chat/completions",
        "wording": "ours, in the official structure",
        "temperature": 0.0,
        "max_tokens": 1024,
    }
    assert "3 new verdicts; 300 tokens of prompts and 9 of replies" in capsys.readouterr().err.replace(
        "\n", " "
    )


def test_without_a_judge_what_needs_none_is_scored_and_the_rest_is_named(opinions, replies, tmp_path, capsys):
    result = score_answers(opinions, replies, tmp_path / "out")
    assert [row.question.sample.id for row in result.answered] == ["q1"]
    assert result.problems.counts == {UNGRADED: 3}
    assert result.summary()["complete"] is False
    assert "3 answers have no score" in capsys.readouterr().err


def test_an_interrupted_judge_asks_nothing_more(tmp_path, monkeypatch):
    def interrupted(question, reply, verdict):
        raise KeyboardInterrupt

    with Endpoint(lambda *_: completion("1")) as endpoint:
        judging = Judging(prompt=JUDGING.prompt, read=interrupted)
        with pytest.raises(KeyboardInterrupt):
            judge(endpoint.url, tmp_path, parallel=1).grade_all(judging, ASKED, Problems())
        assert len(endpoint.bodies) < 12


# Code of the user's own


def graded(opinions, prompt=JUDGING.prompt, reader=read, fallback=False):
    judging = Judging(prompt=prompt, read=reader, fallback=fallback)
    return replace(opinions, judge=judging, problems=Problems())


def test_a_reader_of_your_own_that_fails_loses_nothing_and_its_replies_are_judged_by_the_next_run(
    opinions, replies, tmp_path
):
    def broken(question, reply, verdict):
        return read(question, reply, verdict) if reply != "b" else {}["grade"]

    out = tmp_path / "out"
    with Endpoint(lambda *_: completion("0.75")) as endpoint:
        first = score_answers(graded(opinions, reader=broken), replies, out, judge=judge(endpoint.url, out))
        assert [row.score.value for row in first.answered] == [0.75, 0.75, 0.75]
        assert first.problems.told() == {
            UNGRADED: {"count": 1, "named": ["q2: its judge's read fails at '0.75': KeyError: 'grade'"]}
        }
        assert json.loads((out / "results.json").read_text())["opinions"]["complete"] is False
        assert len(endpoint.asked) == 4  # no second verdict where the same code would fail again
        again = score_answers(graded(opinions, reader=broken), replies, out, judge=judge(endpoint.url, out))
        assert again.problems.counts == {UNGRADED: 1}
        assert endpoint.asked[4:] == ["q2 b"]
        last = score_answers(graded(opinions), replies, out, judge=judge(endpoint.url, out))
        assert [row.score.value for row in last.answered] == [0.75] * 4
        assert not last.problems
        assert len(endpoint.asked) == 5  # what was kept can be read now


@pytest.mark.parametrize(
    ("said", "told"),
    [(0.5, "makes 0.5 of"), (None, "makes None of"), (Score(float("nan")), "makes Score(value=nan")],
)
def test_a_reader_that_makes_no_score_is_told(opinions, replies, tmp_path, said, told):
    with Endpoint(lambda *_: completion("1")) as endpoint:
        made = graded(opinions, reader=lambda *_: said)
        result = score_answers(made, replies, tmp_path / "out", judge=judge(endpoint.url, tmp_path))
    assert (len(result.answered), result.problems.counts) == (0, {UNGRADED: 4})
    assert told in result.problems.told()[UNGRADED]["named"][0]


@pytest.mark.parametrize("prompt", [lambda *_: {}["key"], lambda *_: "words", lambda *_: [{"content": b""}]])
def test_a_prompt_of_your_own_that_fails_is_told_and_not_sent(opinions, replies, tmp_path, prompt):
    with Endpoint(lambda *_: completion("1")) as endpoint:
        for fallback, n in ((False, 0), (True, 4)):
            made = graded(opinions, prompt, fallback=fallback)
            result = score_answers(made, replies, tmp_path / "o", judge=judge(endpoint.url, tmp_path))
            assert (len(result.answered), result.problems.counts) == (n, {UNGRADED: 4})
            assert "q0: its judge's prompt fails: " in result.problems.told()[UNGRADED]["named"][0]
        assert not endpoint.asked
    without = score_answers(graded(opinions, prompt), replies, tmp_path / "o")
    assert (len(without.answered), without.problems.counts) == (0, {UNGRADED: 4})
