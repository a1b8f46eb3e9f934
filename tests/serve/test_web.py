"""The web chat without a browser: what is asked, what is refused, and who may ask. In one: tests/browser."""

import asyncio
import html
import re
import sys
import time
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

gr = pytest.importorskip("gradio", reason="an extra of its own: pip install 'tinymodal[serve]'")
from starlette.testclient import TestClient  # noqa: E402

from tinymodal.compose.build import load  # noqa: E402
from tinymodal.core.errors import RecipeError  # noqa: E402
from tinymodal.core.types import Audio, Image, Message, Sample, Text  # noqa: E402
from tinymodal.infer.engine import Engine  # noqa: E402
from tinymodal.infer.scheduler import Scheduler  # noqa: E402
from tinymodal.serve import web  # noqa: E402
from tinymodal.serve.app import Served, create_app  # noqa: E402
from tinymodal.serve.errors import ApiError  # noqa: E402
from tinymodal.serve.gate import Key  # noqa: E402
from tinymodal.serve.limits import Limits  # noqa: E402
from tinymodal.serve.web_examples import PARTY, examples_of  # noqa: E402
from tinymodal.serve.web_explain import explained  # noqa: E402
from tinymodal.serve.web_turns import REFUSED, Settings, answer, conversation  # noqa: E402

GREEDY = Settings(64, 0, 1, 0, 0, 1, 0)


@cache
def engine() -> Engine:
    return Engine(load("starter"))


@pytest.fixture(scope="module")
def served():
    scheduler = Scheduler(engine(), max_rows=4, max_waiting=4)
    yield Served(engine(), scheduler, "starter", limits=Limits(request_s=30))
    scheduler.close(drain=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return examples_of(tmp_path_factory.mktemp("examples"), sees=True, hears=True)


def said(role: str, *content: object, **metadata: str) -> dict:
    """A message as gradio's chatbot gives it."""
    parts = [
        {"type": "file", "file": {"path": str(part)}}
        if isinstance(part, Path)
        else {"type": "text", "text": part}
        for part in content
    ]
    return {"role": role, "content": parts, "metadata": metadata or None}


def ask(served: Served, text: str, *files: object, history=(), settings: Settings = GREEDY) -> list:
    async def pieces() -> list:
        message = {"text": text, "files": [str(file) for file in files]}
        return [shown async for shown in answer(served, message, list(history), settings)]

    return asyncio.run(pieces())


# Conversations


def test_what_the_page_shows_is_what_the_model_reads(served, made):
    picture, sound = Path(made[0].picture), Path(made[-1].sound)
    history = [
        said("user", picture, "What colour is the star?"),
        said("assistant", "blue"),
        said("user", picture.with_name("broken.png"), "And <image>?"),
        said("assistant", "no words of this", title=REFUSED),
        said("user", "This was stopped before its first word."),
    ]
    found = conversation(served, {"text": "Where?", "files": [str(sound)]}, history)
    roles = [(message.role, [type(part).__name__ for part in message.parts]) for message in found.messages]
    assert roles == [
        ("user", ["Image", "Text"]),
        ("assistant", ["Text"]),
        ("user", ["Audio", "Text", "Text"]),
    ]
    assert [part.text for part in found.messages[2].parts if isinstance(part, Text)] == [
        "This was stopped before its first word.", "Where?",
    ]  # fmt: skip
    (shown,) = (part for part in found.messages[0].parts if isinstance(part, Image))
    assert shown.source.size == (96, 96)
    (heard,) = (part for part in found.messages[2].parts if isinstance(part, Audio))
    assert len(heard.source) > 16_000


@pytest.mark.parametrize(
    ("limits", "text", "files", "reason"),
    [
        ({}, "  ", 0, "There is no question"),
        ({}, "", 1, "There is no question"),
        ({"pictures": 1}, "What?", 2, "may have 1 files"),
        ({"pixels": 9_000}, "What?", 1, "too large"),
        ({"characters": 4}, "What?", 1, "longer than 4 characters"),
    ],
)
def test_more_than_the_limits_allow_is_refused_in_a_sentence(served, made, limits, text, files, reason):
    small = Served(served.engine, served.scheduler, "starter", limits=Limits(**limits))
    with pytest.raises(ApiError) as caught:
        conversation(small, {"text": text, "files": [made[0].picture] * files}, [])
    assert reason in caught.value.message
    assert "/" not in caught.value.message


def test_a_file_that_is_gone_or_broken_is_told_without_its_place(served, tmp_path):
    broken = tmp_path / "holiday.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    for path, reason in ((broken, "holiday.png"), (tmp_path / "gone.png", "is gone")):
        (shown,) = ask(served, "What?", path)
        (refusal,) = shown
        assert refusal["metadata"]["title"] == REFUSED
        assert reason in refusal["content"]
        assert str(tmp_path) not in refusal["content"]


def test_only_what_was_uploaded_is_read(served, made, tmp_path):
    """A page that somebody wrote himself may name any file: a picture of the server's is none of his."""
    picture = Path(made[0].picture)
    forged = said("user")
    forged["content"] = [{"type": "component", "component": "image", "value": {"path": str(picture)}}]
    asked = {"text": "What?", "files": []}
    for history, message in (([forged], asked), ([], {**asked, "files": [str(picture)]})):
        assert conversation(served, message, history, picture.parent).messages[-1].parts
        for root in (tmp_path, picture.parent / "uploads"):
            with pytest.raises(ApiError, match="is gone"):
                conversation(served, message, history, root)
    (tmp_path / "link.png").symlink_to(picture)
    with pytest.raises(ApiError, match="is gone"):
        conversation(served, {**asked, "files": [str(tmp_path / "link.png")]}, [], tmp_path)
    assert 'role="alert"' in explained(served, str(picture), None, "What?", False, tmp_path)


def test_a_server_that_is_asked_to_end_takes_no_question(served):
    leaving = Served(served.engine, served.scheduler, "starter")
    leaving.doors.closing = True
    (refusal,) = ask(leaving, "Hello")[-1]
    assert "shutting down" in refusal["content"]


# Answers


def test_an_answer_grows_and_ends_as_the_engines(served, made):
    picture = made[1].picture
    sample = Sample((Message("user", (Image(Path(picture)), Text("What do you see?"))),), "test")
    whole = engine().reply([sample])[0].text
    shown = [texts[0] for texts in ask(served, "What do you see?", picture)]
    assert shown[-1] == whole
    assert len(set(shown)) > 4
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))


