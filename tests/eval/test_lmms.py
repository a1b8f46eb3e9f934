"""lmms-eval's requests come out as the engine's own questions, and its replies go back in order.

Most of this runs without lmms-eval, on a stand-in of the few names that the adapter uses, as they are in
lmms-eval 0.7.3. Two tests hold it against the real package where that is installed.
"""

import abc
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.model.test_hearing import RATE_HZ, build, hearing_config, hearing_tokenizer, sound
from tinymodal.chat.encode import Encoder
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import DataError, RecipeError
from tinymodal.core.types import IGNORE, Audio, Image, Message, Sample, Text
from tinymodal.infer.engine import Engine, Sampling
from tinymodal.model.processing_tinymodal import TinyModalProcessor

HERE = Path(__file__).resolve()
REPOSITORY = HERE.parents[2]
INSTALLED = importlib.util.find_spec("lmms_eval") is not None
needs_package = pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed; see docs/lmms-eval.md")

SHORT = {"max_new_tokens": 8, "temperature": 0.0, "do_sample": False, "until": ["\n\n"]}


# The stand-in: lmms_eval/api/model.py, api/instance.py and models/registry_v2.py of 0.7.3, our own words.


class CacheHook:
    def __init__(self, cachinglm=None) -> None: ...

    def add_partial(self, attr, req, res) -> None: ...


class lmms(abc.ABC):
    is_simple: bool = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = CacheHook(None)
        self.task_dict = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @property
    def rank(self):
        return self._rank

    @property
    def world_size(self):
        return self._world_size

    def set_cache_hook(self, cache_hook) -> None:
        self.cache_hook = cache_hook

    def clean(self):
        for name in [name for name, value in vars(self).items() if isinstance(value, torch.nn.Module)]:
            delattr(self, name)


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int
    metadata: dict = field(default_factory=dict)

    @property
    def args(self):
        return self.arguments if isinstance(self.arguments, tuple) else (self.arguments,)


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


STAND_IN = {
    "lmms_eval": (),
    "lmms_eval.api": (),
    "lmms_eval.api.model": (lmms, CacheHook),
    "lmms_eval.api.instance": (TokenCounts, GenerationResult, Instance),
    "lmms_eval.models": (),
    "lmms_eval.models.registry_v2": (ModelManifest,),
}


@pytest.fixture(scope="module")
def adapter():
    """``tinymodal.eval.lmms`` over the stand-in, whether or not the package is installed."""
    with pytest.MonkeyPatch.context() as patch:
        for name, members in STAND_IN.items():
            module = ModuleType(name)
            for member in members:
                setattr(module, member.__name__, member)
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, "tinymodal.eval.lmms", raising=False)
        yield importlib.import_module("tinymodal.eval.lmms")
        patch.delitem(sys.modules, "tinymodal.eval.lmms")


@pytest.fixture(scope="module")
def composed():
    return tiny_model()


@pytest.fixture(scope="module")
def listening():
    """Sees and hears."""
    config = hearing_config()
    encoder = Encoder(TinyModalProcessor.of(config, hearing_tokenizer()), "chatml")
    return SimpleNamespace(model=build(config), encoder=encoder)


class Docs(list):
    """A split that counts how often its pictures are opened."""

    opened = 0

    def __getitem__(self, index):
        Docs.opened += 1
        return super().__getitem__(index)


@pytest.fixture
def make(adapter, composed, monkeypatch):
    """A model of either interface, with three documents of one task."""

    def make(kind: str = "simple", model: Any = None, **settings: Any):
        monkeypatch.setattr(adapter, "load", lambda *args, **kwargs: model or composed)
        lm = {"simple": adapter.TinyModal, "chat": adapter.TinyModalChat}[kind](
            "runs/x", device="cpu", **settings
        )
        lm.task_dict = {"colours": {"test": DOCS}}
        return lm

    return make


def picture(seed: int) -> PIL.Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


DOCS = Docs(
    [
        {"words": "what is it", "pictures": [picture(1)]},
        {"words": "how many red things are there in the picture", "pictures": [picture(2), picture(3)]},
        {"words": "yes or no", "pictures": []},
    ]
)


def visuals(doc: dict) -> list:
    return doc["pictures"]


def messages(doc: dict) -> list[dict]:
    shown = [{"type": "image", "url": each} for each in doc["pictures"]]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": doc["words"]}]}]


