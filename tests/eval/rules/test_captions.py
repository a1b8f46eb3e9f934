"""CIDEr and BLEU are those of pycocoevalcap 1.2, and captions become the words that its Java code makes."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.eval.rules.captions import DROPPED, Cider, bleu, words

REFERENCES = {
    "a1": [
        "A bottle of Jack Daniel's No. 7 on a bar.",
        "A square bottle of whiskey says Jack Daniel's.",
        "Bottle of Tennessee whiskey, 40% alc., next to a glass.",
        'A black-labelled bottle of "Jack Daniel\'s" (Old No. 7).',
        "A bottle that says Jack Daniel's on it",
    ],
    "b2": [
        "A red STOP sign that's partly hidden by a tree.",
        "A stop sign at St. John Ave.",
        "The sign says STOP, but it can't be seen well.",
        "Red octagonal sign with the word stop.",
        "A street sign says St. John Ave",
    ],
    "c3": [
        "A digital clock shows 10:30 a.m.",
        "The clock radio reads 10:30!",
        "An alarm clock with 10:30 on the display",
        "A clock on a night stand says it's 10:30.",
        "Someone's clock showing the time: 10:30",
    ],
    "d4": [
        "A can of Dr. Pepper costs $1.99 at the store.",
        "Cans of soda are on sale for $1.99",
        "A 12-pack of Dr. Pepper, $1.99 each...",
        "A store shelf with soda cans; one says Dr. Pepper.",
        "Soda for sale",
    ],
    "e5": [
        "Two baseball players, one is wearing number 23.",
        "A player in the U.S.A. jersey with 23 on the back",
        "The batter wears #23.",
        "A man wearing the number 23 swings a bat.",
        "Player number 23 at bat",
    ],
}
CAPTIONS = {
    "a1": "A bottle of Jack Daniel's No. 7 is on a table.",
    "b2": "A stop sign on St. John Ave.",
    "c3": "A clock that says it isn't 10:30 a.m. yet",
    "d4": "A can of Dr. Pepper for $1.99",
    "e5": "A baseball player wearing the number 23 on his U.S.A. jersey.",
}
# What pycocoevalcap 1.2 from PyPI made of these captions, over its stanford-corenlp-3.4.1.jar (OpenJDK 17):
# PTBTokenizer, then Cider().compute_score and Bleu(4).compute_score, of all five and of three of them.
OFFICIAL = {
    ("a1", "b2", "c3", "d4", "e5"): (
        [3.2060116262937353, 1.9165955101871592, 1.0477909658806215, 2.3034966899971505, 1.4878749339725241],
        [0.8333333332986111, 0.7098422141215877, 0.570456712925714, 0.4605863182914322],
    ),
    ("a1", "c3", "e5"): (
        [3.245242632856587, 1.000519459942629, 1.4718877282216187],
        [0.7878787878310378, 0.6482299130322616, 0.49933819408999464, 0.42003075586162025],
    ),
}
WORDS = st.lists(st.sampled_from("abcd"), max_size=8).map(tuple)


@pytest.mark.parametrize("names", OFFICIAL)
def test_cider_and_bleu_are_the_official_ones_to_the_last_digits(names):
    made = {name: words(CAPTIONS[name]) for name in names}
    written = {name: [words(one) for one in REFERENCES[name]] for name in names}
    cider = Cider(written)
    ciders, bleus = OFFICIAL[names]
    assert [cider.score(name, made[name]) for name in names] == pytest.approx(ciders, rel=1e-13)
    assert bleu([*made.values()], [*written.values()]) == pytest.approx(bleus, rel=1e-13)


@pytest.mark.parametrize(
    ("caption", "java"),
    [
        # Right: what PTBTokenizer 3.4.1 -lowerCase made of it, without the marks that pycocoevalcap drops.
        (
            "Bottle of Tennessee whiskey, 40% alc., next to it.",
            "bottle of tennessee whiskey 40 % alc. next to it",
        ),
        ("The sign says 'STOP', but it can't be seen", "the sign says stop but it ca n't be seen"),
        (
            "JOE'S boys' o'clock I'm They've could've y'all",
            "joe 's boys o'clock i 'm they 've could 've y' all",
        ),
        ("cannot gonna 'tis ’s", "can not gon na 't is 's"),
        ("Mr. Smith, No. 7 and no. He", "mr. smith no. 7 and no he"),
        (
            "U.S. u.s.a Ph.D. J.K. Rowling a.m. St. John sun.",
            "u.s. u.s.a ph.d. j.k. rowling a.m. st. john sun",
        ),
        (
            "number 7. 10:30am 2,000 .5 1/2 5pm 21st 7-up 1980's",
            "number 7 10:30 am 2,000 .5 1/2 5pm 21st 7-up 1980 's",
        ),
        ("$5.00 £5 5€ 50¢ #1 #tag 50%", "$ 5.00 # 5 5 $ 50 cents # 1 #tag 50 %"),
        ("(a) [b] {c} & R&B a&b", "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb- & r&b a & b"),
        ("“smart” ‘single’ word—word 5–6 x… wow!! ok?", "smart single word word 5 6 x wow !! ok"),
        ("dash-word dash - word w/o w/ and/or 24/7", "dash-word dash word w/o w / and/or 24/7"),
        ("www.foo.com amazon.com, you@me.org @home", "www.foo.com amazon.com you@me.org @home"),
        ("Coke® 5°C 3½ cups * ** _ 😀 naïve", "coke ® 5 ° c 3 1/2 cups * ** _ naïve"),
        ("the letter A. The letter b. is", "the letter a the letter b. is"),
        ("bull's-eye gov't rd. 'em '90s", "bull 's eye gov t rd. 'em '90s"),
        ("", ""),
        (" \n\t", ""),
    ],
)
def test_words_are_those_of_the_official_java(caption, java):
    assert " ".join(words(caption)) == java


@given(st.text())
def test_words_are_in_lower_case_and_hold_neither_spaces_nor_marks(caption):
    found = words(caption)
    assert all(word and word == word.lower() and not word.isspace() for word in found)
    assert not DROPPED & set(found)


@given(st.lists(st.from_regex(r"[a-z]{3,9}", fullmatch=True)))
def test_plain_words_stay_as_they_are(plain):
    split = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me"}
    split["lemme"] = "lem me"
    assert " ".join(words(" ".join(plain))) == " ".join(split.get(word, word) for word in plain)


def test_a_very_long_caption_does_not_take_long():
    start = time.perf_counter()
    for text in ("." * 20_000, "a." * 10_000, "a-" * 10_000, "don't " * 4_000, "<" * 20_000, "1," * 10_000):
        words(text)
    assert time.perf_counter() - start < 5  # 0.2 s


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3), WORDS)
def test_cider_is_from_0_to_10_and_the_same_for_references_in_any_order(caption, written, other):
    value = Cider({"x": written, "y": [other]}).score("x", caption)
    assert -1e-9 <= value <= 10 + 1e-9
    assert Cider({"x": written[::-1], "y": [other]}).score("x", caption) == pytest.approx(value)


def test_a_caption_that_equals_every_reference_has_all_points():
    written = {"x": [words("A red stop sign on a pole")] * 5, "y": [words("Two dogs in the green grass")] * 5}
    assert Cider(written).score("x", words("a red stop sign on a pole.")) == pytest.approx(10)
    assert bleu([written["x"][0]], [written["x"]]) == pytest.approx([1, 1, 1, 1])


def test_repeating_a_right_word_does_not_help():
    written = {"x": [words("a red sign")] * 2, "y": [words("two dogs here")] * 2}
    once, often = (Cider(written).score("x", words(text)) for text in ("sign", "sign sign sign sign"))
    assert often <= once
    assert bleu([words("sign sign sign")], [written["x"]])[0] == pytest.approx(1 / 3)


def test_a_short_caption_pays_for_its_length():
    reference = words("a red stop sign on a tall pole")
    assert bleu([words("a red stop sign")], [[reference]])[0] == pytest.approx(0.36787944)  # exp(1 - 8 / 4)


def test_a_caption_without_words_scores_nothing_and_divides_by_nothing():
    written = {"x": [words("a sign")], "y": [words("two dogs")]}
    assert Cider(written).score("x", ()) == 0
    assert bleu([()], [written["x"]]) == pytest.approx([0, 0, 0, 0])
