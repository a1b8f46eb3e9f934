"""A conversation in the terminal goes on whatever is typed."""

import io
import json
from types import SimpleNamespace

import pytest
import soundfile
import torch

from tests.infer.test_engine import Hum, picture, speaking
from tests.model.test_hearing import RATE_HZ, sound
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import CheckpointError, DataError
from tinymodal.core.types import Audio, Image, Text
from tinymodal.infer.engine import Engine, Sampling, TextDelta
from tinymodal.infer.recording import Recording
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


@pytest.fixture(scope="module")
def ears() -> Engine:
    return Engine(tiny_model(audio="tinymodal_ear"))


@pytest.fixture(scope="module")
def mouth() -> Engine:
    """It speaks in two voices, and in that of a clip."""

    class Low(Hum):
        """As quiet as a sound is."""

        def stream(self):
            loud = super().stream()
            return SimpleNamespace(
                feed=lambda codes: loud.feed(codes) / 100, finish=lambda: loud.finish() / 100
            )

    engine = speaking(voices=("ann", "bob"), reference=4)
    engine.composed.codec = Low()
    return engine


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "a sound.wav"
    soundfile.write(path, sound(0.7).numpy(), RATE_HZ)
    return path


def typed(engine, *lines: str, images=(), sounds=(), **how):
    """What a session with these lines prints: replies, remarks and errors, number of errors."""
    out, err = io.StringIO(), io.StringIO()
    media = (*map(Image, images), *map(Audio, sounds))
    errors = chat(engine, media, SHORT, io.StringIO("".join(f"{line}\n" for line in lines)), out, err, **how)
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
        ("/audio nowhere.wav", "nowhere.wav"),
        ("/audio", "/audio FILE"),
        ("/voice", "/voice NAME"),
        ("/speak a.wav", "no speech head"),
        ("/voice ann", "no speech head"),
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
        yield TextDelta(text.removesuffix("^C"))
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
    for command in ("/image", "/audio", "/speak", "/voice", "/reset", "/save", "/help", "/quit"):
        assert command in HELP


def test_a_conversation_that_is_too_long_says_so_and_is_kept():
    engine = Engine(tiny_model(max_position_embeddings=40))
    out, _, errors = typed(engine, "what", "what " * 40, "/reset", "what")
    assert errors == 1
    assert out.split("\n")[0] == out.split("\n")[1]


def test_stopping_a_reply_keeps_what_was_said(engine, monkeypatch):
    talk = Chat(engine, SHORT)

    def stream(*_):
        yield TextDelta("red")
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
        engine, "stream", lambda sample, _: asked.append(sample) or map(TextDelta, ("red ", "circle", "s"))
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
    monkeypatch.setattr(out, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    chat(engine, (), SHORT, terminal, out, err)
    return out.getvalue(), err.getvalue()


def test_a_picture_is_shown_in_a_terminal_that_can(engine, monkeypatch, png):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("COLORTERM", raising=False)
    shown, _ = at_the_terminal(engine, monkeypatch, f"/image {png}", "/image nowhere.png")
    assert shown.count("\033[0m\n") == 12
    monkeypatch.setenv("TERM", "dumb")
    assert "\033" not in at_the_terminal(engine, monkeypatch, f"/image {png}")[0]
    monkeypatch.setenv("TERM", "xterm-256color")
    piped, _, _ = typed(engine, f"/image {png}", "what is it")
    assert "\033" not in piped


def test_stopping_a_reply_at_the_terminal_is_remembered(engine, monkeypatch):
    asked = []

    def stream(sample, _):
        asked.append(sample)
        yield TextDelta("red")
        if len(asked) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine, "stream", stream)
    out, _ = at_the_terminal(engine, monkeypatch, "what is it", "how many")
    assert "red (stopped)" in out
    assert [message.parts[-1].text for message in asked[1].messages] == ["what is it", "red", "how many"]


def test_ctrl_c_takes_back_the_lines_of_an_unfinished_question(engine, monkeypatch):
    asked = []
    monkeypatch.setattr(engine, "stream", lambda sample, _: asked.append(sample) or iter((TextDelta("red"),)))
    at_the_terminal(engine, monkeypatch, "forget this\\", KeyboardInterrupt, "what is it")
    assert [sample.messages[0].parts for sample in asked] == [(Text("what is it"),)]


def test_streamed_pieces_are_printed_as_they_come(engine, monkeypatch):
    """Flushed piece by piece: nobody waits for the whole answer."""

    class Out(io.StringIO):
        flushed = 0

        def flush(self):
            Out.flushed += 1

    out = Out()
    monkeypatch.setattr(engine, "stream", lambda *_: map(TextDelta, ("a ", "red ", "circle")))
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


# Sounds


def test_a_sound_goes_with_the_next_question_and_no_sound_is_another_question(ears, clip):
    talk = Chat(ears, SHORT)
    talk.play(clip)
    list(talk.ask("what is it"))
    list(talk.ask("how many"))
    assert [part for m in talk.messages[::2] for part in m.parts] == [
        Audio(clip),
        Text("what is it"),
        Text("how many"),
    ]
    deaf, _, _ = typed(ears, "what is it")
    heard, err, errors = typed(ears, f"/audio {clip}", "what is it")
    assert errors == 0
    assert "a sound.wav" in err
    assert heard != deaf


def test_a_sound_alone_is_asked_by_an_empty_line_or_the_end_of_the_pipe(ears, clip, png):
    talk = Chat(ears, SHORT)
    talk.show(png)
    talk.play(clip)
    whole = "".join(talk.ask()) + "\n"
    assert talk.messages[0].parts == (Image(png), Audio(clip))
    for lines in (("",), (), ("", "", "/quit")):
        assert typed(ears, *lines, images=[png], sounds=[clip]) == (whole, "", 0)
    assert typed(ears, "/quit", sounds=[clip]) == ("", "", 0)
    assert typed(ears, "", "  ", images=[png]) == ("", "", 0)