def ask(kind: str, number: int, context: str | None = None, **gen_kwargs: Any) -> Instance:
    """A request about a document, with what ``ConfigurableTask.construct_requests`` puts in it."""
    words = list.__getitem__(DOCS, number)["words"] if context is None else context
    given = {**SHORT, **gen_kwargs}
    middle = (given, visuals) if kind == "simple" else (messages, given)
    return Instance("generate_until", (words, *middle, number, "colours", "test"), 0)


def sample(number: int) -> Sample:
    doc = list.__getitem__(DOCS, number)
    parts = (*(Image(each) for each in doc["pictures"]), Text(doc["words"]))
    return Sample((Message("user", parts),), "by hand")


def user(lm: Any, context: str, *media: Any) -> tuple:
    """The parts of the turn that a request becomes."""
    ((message,),) = (lm._turn(list(media), context, "here"),)
    return message.parts


# Generating


@pytest.mark.parametrize("kind", ["simple", "chat"])
def test_replies_are_the_engines_own_in_the_order_of_the_requests(make, composed, kind):
    """Mixed lengths of reply, one document twice, batches smaller than the requests."""
    numbers, lengths = [1, 0, 2, 0, 1], [8, 3, 8, 8, 3]
    lm = make(kind, batch_size=2)
    given = lm.generate_until([ask(kind, n, max_new_tokens=m) for n, m in zip(numbers, lengths, strict=True)])
    for number, length, reply in zip(numbers, lengths, given, strict=True):
        (expected,) = Engine(composed).reply([sample(number)], Sampling(max_new_tokens=length))
        assert (reply.text, reply.token_counts.input_tokens) == (expected.text, expected.tokens_in)
        assert reply.token_counts.output_tokens == expected.tokens_out <= length
    assert len({reply.text for reply in given}) > 2


def test_pictures_are_opened_batch_by_batch(make, monkeypatch):
    """A task's pictures do not fit into memory all at once."""
    lm = make(batch_size=1)
    opened = []
    monkeypatch.setattr(Docs, "opened", 0)
    whole = lm.engine.reply

    def reply(samples, *args, **kwargs):
        opened.append((len(samples), Docs.opened))
        return whole(samples, *args, **kwargs)

    monkeypatch.setattr(lm.engine, "reply", reply)
    lm.generate_until([ask("simple", n % 3, max_new_tokens=1) for n in range(12)])
    assert opened == [(8, 8), (4, 12)]


def test_the_cache_hook_is_told_every_reply_and_the_settings_stay_as_they_are(make):
    told = []
    lm = make()
    lm.set_cache_hook(SimpleNamespace(add_partial=lambda *row: told.append(row)))
    requests = [ask("simple", 0), ask("simple", 2, max_new_tokens=2, until=["red"])]
    before = [dict(request.args[1]) for request in requests]
    given = lm.generate_until(requests)
    # lmms-eval knows a cached reply by the very settings of its request.
    assert [request.args[1] for request in requests] == before
    expected = [
        ("generate_until", request.args[:2], reply.text)
        for request, reply in zip(requests, given, strict=True)
    ]
    assert sorted(told, key=str) == sorted(expected, key=str)


@pytest.mark.parametrize(
    ("given", "expected", "stops"),
    [
        ({}, Sampling(max_new_tokens=1024), ()),
        ({"until": ["\n\n"], "max_new_tokens": 16}, Sampling(max_new_tokens=16), ()),
        ({"until": None, "max_gen_toks": 9}, Sampling(max_new_tokens=9), ()),
        ({"until": "Q:"}, Sampling(max_new_tokens=1024), ("Q:",)),
        ({"until": ["Q:", "", "\n\n"]}, Sampling(max_new_tokens=1024), ("Q:", "\n\n")),
        ({"temperature": 0, "top_p": 0.5, "top_k": 3, "num_beams": 1}, Sampling(max_new_tokens=1024), ()),
        ({"temperature": 0.7, "top_p": 0}, Sampling(max_new_tokens=1024), ()),
        ({"temperature": 0, "do_sample": False}, Sampling(max_new_tokens=1024), ()),
        ({"temperature": None, "top_p": None, "top_k": None}, Sampling(max_new_tokens=1024), ()),
        (
            {"temperature": 0.7, "top_p": 0.9, "top_k": 3, "seed": 5},
            Sampling(max_new_tokens=1024, temperature=0.7, top_p=0.9, top_k=3, seed=5),
            (),
        ),
        ({"do_sample": True}, Sampling(max_new_tokens=1024, temperature=1.0), ()),
        ({"do_sample": True, "temperature": 0}, Sampling(max_new_tokens=1024), ()),
    ],
)
def test_generation_settings_are_understood(adapter, given, expected, stops):
    assert adapter.settings(given) == ((expected, stops), [])


