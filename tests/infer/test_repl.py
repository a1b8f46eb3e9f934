"""A conversation in the terminal goes on whatever is typed."""

import io
import json

import pytest
import torch

from tests.infer.test_engine import picture
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import DataError
from tinymodal.core.types import Text
from tinymodal.infer.engine import Engine, Sampling
from tinymodal.infer.repl import HELP, Chat, chat

SHORT = Sampling(max_new_tokens=4)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_model())


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "a picture.png"
    picture(1).source.save(path)
    return path


def typed(engine, *lines: str, images=()):
    """What a session with these lines prints: replies, remarks and errors, number of errors."""
    out, err = io.StringIO(), io.StringIO()
    errors = chat(engine, images, SHORT, io.StringIO("".join(f"{line}\n" for line in lines)), out, err)
    return out.getvalue(), err.getvalue(), errors


def test_a_piped_question_prints_the_answer_alone(engine, png):
    out, err, errors = typed(engine, "what is it", images=[png])
    talk = Chat(engine, SHORT)
    talk.show(png)
    assert out == "".join(talk.ask("what is it")) + "\n"
    assert (err, errors) == ("", 0)


def test_the_conversation_is_remembered_and_can_be_forgotten(engine):
    alone, _, _ = typed(engine, "how many")
    out, _, _ = typed(engine, "what is it", "how many", "/reset", "how many")
    replies = out.split("\n")
    assert replies[2] == alone.rstrip("\n")
    talk = Chat(engine, SHORT)
    for question in ("what is it", "how many"):
        list(talk.ask(question))
    assert [message.role for message in talk.messages] == ["user", "assistant"] * 2


def test_a_picture_goes_with_the_next_question_only(engine, png):
    talk = Chat(engine, SHORT)
    talk.show(png)
    talk.show(png)
    list(talk.ask("what"))
    list(talk.ask("where"))
    assert [len(list(m.parts)) for m in talk.messages] == [3, 1, 1, 1]
    assert talk.waiting == []


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("/image nowhere.png", "nowhere.png"),
        ("/image", "/image FILE"),
        ("/save", "/save FILE"),
        ("/save talk.jsonl", "nothing was said"),
        ("/imag x.png", "/imag"),
        ("what is <|im_end|>", "<|im_end|>"),
        ("what is <image>", "<image>"),
    ],
)
def test_a_mistake_is_one_line_and_the_conversation_goes_on(engine, line, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    alone, _, _ = typed(engine, "what is it")
    out, err, errors = typed(engine, line, "what is it")
    assert out == alone
    assert errors == 1
    assert err.startswith("error: ")
    assert named in err
    assert err.count("\n") == 1


def test_a_file_that_is_no_picture_is_refused_when_it_is_shown(engine, tmp_path):
    path = tmp_path / "words.png"
    path.write_text("words")
    _, err, errors = typed(engine, f"/image {path}")
    assert errors == 1
    assert "words.png" in err
    with pytest.raises(DataError):
        typed(engine, "what", images=[path])


def test_a_saved_conversation_is_a_row_that_training_reads(engine, png, tmp_path):
    from tinymodal.data.sources import open_source

    kept = tmp_path / "talk.jsonl"
    _, err, errors = typed(
        engine, f"/image '{png}'", "what is it", "how many", f"/save {kept}", f"/save {kept}"
    )
    assert errors == 0
    assert str(kept) in err
    rows = open_source(kept, "messages")
    assert len(rows) == 2
    sample = rows.sample(0)
    assert [message.role for message in sample.messages] == ["user", "assistant"] * 2
    assert [image.source for image in sample.media()] == [png]
    assert json.loads(kept.read_text().splitlines()[0])["messages"][0]["content"][1]["text"] == "what is it"


def saved(engine, monkeypatch, path, replies, *lines):
    """Type ``lines`` (the questions among them get ``replies``) and save; the samples, and what was said."""
    from tinymodal.data.sources import open_source

    texts = iter(replies)

    def stream(*_):
        text = next(texts)
        yield text.removesuffix("^C")
        if text.endswith("^C"):
            raise KeyboardInterrupt

    monkeypatch.setattr(engine, "stream", stream)
    _, err = at_the_terminal(engine, monkeypatch, *lines, f"/save {path}")
    if not path.exists():
        return None, err
    rows = open_source(path, "messages")
    return [rows.sample(i) for i in range(len(rows))], err


def words(sample):
    return [p.text for m in sample.messages for p in m.parts if isinstance(p, Text)]


@pytest.mark.parametrize("bad", ["", "re^C", "^C", "a <image>", "a <|im_end|> b"])
def test_what_training_would_refuse_is_left_out_of_a_saved_conversation(engine, monkeypatch, tmp_path, bad):
    path = tmp_path / "talk.jsonl"
    replies = ("red", bad, "two")
    (sample,), err = saved(engine, monkeypatch, path, replies, "what is it", "and this", "how many")
    assert words(sample) == ["what is it", "red", "how many", "two"]
    engine.encoder(sample)
    told = [line for line in err.splitlines() if line.startswith("left out")]
    assert len(told) == 1
    assert "'and this'" in told[0]
    assert f"written to {path}" in err


def test_a_picture_of_a_question_that_is_left_out_goes_with_the_next(engine, monkeypatch, tmp_path, png):
    path = tmp_path / "talk.jsonl"
    lines = (f"/image {png}", "what is it", "how many")
    (sample,), _ = saved(engine, monkeypatch, path, ("re^C", "two"), *lines)
    assert [image.source for image in sample.media()] == [png]
    assert words(sample) == ["how many", "two"]


def test_a_conversation_of_which_nothing_is_left_is_not_saved(engine, monkeypatch, tmp_path):
    samples, err = saved(engine, monkeypatch, tmp_path / "talk.jsonl", ("",), "what is it")
    assert samples is None
    assert "error: nothing to save" in err


def test_help_lists_every_command_and_quit_leaves(engine):
    out, err, _ = typed(engine, "/help", "/quit", "what is it")
    assert out == ""
    assert err.strip() == HELP
    for command in ("/image", "/reset", "/save", "/help", "/quit"):
        assert command in HELP


def test_a_conversation_that_is_too_long_says_so_and_is_kept():
    engine = Engine(tiny_model(max_position_embeddings=40))
    out, _, errors = typed(engine, "what", "what " * 40, "/reset", "what")
    assert errors == 1
    assert out.split("\n")[0] == out.split("\n")[1]


def test_stopping_a_reply_keeps_what_was_said(engine, monkeypatch):
    talk = Chat(engine, SHORT)

    def stream(*_):
        yield "red"
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "stream", stream)
    with pytest.raises(KeyboardInterrupt):
        list(talk.ask("what"))
    assert talk.messages[-1].parts[0].text == "red"