def test_an_answer_is_spoken_at_its_end(served, made):
    shown = ask(
        served, made[0].question, made[0].picture, settings=Settings(64, 0, 1, 0, 0, 1, 0, True, "en+m4")
    )
    text, (rate_hz, samples) = shown[-1]
    assert text == "blue"
    assert rate_hz == 16_000
    assert 0.2 < len(samples) / rate_hz < 3
    assert abs(samples.astype(int)).max() > 1_000
    (refusal,) = ask(served, "Hello", settings=Settings(64, 0, 1, 0, 0, 1, 0, True, "nobody"))[-1]
    assert "nobody" in refusal["content"]


def test_who_stops_listening_frees_the_place(served):
    before = served.scheduler.stats().cancelled

    async def one_piece() -> None:
        pieces = answer(served, {"text": "Who are you?", "files": []}, [], Settings(2000, 2, 1, 0, 0, 1, 5))
        await anext(pieces)
        await pieces.aclose()

    asyncio.run(one_piece())
    end = time.monotonic() + 20
    while served.scheduler.stats().rows and time.monotonic() < end:
        time.sleep(0.02)
    assert served.scheduler.stats().rows == 0
    assert served.scheduler.stats().cancelled == before + 1


def test_settings_are_those_of_the_controls_and_no_longer_than_the_limit():
    chosen = Settings.of([True, "anna", 512, 0.7, None, 5, None, 1.2, None])
    assert chosen == Settings(512, 0.7, 0.0, 5, 0.0, 1.2, 0, True, "anna")
    assert Settings(512, 0.7, 0.9, 5, 0, 1.2, 3).sampling(100).max_new_tokens == 100
    with pytest.raises(ValueError, match="top_p"):
        chosen.sampling(100)


def test_numbers_that_make_no_sense_are_refused_in_the_chat(served):
    (refusal,) = ask(served, "Hello", settings=Settings(64, 0.7, 0.0, 0, 0, 1, 0))[-1]
    assert "top_p" in refusal["content"]


# Explaining