def test_settings_that_cannot_be_followed_are_named_once(make, capsys):
    lm = make()
    lm.generate_until([ask("simple", n, num_beams=3, repetition_penalty=1.0) for n in (0, 1)])
    lm.generate_until([ask("simple", 0, temperature=0.7)])  # most tasks have do_sample = False
    said = capsys.readouterr().err
    assert "temperature=0.7 beside do_sample=False of the generation settings is not used" in said
    assert said.count("num_beams=3 of the generation settings is not used (first: colours/test/0)") == 1
    assert "repetition_penalty" not in said


def test_a_reply_ends_before_a_stop_of_its_task_and_only_of_its_task(make, composed):
    (whole,) = Engine(composed).reply([sample(0)], Sampling(max_new_tokens=8))
    stop = whole.text.split()[1]
    lm = make()
    own = lm.engine.stop_words
    first, second = lm.generate_until([ask("simple", 0, until=[stop]), ask("simple", 0)])
    assert first.text == whole.text[: whole.text.index(stop)].strip()
    assert (second.text, lm.engine.stop_words) == (whole.text, own)


def test_where_chance_is_asked_for_repeats_differ_and_runs_do_not(make):
    hot = {"temperature": 5.0, "do_sample": True}
    requests = [ask("simple", 0, **hot)] * 4
    texts = [reply.text for reply in make(batch_size=1).generate_until(requests)]
    assert len(set(texts)) == 4
    assert texts == [reply.text for reply in make(batch_size=1).generate_until(requests)]


# Several rounds


def rounds_of_text(doc, previous_output=None, round_idx=None, previous_round_info=None):
    """As tasks do for the simple interface: another picture and question, three rounds in all."""
    if round_idx == 3:
        return None, None, True, [*previous_output, previous_round_info], None
    return [picture(round_idx)], f"what is {'it' * round_idx}", False, previous_output, f"round {round_idx}"


def rounds_of_messages(doc, round_idx=None, previous_output=None, previous_round_info=None):
    if round_idx is None:
        return messages(doc)
    shown, words, over, *rest = rounds_of_text(doc, previous_output, round_idx, previous_round_info)
    return None if over else messages({"words": words, "pictures": shown}), over, *rest


@pytest.mark.parametrize("kind", ["simple", "chat"])
def test_rounds_go_on_until_the_task_ends_them(make, composed, kind):
    lm = make(kind)
    middle = (SHORT, visuals, rounds_of_text) if kind == "simple" else (rounds_of_messages, SHORT)
    requests = [
        Instance("generate_until_multi_round", (DOCS[n]["words"], *middle, n, "colours", "test"), 0)
        for n in (0, 1)
    ]
    told = []
    lm.set_cache_hook(SimpleNamespace(add_partial=lambda *row: told.append(row)))
    given = lm.generate_until_multi_round(requests)
    later = [
        Sample((Message("user", (Image(picture(n)), Text(f"what is {'it' * n}"))),), "x") for n in (1, 2)
    ]
    for number, outputs in enumerate(given):
        expected = Engine(composed).reply([sample(number), *later], Sampling(max_new_tokens=8))
        assert outputs == [*(reply.text for reply in expected), "round 2"]
    assert [(row[0], row[2]) for row in told] == [("generate_until_multi_round", each) for each in given]


# Media and words


def test_pictures_go_where_the_words_have_a_mark_for_them(make):
    lm = make()
    one, two = picture(1), picture(2)
    assert user(lm, "first <image> then <image>\nwhich", one, two) == (
        *(Text("first "), Image(one), Text(" then "), Image(two), Text("\nwhich")),
    )
    assert user(lm, "<image>\nwhat is it", one) == (Image(one), Text("\nwhat is it"))
    assert user(lm, "what is it", one, two) == (Image(one), Image(two), Text("what is it"))


