"""The face of a model in Python."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import tinymodal
from tests.infer.test_engine import QUESTIONS, picture, speaking, written
from tests.model.test_hearing import RATE_HZ, sound
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import CheckpointError, DataError, RecipeError
from tinymodal.core.types import Image, Message, Sample, Text
from tinymodal.infer.engine import AudioDelta, Engine
from tinymodal.infer.model import Model

FEW = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(tiny_model(audio="tinymodal_ear"))


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "cat.png"
    picture(1).source.save(path)
    return path


def test_a_picture_may_be_a_path_bytes_or_in_hand(model, png):
    said = [
        model.reply("what is it", images=[one], **FEW)
        for one in (png, str(png), png.read_bytes(), picture(1).source, Image(png))
    ]
    assert said[0].prompt.startswith("<|im_start|>user\n[image: 9 tokens]")
    assert len({reply.text for reply in said}) == 1
    assert str(said[0]) == said[0].text == model.engine.reply(QUESTIONS[:1])[0].text[: len(said[0].text)]


def test_a_sound_may_be_a_path_bytes_or_samples(model, tmp_path):
    import soundfile

    wave, path = sound(0.7), tmp_path / "what.wav"
    soundfile.write(path, wave.numpy(), RATE_HZ, "FLOAT")
    given = (path, str(path), path.read_bytes(), (wave, RATE_HZ), (wave.double().numpy(), RATE_HZ))
    said = [model.reply(audio=[one], **FEW) for one in given]
    assert "[audio: " in said[0].prompt
    assert len({reply.text for reply in said}) == 1
    whole = (np.asarray(wave * 32767).astype(np.int16), RATE_HZ)
    assert "[audio: " in model.reply("what", audio=[whole], **FEW).prompt


def test_several_questions_are_a_batch_in_their_order(model, png):
    asked = [
        "yes or no",
        {"question": "what is it", "images": [png]},
        {"audio": [(sound(0.7), RATE_HZ)]},
        (Message("user", (Text("what is it"),)),),
        QUESTIONS[2],
    ]
    together = model.reply(asked, **FEW)
    assert together[0].text == model.reply("yes or no", **FEW).text
    assert together[1].text == model.reply("what is it", images=[png], **FEW).text
    assert together[4].text == model.reply(QUESTIONS[2], **FEW).text
    assert model.reply([]) == []


def test_a_stream_prints_as_the_reply(model, png):
    pieces = [f"{piece}" for piece in model.stream("what is it", images=[png], **FEW)]
    assert "".join(pieces) == model.reply("what is it", images=[png], **FEW).text


def test_a_conversation_remembers_and_can_forget(model, png):
    talk = model.chat(system="be brief", **FEW)
    first = talk.reply("what is it", images=[png])
    second = talk.reply("how many")
    assert "be brief" in second.prompt
    assert first.text in second.prompt
    assert second.prompt.count("[image: 9 tokens]") == 1
    third = written(talk.stream("and where"))
    assert [message.role for message in talk.messages] == ["system", *["user", "assistant"] * 3]
    assert talk.messages[-1].parts == (Text(third),)
    plain = Engine(model.composed).reply([Sample(tuple(talk.messages[:-1]), "same")], talk.sampling)[0]
    assert plain.text == third
    talk.reset()
    assert [message.role for message in talk.messages] == ["system"]


def test_a_question_that_fails_is_not_remembered(model):
    talk = model.chat(**FEW)
    with pytest.raises(DataError, match="nowhere"):
        talk.reply("what", images=["nowhere.png"])
    with pytest.raises(DataError, match="nowhere"):
        list(talk.stream("what", images=["nowhere.png"]))
    assert talk.messages == []


def test_a_model_speaks_where_it_can(model):
    engine = speaking()
    loud = Model(engine.composed, prefix_mb=1)
    reply = loud.reply("what is it", images=[picture(1)], speak=True, **FEW)
    assert (len(reply.audio) > 0, reply.rate_hz) == (True, 1000)
    pieces = list(loud.stream("what is it", images=[picture(1)], speak=True, **FEW))
    torch.testing.assert_close(
        torch.cat([piece.samples for piece in pieces if isinstance(piece, AudioDelta)]), reply.audio
    )
    with pytest.raises(CheckpointError, match="no speech head"):
        model.reply("what", speak=True)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"question": "what", "images": "cat.png"}, "a list"),
        ({"question": [7]}, "question 1: int"),
        ({"question": [{"question": "what", "pictures": []}]}, "'pictures'"),
        ({"question": ["what"], "images": ["a.png"]}, "each brings its own"),
        ({"question": QUESTIONS[0], "images": ["a.png"]}, "among its parts"),
    ],
)
def test_what_cannot_be_asked_is_told(model, given, named):
    with pytest.raises(DataError, match=named):
        model.reply(**given)


def test_what_tinymodal_load_gives_answers_and_stands_for_the_parts_too():
    model = tinymodal.load("starter", device="cpu")
    assert (
        model.reply("What colour is the ring?", images=["docs/scene.png"], max_new_tokens=8).text == "yellow"
    )
    engine = tinymodal.Engine(model)
    question = Message("user", (Image(Path("docs/scene.png")), Text("What colour is the ring?")))
    assert engine.reply([Sample((question,), "mine")])[0].text == "yellow"
    assert model.processor.tokenizer is model.tokenizer
    with pytest.raises(RecipeError, match="device mps"):
        tinymodal.load("starter", device="mps")


def test_the_python_of_the_page_runs(capsys):
    page = Path("docs/engine.md").read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(found) == 2
    for block in found:
        exec(compile(block, "docs/engine.md", "exec"), {})
    said = capsys.readouterr().out
    assert said.startswith("yellow\n")
    assert said.count("bottom right") == 3
