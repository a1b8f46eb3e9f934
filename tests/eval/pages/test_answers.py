"""The page to look at answers: complete, self-contained, safe with whatever a model says, and bounded."""

import base64
import hashlib
import io
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.core.errors import DataError
from tinymodal.core.types import Audio, Image, Message, Sample, Text
from tinymodal.eval.benchmark import Benchmark, Problems, Question, Score, by_category
from tinymodal.eval.intervals import mean_sums
from tinymodal.eval.pages import answers as pages
from tinymodal.eval.pages.answers import Rooms, choose, write_page
from tinymodal.eval.pages.style import SCRIPT, Key, told
from tinymodal.eval.results import Answered, Result
from tinymodal.eval.rules.answers import exact

VOID = {"meta", "img", "input"}
EVIL = (
    "</script><script>alert('x')</script><img src=x onerror=alert(1)>\" ' & \ud800 \x00 \u202e שלום 你好 🙂"
)


class Outline(HTMLParser):
    """Tags that were opened, with their attributes, and text that is shown."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text.append(data)

    def of(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


def outline(html):
    found = Outline()
    found.feed(html)
    found.close()
    assert found.open == []
    return found


def answered(name, reply="red", answer="red", kind="colour", value=None, parts=(), **more):
    sample = Sample((Message("user", (*parts, Text("What colour is it?"))),), name)
    question = Question(sample, answer, {"kind": kind} if kind else {})
    score = exact(question, reply) if value is None else Score(value, "half")
    return Answered(question, reply, Score(score.value, score.parsed, question.meta), **more)


def result(rows, name="colours", limit=None, problems=(), protocol=None, **more):
    found = Problems()
    for kind, what in problems:
        found.add(kind, what)
    more = {"reduce": by_category("kind"), "score": exact, "load": list, "source": "a paper"} | more
    benchmark = Benchmark(name=name, **more)
    return Result(benchmark, tuple(rows), limit, "mark", problems=found, protocol=protocol or {})


def written(tmp_path, *results, **more):
    return write_page(tmp_path / "page.html", results, **more).read_text(encoding="utf-8")


def text_of(html):
    return " ".join(" ".join(outline(html).text).split())


def picture(size=(640, 480), colour="red"):
    return Image(PIL.Image.new("RGB", size, colour))


# What the page tells


def test_a_card_shows_picture_question_reply_what_was_understood_truth_and_score(tmp_path):
    html = written(tmp_path, result([answered("q/1", "It is Blue.", "red", parts=(picture(),), value=0.25)]))
    said = text_of(html)
    for shown in ("q/1", "What colour is it?", "It is Blue.", "understood as: half", "right answer: red"):
        assert shown in said
    assert "mostly wrong, score 0.25" in said
    assert [attrs["alt"] for attrs in outline(html).of("img")] == ["picture 1 of question q/1"]


def test_pictures_are_small_jpegs_and_the_questions_own_are_left_as_they_are(tmp_path):
    large, tall, tiny = picture((1000, 500)), picture((100, 640)), picture((24, 24))
    html = written(tmp_path, result([answered("q", parts=(large, tall, tiny))]))
    files = [base64.b64decode(attrs["src"].partition("base64,")[2]) for attrs in outline(html).of("img")]
    opened = [PIL.Image.open(io.BytesIO(file)) for file in files]
    assert [(image.format, image.size) for image in opened] == [
        ("JPEG", (320, 160)),
        ("JPEG", (50, 320)),
        ("JPEG", (24, 24)),
    ]
    assert large.source.size == (1000, 500)


def test_what_cannot_be_read_leaves_a_place_with_its_name(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8nothing")
    parts = (
        Image(tmp_path / "gone.jpg"),
        Image(tmp_path / "broken.jpg"),
        Image(b"no picture"),
        Audio(tmp_path / "gone.wav"),
        Image(tmp_path / ("x" * 300)),
        picture(),
    )
    html = written(tmp_path, result([answered("q", parts=parts)]))
    said = text_of(html)
    told_of = ("gone.jpg is not there", "broken.jpg cannot be read", "picture 3 cannot be read")
    for shown in (*told_of, "gone.wav is not there", "5 of their pictures and sounds could not be read"):
        assert shown in said
    labels = [attrs["aria-label"] for attrs in outline(html).of("div") if attrs.get("role") == "img"]
    assert labels[0] == "picture 1 of question q is not there"
    assert len(labels) == 5
    assert len(outline(html).of("img")) == 1
    assert str(tmp_path) not in html


def test_sounds_are_played_and_what_was_heard_of_a_reply_is_told(tmp_path):
    tone = 0.3 * torch.sin(torch.arange(8_000) * 0.17)
    rows = [answered("q", "red", "blue", parts=(Audio(tone, 16_000),), value=0.5, heard="rat")]
    html = written(tmp_path, result(rows))
    (player,) = outline(html).of("audio")
    assert player["aria-label"] == "sound 1 of question q"
    assert base64.b64decode(player["src"].removeprefix("data:audio/ogg;base64,")).startswith(b"OggS")
    assert "heard: rat" in text_of(html)
    assert "right answer:" not in text_of(html)


def test_more_pictures_than_fit_are_counted(tmp_path):
    html = written(tmp_path, result([answered("q", parts=(picture((8, 8)),) * 11)]))
    assert len(outline(html).of("img")) == 8
    assert "and 3 more pictures" in text_of(html)


def test_the_head_tells_number_interval_questions_and_how_it_was_made(tmp_path):
    rows = [answered(str(i), "red" if i % 4 else "blue") for i in range(100)]
    kept = result(rows, protocol={"decoding": "greedy", "versions": {"torch": "2.14"}}, reduce=lambda s: {})
    official = result(
        rows,
        name="graded",
        metric="F1",
        headline="all.f1",
        report=lambda scores: {"all": {"f1": 85.4321, "TP": 1234}, "words": "left out"},
        sums=mean_sums,
    )
    said = text_of(written(tmp_path, kept, official))
    assert "85.43" in said
    assert "1,234" in said
    low, high = official.interval
    assert f"{low:.4f} to {high:.4f}" in said
    for shown in ("100", "✓ complete", "greedy", '{"torch": "2.14"}', "a paper", "all.f1", "F1: all.f1"):
        assert shown in said


def test_numbers_of_ours_are_in_per_cent_with_the_best_constant_beside(tmp_path):
    rows = [answered(str(i), "red", "red" if i % 4 else "blue") for i in range(8)]
    said = text_of(written(tmp_path, result(rows)))
    assert "colour 75.0 % 75.0 % (red)" in said
    assert "accuracy: mean 75.0 %" in said


def test_an_incomplete_score_is_marked_and_its_problems_are_named(tmp_path):
    problems = [("answers to no question", "answers.jsonl:12"), ("missing answers", "q/7")]
    html = written(tmp_path, result([answered("a")], problems=problems), result([answered("b")], limit=1))
    said = text_of(html)
    for shown in ("✗ incomplete", "1 answers to no question : answers.jsonl:12", "missing answers : q/7"):
        assert shown in said
    assert "✗ first 1 only" in said
    assert "✓ complete" not in said


def test_a_benchmark_without_answers_has_a_head_and_no_cards(tmp_path):
    html = written(tmp_path, result([]), result([], name="again", report=lambda scores: {}, headline="f1"))
    assert outline(html).of("li") == []
    assert "–" in text_of(html)


# Which questions are shown


def keys_of(num, right=0.8, kinds=4):
    return [Key(f"q{i}", int(i % 10 < 10 * right), f"k{i % kinds}") for i in range(num)]


def test_as_many_wrong_as_right_of_every_kind_and_it_says_how_many_of_how_many(tmp_path):
    rows = [answered(f"q{i}", "red" if i % 10 else "blue", kind=f"kind {i % 3}") for i in range(300)]
    html = written(tmp_path, result(rows), cards=40)
    cards = outline(html).of("li")
    assert Counter(card["data-group"] for card in cards) == {"0": 20, "1": 20}
    assert {
        count for count in Counter((card["data-group"], card["data-kind"]) for card in cards).values()
    } == {
        6,
        7,
    }
    said = text_of(html)
    assert "40 of 300 questions are shown: 20 of 30 wrong, 20 of 270 right" in said
    for shown in ("all (40)", "wrong (20)", "right (20)", "kind 0 (14)"):
        assert shown in said


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 5), st.integers(0, 80), st.integers(0, 3))
def test_any_beginning_of_the_choice_is_balanced(num_wrong, num_right, kinds, num, seed):
    groups = [0] * num_wrong + [1] * num_right
    keys = [Key(f"q{i}", group, f"k{i % kinds}") for i, group in enumerate(groups)]
    chosen = choose(keys, num, seed)
    assert len(chosen) == len(set(chosen)) == min(num, len(keys))
    for end in range(len(chosen) + 1):
        counts = Counter(keys[place].group for place in chosen[:end])
        least = min(num_wrong, num_right)
        assert abs(min(counts[0], least) - min(counts[1], least)) <= 1
    for group in (0, 1):
        of_group = Counter(keys[place].kind for place in chosen if keys[place].group == group)
        given = Counter(key.kind for key in keys if key.group == group)
        for kind, other in ((a, b) for a in given for b in given):
            assert of_group[kind] >= min(of_group[other] - 1, given[kind])


def test_the_choice_is_drawn_by_ids_so_that_order_and_other_questions_do_not_matter():
    keys = keys_of(200)
    chosen = [keys[place].id for place in choose(keys, 50)]
    backwards = keys[::-1]
    assert {backwards[place].id for place in choose(backwards, 50)} == set(chosen)
    fewer = [key for key in keys if key.id != chosen[0]]
    assert len({fewer[place].id for place in choose(fewer, 50)} & set(chosen)) == 49
    assert [keys[place].id for place in choose(keys, 50, seed=1)] != chosen


def test_the_same_results_give_the_same_page_to_the_byte(tmp_path):
    results = [result([answered(f"q{i}", parts=(picture(),)) for i in range(5)])]
    first = write_page(tmp_path / "a.html", results).read_bytes()
    assert write_page(tmp_path / "b.html", results).read_bytes() == first


@given(st.lists(st.lists(st.integers(0, 60), max_size=8), max_size=5), st.integers(0, 300))
def test_all_cards_together_stay_within_their_room(parts, most):
    rooms = Rooms(len(parts), most)
    used = 0
    for sizes in parts:
        found = rooms.fill(range(len(sizes)), lambda place, sizes=sizes: "é" * (sizes[place] // 2))
        assert list(found) == sorted(found)
        used += sum(len(card.encode()) for card in found.values())
    assert used <= most


def test_a_page_of_many_large_pictures_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "MAX_BYTES", 300_000)
    noise = Image(PIL.Image.effect_noise((320, 320), 80).convert("RGB"))
    results = [result([answered(f"q{i}", parts=(noise,)) for i in range(30)], name=f"b{n}") for n in range(3)]
    html = written(tmp_path, *results)
    cards = len(outline(html).of("li"))
    assert 3 <= cards < 90
    assert len(html) < 300_000 + 30_000
    for shown in re.findall(r"(\d+) of 30 questions are shown", html):
        assert 0 < int(shown) < 30


def test_long_replies_are_cut_and_say_how_long_they_are(tmp_path):
    html = written(tmp_path, result([answered("q", "word " * 40_000)]))
    assert len(html) < 40_000
    assert "(200,000 characters)" in html


# Safe with anything


def test_whatever_files_and_models_say_is_text_and_not_markup(tmp_path):
    evil = answered(EVIL, EVIL, EVIL, EVIL, parts=(Image(tmp_path / "<b>.jpg"), Text(EVIL)))
    half = answered(EVIL + "2", EVIL, EVIL, "other", value=0.5, heard=EVIL)
    told_of = result(
        [evil, half],
        name=EVIL,
        metric=EVIL,
        source=EVIL,
        problems=[(EVIL, EVIL)],
        protocol={EVIL: EVIL, "more": {EVIL: [EVIL]}},
    )
    official = result([evil], name=EVIL, report=lambda scores: {EVIL: {EVIL: 1.5}}, headline=EVIL)
    html = written(tmp_path, told_of, official, title=EVIL)
    found = outline(html)
    assert len(found.of("script")) == 1
    assert found.of("img") == []
    assert not [attrs for _, attrs in found.tags if any(name.startswith("on") for name in attrs)]
    assert "alert('x')" in " ".join(found.text)
    assert "你好 🙂" in " ".join(found.text)
    assert "\x00" not in html


@given(st.text())
def test_any_text_comes_back_as_it_was_but_for_what_no_page_can_hold(text):
    found = Outline()
    found.feed(f'<i title="{told(text)}">{told(text)}</i>')
    found.close()
    expected = re.sub("[\ud800-\udfff\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]", "?", text)
    assert [tag for tag, _ in found.tags] == ["i"]
    assert found.of("i")[0]["title"] == expected
    assert "".join(found.text) == expected


def test_the_page_names_nothing_outside_itself_and_lets_only_its_own_script_run(tmp_path):
    html = written(tmp_path, *[result([answered("q", parts=(picture(),))], name=f"b{n}") for n in (1, 2)])
    found = outline(html)
    pointed = [attrs[key] for _, attrs in found.tags for key in ("src", "href") if key in attrs]
    assert all(re.match(r"data:image/jpeg;base64,|#b\d$", each) for each in pointed)
    assert not re.search(r"https?:|<link|@import|url\(", html)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert script == SCRIPT
    policy = next(attrs["content"] for attrs in found.of("meta") if "http-equiv" in attrs)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert not re.search(r"\beval\b|innerHTML|Function\(|document\.write", script)


def test_the_page_has_a_dark_side_and_labels_for_all_that_is_pressed(tmp_path):
    html = written(tmp_path, result([answered("a", kind="x"), answered("b", "no", kind="y")]))
    assert "prefers-color-scheme:dark" in html
    assert '<meta name="color-scheme" content="light dark">' in html
    found = outline(html)
    assert [attrs["aria-pressed"] for attrs in found.of("button")] == ["true", "false", "false"]
    assert len(found.of("label")) == len(found.of("select")) + len(found.of("input")) == 2


def test_a_folder_is_no_place_for_a_page(tmp_path):
    with pytest.raises(DataError, match="is a folder; expected the name of a page"):
        write_page(tmp_path, [])


def test_the_script_is_one_that_a_browser_accepts(tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node here")
    (tmp_path / "script.js").write_text(SCRIPT)
    subprocess.run([node, "--check", str(tmp_path / "script.js")], check=True, timeout=60)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_buttons_kinds_and_search_hide_the_other_cards_in_a_browser(tmp_path):
    rows = [answered("a", "red"), answered("b", "Grün, ja", kind="shape"), answered("c", "grün", "grün")]
    html = written(tmp_path, result(rows, name="colours"))
    asks = """
    const shown = () => [...document.querySelectorAll("li.card")].filter(c => c.checkVisibility())
      .map(c => c.querySelector(".id").lastChild.textContent).sort().join("");
    const found = [shown()], [all, wrong, right] = document.querySelectorAll("button");
    const told = () => document.querySelector("output").textContent;
    wrong.click(); found.push(shown(), told(), wrong.getAttribute("aria-pressed"));
    right.click(); found.push(shown());
    all.click();
    const search = document.querySelector("input"), kind = document.querySelector("select");
    const input = () => new Event("input", {bubbles: true});
    const set = (box, value) => { box.value = value; box.dispatchEvent(input()); };
    set(search, " GRÜN "); found.push(shown());
    set(kind, [...kind.options].find(o => o.text.startsWith("shape")).value); found.push(shown());
    document.title = found.join("|");
    """
    # Its own policy would stop a second script.
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    (tmp_path / "page.html").write_text(html.replace("</body>", f"<script>{asks}</script></body>"))
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom")
    done = subprocess.run(
        ["chromium", *flags, f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'page.html'}"],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert "<title>abc|b|1 of 3|true|ac|bc|b</title>" in done.stdout