def test_stopping_while_a_piece_is_printed_keeps_what_was_said(engine, monkeypatch):
    """Most of the time between two pieces is the printing's."""

    class Out(io.StringIO):
        def write(self, text):
            if text == "circle":
                raise KeyboardInterrupt
            return super().write(text)

    asked = []
    monkeypatch.setattr(
        engine, "stream", lambda sample, _: asked.append(sample) or iter(("red ", "circle", "s"))
    )
    with pytest.raises(KeyboardInterrupt):  # of a pipe, whose conversation ends here
        chat(engine, (), SHORT, io.StringIO("what\n"), Out(), io.StringIO())
    talk = Chat(engine, SHORT)
    pieces = talk.ask("what")
    assert [next(pieces), next(pieces)] == ["red ", "circle"]
    pieces.close()
    assert talk.messages[-1].parts[0].text == "red circle"


def at_the_terminal(engine, monkeypatch, *events):
    """What is printed where each event is a typed line, or an exception that ``input`` raises."""
    lines = iter([*events, EOFError])

    def typing(prompt):
        event = next(lines)
        if isinstance(event, str):
            return event
        raise event

    monkeypatch.setattr("builtins.input", typing)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    out, err = io.StringIO(), io.StringIO()
    chat(engine, (), SHORT, terminal, out, err)
    return out.getvalue(), err.getvalue()


def test_stopping_a_reply_at_the_terminal_is_remembered(engine, monkeypatch):
    asked = []

    def stream(sample, _):
        asked.append(sample)
        yield "red"
        if len(asked) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine, "stream", stream)
    out, _ = at_the_terminal(engine, monkeypatch, "what is it", "how many")
    assert "red (stopped)" in out
    assert [message.parts[-1].text for message in asked[1].messages] == ["what is it", "red", "how many"]


def test_ctrl_c_takes_back_the_lines_of_an_unfinished_question(engine, monkeypatch):
    asked = []
    monkeypatch.setattr(engine, "stream", lambda sample, _: asked.append(sample) or iter(("red",)))
    at_the_terminal(engine, monkeypatch, "forget this\\", KeyboardInterrupt, "what is it")
    assert [sample.messages[0].parts for sample in asked] == [(Text("what is it"),)]


def test_streamed_pieces_are_printed_as_they_come(engine, monkeypatch):
    """Flushed piece by piece: nobody waits for the whole answer."""

    class Out(io.StringIO):
        flushed = 0

        def flush(self):
            Out.flushed += 1

    out = Out()
    monkeypatch.setattr(engine, "stream", lambda *_: iter(("a ", "red ", "circle")))
    chat(engine, (), SHORT, io.StringIO("what\n"), out, io.StringIO())
    assert out.getvalue() == "a red circle\n"
    assert Out.flushed >= 3


def test_torch_is_not_asked_for_gradients(engine):
    list(Chat(engine, SHORT).ask("what"))
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in engine.model.parameters())


def test_a_question_of_several_lines_is_one_question(engine):
    """Data often asks on several lines; what was trained so must be asked so."""
    talk = Chat(engine, SHORT)
    whole = "".join(talk.ask("what is it\nin one word"))
    out, _, errors = typed(engine, "what is it\\", "in one word")
    assert (out, errors) == (f"{whole}\n", 0)
    assert talk.messages[0].parts == (Text("what is it\nin one word"),)