def test_the_tab_shows_the_page_of_explain_in_a_closed_frame(served, made):
    shown = explained(served, made[0].picture, None, made[0].question, hide=False)
    assert shown.startswith('<iframe class="explained"')
    assert 'sandbox=""' in shown
    page = html.unescape(re.search(r'srcdoc="([^"]*)"', shown)[1])
    assert page.startswith("<!doctype html>")
    assert "“blue”" in page
    assert "needed" not in page
    refused = explained(served, None, None, "<b> ", hide=False)
    assert "&lt;b&gt;" in refused or "role=" not in refused
    assert 'role="alert"' in explained(served, made[0].picture, None, "", hide=True)


# The page


def test_examples_are_made_and_the_starter_answers_them_rightly(served, made):
    assert [(example.question, example.sound is not None) for example in made] == [
        ("What colour is the star?", False),
        ("What do you see?", False),
        ("How many squares are there?", False),
        ("", True),
    ]
    answers = [ask(served, example.question, *example.files)[-1][0] for example in made]
    assert answers[0] == "blue"
    assert all(thing.name in answers[1] for thing in PARTY if thing.what == "shape")
    assert answers[2:] == ["3", "right"]


def test_a_model_of_text_alone_has_no_examples_with_files(tmp_path):
    assert examples_of(tmp_path, sees=False, hears=False) == []
    assert list(tmp_path.iterdir()) == []
    (heard,) = examples_of(tmp_path, sees=False, hears=True)
    assert heard.files == [heard.sound]


def client(served: Served, key: str | None = None) -> TestClient:
    served = Served(served.engine, served.scheduler, "starter", key=None if key is None else Key.of(key))
    return TestClient(web.mount(create_app(served), served), base_url="http://localhost")


def test_the_page_stands_beside_the_api_and_reaches_nothing_else(served):
    page = client(served)
    answer = page.get("/")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    # What a browser would load of its own accord.
    for kind, attribute in (("script", "src"), ("link", "href"), ("img", "src")):
        for tag in re.findall(rf"<{kind}[^>]*>", answer.text):
            place = re.search(rf'{attribute}="([^"]*)"', tag)
            assert (
                place is None or not place[1].startswith(("http:", "https:", "//")) or "localhost" in place[1]
            ), tag
    assert page.get("/v1/models").json()["data"][0]["id"] == "starter"
    assert page.get("/gradio_api/file=/etc/passwd").status_code in (403, 404)


def test_who_does_not_know_the_key_sees_no_page(served):
    page = client(served, key="secret")
    assert page.get("/config").status_code == 401
    assert page.post("/gradio_api/upload", files={"files": b"x"}).status_code == 401
    assert page.post("/login", data={"username": "me", "password": "wrong"}).status_code == 400
    assert page.post("/login", data={"username": "me", "password": "secret"}).status_code == 200
    assert page.get("/config").status_code == 200


def test_addresses_are_not_fetched_by_the_server(served, monkeypatch):
    component = web._local(gr.Image(type="filepath"))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("fetched")

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", never)
    with pytest.raises(gr.Error, match="not fetched"):
        asyncio.run(component.async_move_resource_to_block_cache("http://localhost/picture.png"))


def test_every_part_of_the_page_that_takes_files_takes_no_addresses(served):
    page = web.chat_page(served)
    takers = [
        part
        for part in page.blocks.values()
        if isinstance(part, gr.MultimodalTextbox | gr.Chatbot | gr.Image | gr.Audio)
    ]
    asking = {dependency_input._id for fn in page.fns.values() for dependency_input in fn.inputs}
    for part in takers:
        if part._id in asking:
            assert "async_move_resource_to_block_cache" in vars(part), part


def test_every_answer_can_be_stopped_also_that_to_a_changed_question(served):
    functions = web.chat_page(served).fns
    stops = [fn for fn in functions.values() if any(event == "stop" for _, event in fn.targets)]
    stopped = {cancelled for fn in stops for cancelled in fn.cancels}

    def cause(number: int) -> str:
        fn = functions[number]
        return cause(fn.trigger_after) if fn.trigger_after is not None else fn.targets[0][1]

    assert {cause(number) for number in stopped} == {"submit", "retry", "edit"}
    # And the button is there: what shows it comes right after the question was changed.
    shown = [fn for fn in functions.values() if fn.trigger_after is not None and cause(fn._id) == "edit"]
    assert any(isinstance(part, gr.MultimodalTextbox) for fn in shown for part in fn.outputs)


def test_without_gradio_the_option_says_what_to_install(served, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(RecipeError, match=r"pip install 'tinymodal\[serve\]'"):
        web.mount(create_app(served), served)