def test_marks_that_are_not_as_many_as_the_pictures_are_words(make, capsys):
    lm = make()
    one, two = picture(1), picture(2)
    assert user(lm, "is <image> a tag", one, two) == (Image(one), Image(two), Text("is < image> a tag"))
    assert user(lm, "is <image> a tag") == (Text("is < image> a tag"),)
    said = capsys.readouterr().err
    assert said.count("'<image>', which is a control token of this model, is written apart") == 1
    # Numbered marks are words to us as to the tokenizer.
    assert user(lm, "see <image 1>", one)[1] == Text("see <image 1>")


def test_sounds_and_pictures_each_have_their_marks(make, listening):
    lm = make(model=listening)
    heard = {"array": sound(0.5).numpy(), "sampling_rate": RATE_HZ}
    parts = user(lm, "<audio> and <image>", picture(1), heard)
    assert [type(part) for part in parts] == [Audio, Text, Image]
    parts = user(lm, "listen: <audio>", picture(1), heard)
    assert [type(part) for part in parts] == [Image, Text, Audio]


@given(st.lists(st.sampled_from(["<image>", "<s>", "</s>", "<|im_end|>", "<", "<im", "age>", " ", "red"])))
def test_any_words_can_be_read(adapter, composed, pieces):
    """A placeholder's or control token's spelling would be refused; questions of benchmarks hold them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "load", lambda *args, **kwargs: composed)
        lm = adapter.TinyModal("runs/x", device="cpu")
        words = "what " + "".join(pieces)
        parts = user(lm, words)
        assert lm.engine.encode(Sample((Message("user", parts),), "x")).media == ()
        assert "".join(part.text for part in parts).replace(" ", "") == words.replace(" ", "")


@pytest.mark.parametrize("shape", ["mono", "channels first", "channels last", "int16"])
def test_samples_of_numpy_are_heard_as_they_were_made(adapter, shape):
    wave = sound(0.25).clamp(-1, 1).double().numpy()
    array = {
        "mono": wave,
        "channels first": np.stack([wave, wave]),
        "channels last": np.stack([wave, wave], axis=1),
        "int16": (wave * 32767).round().astype(np.int16),
    }[shape]
    heard = adapter.medium({"array": array, "sampling_rate": RATE_HZ}, "here")
    assert heard.rate_hz == RATE_HZ
    assert heard.source.dtype == torch.float32
    mono = heard.source if heard.source.ndim == 1 else heard.source.mean(0)
    assert heard.source.shape[-1] == len(wave)
    torch.testing.assert_close(mono, torch.from_numpy(wave).float(), rtol=0, atol=2 / 32768)


def test_media_come_as_pictures_paths_bytes_and_decoders(adapter, tmp_path):
    one = picture(1)
    decoded = SimpleNamespace(data=torch.zeros(1, 10), sample_rate=8000)
    decoder = SimpleNamespace(get_all_samples=lambda: decoded)
    assert adapter.medium(one, "here") == Image(one)
    assert adapter.medium("a/b.JPG", "here", "video") == Image(Path("a/b.JPG"))
    assert adapter.medium(Path("a/b.flac"), "here") == Audio(Path("a/b.flac"))
    assert adapter.medium("a/b", "here", "image") == Image(Path("a/b"))
    assert adapter.medium("a/b.webm", "here", "audio") == Audio(Path("a/b.webm"))
    assert adapter.medium({"bytes": b"x", "path": None}, "here") == Image(b"x")
    assert adapter.medium({"bytes": b"x", "path": "b.wav"}, "here") == Audio(b"x")
    assert adapter.medium({"path": "b.png", "bytes": None}, "here") == Image(Path("b.png"))
    heard = adapter.medium(decoder, "here")
    assert (heard.source is decoded.data, heard.rate_hz) == (True, 8000)
    # What 0.7.3 makes of a sound of soundfile where a task has no doc_to_messages: "video".
    assert adapter.part_of({"type": "video", "url": {"array": np.zeros(9), "sampling_rate": 8000}}, "here")


@pytest.mark.parametrize("value", ["clips/a.mp4", [picture(1), picture(2)], np.zeros((2, 4, 4, 3)), None])
def test_a_video_is_refused_with_a_sentence(make, value):
    lm = make()
    lm.task_dict = {"clips": {"test": [{"clip": value}]}}
    show = (lambda doc: [doc["clip"]],)
    with pytest.raises(
        DataError, match=r"clips/test/0: found .*This model sees no videos: leave the task out"
    ):
        lm.generate_until([Instance("generate_until", ("what", SHORT, *show, 0, "clips", "test"), 0)])
    with pytest.raises(DataError, match=r"is an address; expected a file\. Nothing is fetched"):
        user(lm, "what", "https://example.org/a.png")


def test_turns_of_the_chat_interface_keep_their_sides(make):
    lm = make("chat")
    turns = lm._turns(
        [
            {"role": "system", "content": [{"type": "text", "text": ""}]},
            {"role": "user", "content": "what is it"},
            {"role": "assistant", "content": [{"type": "text", "text": "a circle"}]},
            {
                "role": "user",
                "content": [{"type": "text", "text": "and "}, {"type": "image", "url": "b.png"}],
            },
            {"role": "user", "content": "which one"},
        ],
        "here",
    )
    assert [(turn.role, turn.parts) for turn in turns] == [
        ("user", (Text("what is it"),)),
        ("assistant", (Text("a circle"),)),
        ("user", (Text("and "), Image(Path("b.png")), Text("\n"), Text("which one"))),
    ]
    assert lm.engine.encoder.template.render(turns[:2], iter(()), False).text


def test_what_cannot_be_read_ends_the_run_or_gets_no_words_and_is_counted(make, composed, capsys):
    docs = [*(list.__getitem__(DOCS, n) for n in (0, 1)), {"words": "what", "pictures": ["nowhere.png"]}]
    order = [2, 0, 2, 1]
    lm = make()
    lm.task_dict = {"colours": {"test": docs}}
    requests = [
        Instance("generate_until", (docs[n]["words"], SHORT, visuals, n, "colours", "test"), 0) for n in order
    ]
    with pytest.raises(DataError, match=r"colours/test/2: picture 1: .*nowhere\.png"):
        lm.generate_until(requests)
    lm = make(unreadable="empty")
    lm.task_dict = {"colours": {"test": docs}}
    texts = [reply.text for reply in lm.generate_until(requests)]
    expected = Engine(composed).reply([sample(0), sample(1)], Sampling(max_new_tokens=8))
    assert texts == ["", expected[0].text, "", expected[1].text]
    assert lm.num_unreadable == 2
    assert "2 of 4 requests could not be read and were answered with no words" in capsys.readouterr().err


# Likelihood


def likely(number: int, answer: Any) -> Instance:
    words = list.__getitem__(DOCS, number)["words"]
    return Instance("loglikelihood", (words, answer, visuals, number, "colours", "test"), 0)


def by_hand(composed: Any, number: int, answer: str) -> tuple[list[float], bool]:
    """Log-probability of each of the answer's tokens, and whether each is the likeliest; one by one."""
    question = sample(number)
    whole = Sample((*question.messages, Message("assistant", (Text(answer),))), "by hand")
    encoded = composed.encoder(whole)
    pictures = torch.stack([item.tiles[0] for item in encoded.media]) if encoded.media else None
    with torch.no_grad():
        logits = composed.model(input_ids=encoded.ids[None], pixel_values=pictures, use_cache=False).logits[0]
    wanted = [i for i, label in enumerate(encoded.labels.tolist()) if label != IGNORE]
    found = logits.log_softmax(-1)
    scores = [float(found[i - 1, encoded.ids[i]]) for i in wanted]
    return scores, all(int(logits[i - 1].argmax()) == int(encoded.ids[i]) for i in wanted)