def test_a_question_that_failed_is_not_followed_by_its_sound_alone(ears, clip):
    out, err, errors = typed(ears, "what is <audio>", sounds=[clip])
    assert (out, errors) == ("", 1)
    assert "<audio>" in err


def test_a_sound_for_a_model_without_ears_names_the_part_and_the_recipe(engine, clip):
    out, err, errors = typed(engine, f"/audio {clip}", "what is it")
    assert errors == 1
    assert err.count("\n") == 1
    assert "no audio tower" in err
    assert "[model.audio]" in err
    assert out == typed(engine, "what is it")[0]


def test_a_conversation_about_sounds_is_saved_as_a_row_that_training_reads(ears, clip, tmp_path):
    from tinymodal.data.sources import open_source

    kept = tmp_path / "talk.jsonl"
    _, err, errors = typed(ears, f"/audio '{clip}'", "", f"/audio {clip}", "what is it", f"/save {kept}")
    assert errors == 0, err
    row = open_source(kept, "messages").sample(0)
    assert [part.source for part in row.media()] == [clip, clip]
    assert words(row)[1] == "what is it"


# Replies aloud


def test_a_spoken_reply_is_the_engines_and_the_answer_is_printed_alone(mouth, tmp_path):
    out, err, errors = typed(mouth, "what is it", speech=tmp_path / "said.wav", voice="bob")
    talk = Chat(mouth, SHORT)
    talk.speak_as("bob")
    talk.speak(tmp_path / "again.wav")
    assert out == "".join(talk.ask("what is it")) + "\n"
    assert (err, errors) == ("", 0)
    (reply,) = mouth.reply([of_user("what is it")], SHORT, speak=True, voice="bob")
    assert out == reply.text + "\n"
    written, rate_hz = soundfile.read(tmp_path / "said.wav", dtype="float32")
    assert rate_hz == reply.rate_hz
    torch.testing.assert_close(torch.from_numpy(written), reply.audio.clamp(-1, 1), rtol=0, atol=1.6 / 32768)
    assert (tmp_path / "said.wav").read_bytes() == (tmp_path / "again.wav").read_bytes()


def of_user(text):
    from tinymodal.core.types import Message, Sample

    return Sample((Message("user", (Text(text),)),), "test")


def test_speaking_begins_and_ends_and_each_reply_has_a_file(mouth, tmp_path):
    path = tmp_path / "said.wav"
    lines = ("what is it", f"/speak {path}", "how many", "which one", "/speak", "what is it")
    out, err, errors = typed(mouth, *lines)
    assert errors == 0, err
    assert {p.name for p in tmp_path.iterdir()} == {"said.wav", "said-2.wav"}
    assert out == typed(mouth, *(line for line in lines if not line.startswith("/")))[0]


def test_a_voice_may_be_a_clip_of_it(mouth, clip, tmp_path):
    said = {}
    for name in ("ann", "bob", str(clip)):
        typed(mouth, f"/voice {name}", f"/speak {tmp_path}/said.wav", "what is it")
        said[name] = (tmp_path / "said.wav").read_bytes()
    assert len(set(said.values())) == 3
    _, err, errors = typed(mouth, "/voice eve", "what is it")
    assert errors == 1
    assert "which has ann, bob" in err


def test_at_the_terminal_it_is_told_where_the_reply_is(mouth, monkeypatch, tmp_path):
    _, err = at_the_terminal(mouth, monkeypatch, f"/speak {tmp_path}/said.wav", "what is it")
    assert f"spoken: {tmp_path}/said.wav, " in err


@pytest.mark.parametrize(
    ("name", "told"),
    [("said.mp3", "ends with .wav"), ("no/said.wav", "there is no folder"), ("folder.wav", "is a folder")],
)
def test_where_no_sound_can_be_written_is_told_before_a_question(mouth, name, told, tmp_path):
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(DataError, match=told):
        typed(mouth, "what is it", speech=tmp_path / name)


def test_speech_asked_of_a_model_without_a_mouth_is_told_before_a_question(engine, tmp_path):
    with pytest.raises(CheckpointError, match=r"no speech head.*\[model\.speech\]"):
        typed(engine, "what is it", speech=tmp_path / "said.wav")
    assert not list(tmp_path.iterdir())


def test_a_reply_without_words_leaves_no_older_one_in_its_place(mouth, monkeypatch, tmp_path):
    path = tmp_path / "said.wav"
    typed(mouth, "what is it", speech=path)
    assert soundfile.info(path).frames
    monkeypatch.setattr(mouth, "stream", lambda *_, **__: iter(()))
    assert typed(mouth, "what is it", speech=path)[0] == "\n"
    assert soundfile.info(path).frames == 0


def test_a_reply_that_is_stopped_leaves_what_was_said(mouth, monkeypatch, tmp_path):
    from tinymodal.infer.engine import AudioDelta

    def stream(*_, **__):
        yield TextDelta("red")
        yield AudioDelta(torch.full((800,), 2.0), 16_000)
        raise KeyboardInterrupt

    monkeypatch.setattr(mouth, "stream", stream)
    talk = Chat(mouth, SHORT)
    talk.speak(tmp_path / "said.wav")
    with pytest.raises(KeyboardInterrupt):
        list(talk.ask("what"))
    written, _ = soundfile.read(tmp_path / "said.wav")
    assert len(written) == 800
    assert written.min() == pytest.approx(32767 / 32768)  # cut off at full scale, not turned over
    assert talk.messages[-1].train is False


def test_a_sound_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "said.wav").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        Recording(tmp_path / "said.wav", 16_000)