def test_the_loss_of_an_answer_is_minus_the_mean_of_its_tokens_log_probabilities(make, composed):
    asked = [(0, " red circle"), (1, " blue"), (2, "yes"), (0, "what is it there")]
    requests = [likely(n, answer) for n, answer in asked]
    requests[2] = likely(2, lambda doc: "yes")  # doc_to_target, of the output type loglikelihood
    found = {loss: make(loss=loss, batch_size=3).loglikelihood(requests) for loss in ("mean", "sum")}
    for i, (number, answer) in enumerate(asked):
        scores, greedy = by_hand(composed, number, answer.strip())
        assert found["mean"][i].text == (pytest.approx(-sum(scores) / len(scores), abs=1e-5), greedy)
        assert found["sum"][i].text == (pytest.approx(-sum(scores), abs=1e-4), greedy)


def test_the_smallest_number_is_the_likeliest_answer_as_the_tasks_expect(make, composed):
    """``np.argmin(lls)`` in lmms_eval/api/task.py; a log-probability would choose the worst."""
    choices = ["red", "circle", "yes", "two"]
    given = make(loss="sum").loglikelihood([likely(0, f" {choice}") for choice in choices])
    sums = [sum(by_hand(composed, 0, choice)[0]) for choice in choices]
    losses, _ = zip(*(each.text for each in given), strict=True)
    assert int(np.argmin(losses)) == int(np.argmax(sums))


def test_an_answer_is_greedy_if_each_of_its_tokens_is_the_likeliest_the_stop_included(make, monkeypatch):
    lm = make()
    labels = [
        label for label in lm._answered(likely(0, " red circle").args).labels.tolist() if label != IGNORE
    ]
    words = lm.engine.tokenizer("red circle", add_special_tokens=False)["input_ids"]
    assert labels[: len(words)] == words
    assert labels[len(words)] in lm.engine.stop_ids

    def saying(tokens: list[int]) -> bool:
        size = lm.engine.model.config.text_config.vocab_size
        logits = torch.nn.functional.one_hot(torch.tensor(tokens), size).float()
        monkeypatch.setattr(lm.engine.model, "head", lambda states: logits.clone())
        return lm.loglikelihood([likely(0, " red circle")])[0].text[1]

    assert saying(labels) is True
    for i in range(len(words) + 1):
        assert saying([token + (n == i) for n, token in enumerate(labels)]) is False


def test_a_metric_that_asks_without_a_question_is_refused(make):
    with pytest.raises(NotImplementedError, match="acc_mutual_info"):
        make().loglikelihood([Instance("loglikelihood", ("", "red"), 0)])


# The model itself


def test_the_rank_comes_from_the_environment(make, monkeypatch):
    assert (make().rank, make().world_size) == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    lm = make()
    assert (lm.rank, lm.world_size, lm.device) == (2, 4, torch.device("cpu"))


def test_several_ranks_take_a_gpu_each(adapter, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert adapter.device_of(None) == adapter.device_of("cuda") == torch.device("cuda:3")
    assert adapter.device_of("cuda:1") == torch.device("cuda:1")
    assert adapter.device_of("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert adapter.device_of(None) == torch.device("cpu")
    with pytest.raises(RecipeError, match="torch sees no GPU here"):
        adapter.device_of("cuda")


def test_settings_of_the_model_are_checked_before_it_is_loaded(make):
    assert make(batch_size="auto").batch_size == make(batch_size="auto:4").batch_size == 32
    assert make(batch_size="3", max_batch_size=64).batch_size == 3
    for wrong in ({"batch_size": 0}, {"batch_size": "many"}, {"loss": "max"}, {"dtype": "int8"}):
        with pytest.raises(RecipeError, match=f"{next(iter(wrong))}.*expected"):
            make(**wrong)


def test_a_cleaned_model_gives_its_memory_back_and_can_be_asked_again(make):
    lm = make()
    (before,) = lm.generate_until([ask("simple", 0)])
    lm.clean()
    assert not any(isinstance(value, Engine) for value in vars(lm).values())
    assert lm.generate_until([ask("simple", 0)]) == [before]


def test_the_manifest_names_a_class_for_each_interface(adapter):
    manifest = adapter.manifest()
    assert manifest.model_id == "tinymodal"
    for path, simple in ((manifest.simple_class_path, True), (manifest.chat_class_path, False)):
        module, name = path.rsplit(".", 1)
        assert module == "tinymodal.eval.lmms"
        assert getattr(adapter, name).is_simple is simple
        assert not inspect.isabstract(getattr(adapter, name))


def test_the_entry_point_is_declared():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lmms_eval.models"] == {"tinymodal": "tinymodal.eval.lmms:manifest"}


def test_nothing_of_ours_imports_the_adapter():
    """Without lmms-eval it cannot be imported, and everything else can."""
    for path in (REPOSITORY / "tinymodal").rglob("*.py"):
        if path.name != "lmms.py":
            assert not re.search(r"eval\.lmms|import lmms", path.read_text()), path


# The real package


@needs_package
def test_the_stand_in_is_as_the_package(monkeypatch):
    for name in STAND_IN:
        if (
            getattr(sys.modules.get(name), "__file__", None) is None
        ):  # ours, if a test before has put it there
            monkeypatch.delitem(sys.modules, name, raising=False)
    for name, members in STAND_IN.items():
        for ours in members:
            theirs = getattr(importlib.import_module(name), ours.__name__)
            assert theirs is not ours
            if hasattr(ours, "__dataclass_fields__"):
                known = [each.name for each in fields(ours)]
                assert [each.name for each in fields(theirs)][: len(known)] == known
                continue
            for method, function in vars(ours).items():
                if inspect.isfunction(function):
                    expected = inspect.signature(getattr(theirs, method)).parameters
                    assert list(inspect.signature(function).parameters) == list(expected), method
            assert getattr(ours, "__abstractmethods__", None) == getattr(theirs, "__abstractmethods__", None)


TASKS = {
    "said.yaml": """
task: scenes_said
dataset_path: json
dataset_kwargs: {data_files: {test: test.jsonl}}
test_split: test
output_type: generate_until
doc_to_visual: !function ours.pictures
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
process_results: !function ours.score
generation_kwargs: {max_new_tokens: 16}
metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]
""",
    "chosen.yaml": """
task: scenes_chosen
dataset_path: json
dataset_kwargs: {data_files: {test: test.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function ours.pictures
doc_to_text: "{{question}}"
doc_to_choice: !function ours.choices
doc_to_target: "2"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "ours.py": """
import PIL.Image


def pictures(doc):
    return [PIL.Image.open(name).convert("RGB") for name in doc["pictures"]]


def choices(doc):
    return ["brown", "nothing at all", doc["answer"]]


def score(doc, results):
    return {"right": float(results[0] == doc["answer"])}
""",
}


@pytest.mark.slow
@needs_package
def test_a_task_runs_from_end_to_end_in_lmms_eval(tmp_path):
    """Its score is that of the engine's own replies in both interfaces; a second run is its cache's."""
    from tinymodal.compose.build import load
    from tinymodal.data.synthetic import questions

    made = questions(split="test", seed=2, per_kind=1, unseen_pairs=False)
    rows = []
    for number, each in enumerate(made):
        words, names = "", []
        for part in each.sample.messages[0].parts:
            if isinstance(part, Text):
                words += part.text
                continue
            names.append(str(tmp_path / f"{number}-{len(names)}.png"))
            part.source.save(names[-1])
            words += "<image>"
        rows.append({"pictures": names, "question": words, "answer": each.answer})
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    for name, text in TASKS.items():
        (tmp_path / "tasks" / name).write_text(text)
    entry = tmp_path / "entry" / "tinymodal-0.dist-info"  # as an installation would declare it
    entry.mkdir(parents=True)
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: tinymodal\nVersion: 0\n")
    (entry / "entry_points.txt").write_text("[lmms_eval.models]\ntinymodal = tinymodal.eval.lmms:manifest\n")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    path = f"{entry.parent}{os.pathsep}{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"

    def evaluate(*tasks: str, more: tuple[str, ...] = ()) -> tuple[dict[str, Any], list[str], str]:
        """The scores, the replies of the first task, and what was said."""
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "lmms_eval", "--model", "tinymodal", "--tasks", ",".join(tasks)),
                *("--model_args", "pretrained=starter", "--include_path", str(tmp_path / "tasks")),
                *("--batch_size", "8", "--output_path", str(out), "--log_samples", *more),
            ],
            env={**os.environ, **offline, "PYTHONPATH": path},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        (results,) = out.rglob("*_results.json")
        (samples,) = out.rglob(f"*_samples_{tasks[0]}.jsonl")
        rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        replies = [str(np.ravel(row["filtered_resps"])[0]) for row in rows]
        return json.loads(results.read_text())["results"], replies, done.stdout + done.stderr

    expected = Engine(load("starter")).reply([each.sample for each in made], Sampling(max_new_tokens=16))
    right = [reply.text == each.answer for reply, each in zip(expected, made, strict=True)]
    scores, replies, _ = evaluate("scenes_said")
    assert replies == [reply.text for reply in expected]
    assert scores["scenes_said"]["right,none"] == pytest.approx(sum(right) / len(right))
    for _ in range(2):
        more = ("--force_simple", "--use_cache", str(tmp_path / "cache"))
        scores, replies, said = evaluate("scenes_said", "scenes_chosen", more=more)
        assert replies == [reply.text for reply in expected]
        # The answers not asked for are far less likely than the right one, also where the reply is wrong.
        assert scores["scenes_chosen"]["acc,none"] == 1.0
    assert f"all {len(made)} requests served from cache" in said
