"""Our engine as a model of lmms-eval, so that its tasks run: ``lmms-eval --model tinymodal``.

lmms-eval finds :func:`manifest` by the entry point ``tinymodal`` of the group ``lmms_eval.models`` and then
imports this module; nothing of ours does. It has two ways to ask, and there is a class for each:
:class:`TinyModalChat` is given turns, :class:`TinyModal` (``--force_simple``) words and a list of media.
Both come out as a ``Sample`` and are answered by ``Engine.reply``: batched by length, greedy unless a task
asks for chance, in the order of the requests. See docs/lmms-eval.md.

Source: lmms-eval 0.7.3, https://github.com/EvolvingLMMs-Lab/lmms-eval/tree/v0.7.3/lmms_eval: ``api/model.py``
(what a model is), ``models/registry_v2.py`` (how it is found), ``api/task.py`` (what requests hold, and what
is made of the numbers of :meth:`TinyModal.loglikelihood`).
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL.Image
import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms

from tinymodal.chat.template import alternatives
from tinymodal.compose.build import load
from tinymodal.core.errors import DataError, RecipeError
from tinymodal.core.log import Progress, say
from tinymodal.core.types import IGNORE, Audio, Encoded, Image, Medium, Message, Part, Sample, Text
from tinymodal.data.collate import collate
from tinymodal.data.row import PLACE, SOUND_PLACE
from tinymodal.infer.engine import WINDOW, Engine, Reply, Sampling

NAME = "tinymodal"
"""What ``--model`` calls us."""

MAX_NEW_TOKENS = 1024
"""Where a task sets none: as lmms-eval's own LLaVA models."""
BATCH_SIZE = 32
"""Where lmms-eval leaves the size to the model (``--batch_size auto``)."""
FILLED_IN = ("\n\n",)
"""What lmms-eval puts into ``until`` where a task names no stop (``TaskConfig``, the mark between few-shot
examples). Its own chat models pass over it: taken for a stop, it would cut every reply of two paragraphs."""

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
SOUNDS = frozenset({".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".opus"})
OURS = frozenset(
    {"until", "do_sample", "max_new_tokens", "max_gen_toks", "temperature", "top_p", "top_k", "seed"}
)
"""Generation settings that :func:`settings` reads. Of others one is named on stderr where it asks for
something."""


def manifest() -> Any:
    """What lmms-eval's registry is told: our name, and a class for each of its interfaces."""
    from lmms_eval.models.registry_v2 import ModelManifest

    here = "tinymodal.eval.lmms"  # not __name__, which is __main__ where somebody runs this file
    return ModelManifest(
        model_id=NAME, simple_class_path=f"{here}.TinyModal", chat_class_path=f"{here}.TinyModalChat"
    )


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt, not yet read: its pictures are opened when its turn comes."""

    where: str
    """``task/split/number``, which every error quotes."""
    context: str
    """lmms-eval's own words for it, for its cache."""
    gen_kwargs: Mapping[str, Any]
    turns: Callable[[], tuple[Message, ...]]


class Likelihood(tuple[float, bool]):
    """Loss and whether it is greedy, on its way through lmms-eval 0.7 to 0.7.3.

    Their ``api/instance.py:unwrap_generation_output`` makes a plain pair a string, on which every task of
    ``multiple_choice`` then fails, so the pair goes as the text of a ``GenerationResult``. From
    ``--use_cache`` it would come back as a string too; it is kept out there by its empty ``strip``.
    """

    __slots__ = ()

    def strip(self) -> str:
        return ""


class Following(NamedTuple):
    """What a task makes of the rounds so far."""

    turns: Callable[[], tuple[Message, ...]] | None
    """Of the next prompt; None: it was the last."""
    outputs: Sequence[str] | None
    """The replies as the task wants them from now on; None: as they are."""
    info: Any
    """What it wants to be told next time."""


class Settings(NamedTuple):
    """How some requests are to be answered; those of the same are batched together."""

    sampling: Sampling
    stops: tuple[str, ...]


class TinyModal(lmms):  # type: ignore[misc, unused-ignore]
    """A composed model, for requests that hold words and a list of media (``is_simple``)."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "float32",
        batch_size: int | str = BATCH_SIZE,
        max_batch_size: int | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        loss: Literal["mean", "sum"] = "mean",
        unreadable: Literal["stop", "empty"] = "stop",
    ) -> None:
        """Load the model.

        Args:
            pretrained: folder of a composed model or of a run, a Hub name, or ``starter``.
            device: None: a GPU if there is one. With several ranks ``cuda`` is the rank's own.
            dtype: of the weights: float32, bfloat16 or float16.
            batch_size: requests that are decoded together; ``auto``: 32.
            max_batch_size: not used; lmms-eval passes it.
            max_new_tokens: of tasks that set none.
            loss: what :meth:`loglikelihood` gives: the mean over the tokens of an answer, or their sum.
            unreadable: what becomes of a request that cannot be read (too long, a broken picture): ``stop``
                ends the run, ``empty`` answers it with no words, which its task counts as wrong, and says
                how many there were.

        Raises:
            CheckpointError: there is no such model.
            RecipeError: a setting that is not one of these.
        """
        super().__init__()
        for name, value, known in (
            ("dtype", dtype, ("float32", "bfloat16", "float16")),
            ("loss", loss, ("mean", "sum")),
            ("unreadable", unreadable, ("stop", "empty")),
        ):
            if value not in known:
                raise RecipeError(f"--model_args {name}={value}: expected {', '.join(known)}.")
        size = str(batch_size)
        if not (size.isdecimal() and int(size)) and size.partition(":")[0] != "auto":
            raise RecipeError(f"--batch_size {size}: expected a number from 1 on, or auto.")
        # lmms-eval deals documents by these, whatever started the processes.
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = device_of(device)
        self.batch_size = int(size) if size.isdecimal() else BATCH_SIZE
        self.max_new_tokens, self.loss, self.unreadable = int(max_new_tokens), loss, unreadable
        self.num_unreadable = 0
        self._pretrained, self._dtype = str(pretrained), getattr(torch, dtype)
        self._drawn = 0
        self._told: set[str] = set()
        self._engine: Engine | None = None
        self._engine = self.engine

    @property
    def engine(self) -> Engine:
        """The model; loaded again if lmms-eval had it cleaned away."""
        if self._engine is None:
            self._engine = Engine(load(self._pretrained, device=str(self.device), dtype=self._dtype))
        return self._engine

    def clean(self) -> None:
        """Give the memory back: lmms-eval may load a judge after the last request."""
        self._engine = None
        super().clean()

    # What lmms-eval asks for

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """A ``GenerationResult`` for each request, in their order."""
        replies = self._answer([self._asked(request.args) for request in requests], "generate_until")
        return [GenerationResult(r.text, TokenCounts(r.tokens_in, r.tokens_out)) for r in replies]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Each request's replies, one a round. Rounds are batched over requests; the task ends them."""
        talks = [self._rounds(request.args) for request in requests]
        given: list[list[str]] = [[] for _ in talks]
        going = {i: next(talk) for i, talk in enumerate(talks)}
        while going:
            replies = self._answer(list(going.values()))
            for (i, asked), reply in zip(list(going.items()), replies, strict=True):
                try:
                    going[i] = talks[i].send(reply.text)
                except StopIteration as end:
                    given[i] = end.value
                    del going[i]
                    key = (asked.context, asked.gen_kwargs)
                    self.cache_hook.add_partial("generate_until_multi_round", key, given[i])
        return given

    @torch.inference_mode()
    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """The loss of each answer and whether greedy decoding would give exactly it, see :class:`Likelihood`.

        A loss, not the log-probability that ``api/model.py`` describes: the tasks take the *smallest* number
        for the likeliest answer (``api/task.py``, ``np.argmin(lls)``), because lmms-eval's own models return
        their loss (its issue 370). As there it is the mean over the answer's tokens, the stop included; with
        ``loss=sum`` it is minus the log-probability.
        """
        found: list[tuple[float, bool]] = []
        with Progress(NAME, len(requests), "answers", shown=self._rank == 0) as progress:
            for chunk in pieces(requests, self.batch_size * WINDOW):
                encoded = [self._answered(request.args) for request in chunk]
                order = sorted(range(len(chunk)), key=lambda i: len(encoded[i]))
                losses: dict[int, tuple[float, bool]] = {}
                for rows in pieces(order, self.batch_size):
                    losses |= zip(rows, self._losses([encoded[i] for i in rows]), strict=True)
                    progress.advance(len(rows))
                found += [losses[i] for i in range(len(chunk))]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args[:2], answer)
        return [GenerationResult(Likelihood(answer)) for answer in found]  # type: ignore[arg-type, unused-ignore]

    # Reading requests

    def _asked(self, args: tuple[Any, ...]) -> Asked:
        """The prompt of a request, or of its first round."""
        context, gen_kwargs, doc_to_visual, *_, doc_id, task, split = args
        where = f"{task}/{split}/{doc_id}"

        def turns() -> tuple[Message, ...]:
            return self._turn(doc_to_visual(self._doc(task, split, doc_id)), context, where)

        return Asked(where, context, gen_kwargs, turns)

    def _following(self, args: tuple[Any, ...], **told: Any) -> Following:
        """What the task asks in the next round."""
        *_, doc_to_text, doc_id, task, split = args
        visuals, context, over, outputs, info = doc_to_text(self._doc(task, split, doc_id), **told)
        turns = None if over else partial(self._turn, visuals, context, f"{task}/{split}/{doc_id}")
        return Following(turns, outputs, info)

    def _rounds(self, args: tuple[Any, ...]) -> Generator[Asked, str, list[str]]:
        """A request of several rounds: yields prompts, is sent the replies, returns them."""
        asked = self._asked(args)
        outputs: list[str] = []
        info: Any = None
        for number in itertools.count(1):
            outputs.append((yield asked))
            turns, given, info = self._following(
                args, round_idx=number, previous_output=list(outputs), previous_round_info=info
            )
            outputs = outputs if given is None else list(given)
            if turns is None:
                break
            asked = replace(asked, turns=turns)
        return outputs

    def _answered(self, args: tuple[Any, ...]) -> Encoded:
        """A request of ``loglikelihood``: the question with the answer whose loss is wanted."""
        if len(args) != 6:
            raise NotImplementedError(
                "the metric acc_mutual_info asks how likely an answer is to no question at all, which a chat "
                "model does not know; choose acc or acc_norm"
            )
        context, answer, doc_to_visual, doc_id, task, split = args
        where, doc = f"{task}/{split}/{doc_id}", self._doc(task, split, doc_id)
        words = answer if isinstance(answer, str) else str(answer(doc))
        # What stands between question and answer is the template's to write, so not target_delimiter's space.
        reply = Message("assistant", (Text(self._plain(words.lstrip(), where)),))
        sample = Sample((*self._turn(doc_to_visual(doc), context, where), reply), where)
        encoded: Encoded = self.engine.encoder(sample)
        if (room := self.engine.room) is not None and len(encoded) > room:
            raise DataError(f"{where}: takes {len(encoded)} tokens, the model reads at most {room}.")
        return encoded

    def _doc(self, task: str, split: str, doc_id: int) -> Any:
        return self.task_dict[task][split][doc_id]

    def _turn(self, visuals: Any, context: str, where: str) -> tuple[Message, ...]:
        """One turn of the user."""
        media = [medium(value, where) for value in visuals or ()]
        return (Message("user", self._placed([*media, Text(context)], where)),)

    def _placed(self, parts: Sequence[Part], where: str) -> tuple[Part, ...]:
        """Parts of a turn with its media at their places, and nothing in its words but words."""
        return tuple(
            Text(self._plain(part.text, where)) if isinstance(part, Text) else part
            for part in in_place(parts)
        )

    def _plain(self, words: str, where: str) -> str:
        """Words that the tokenizer reads as words: ``< s>`` for ``<s>``, which would end the conversation.

        A benchmark's question cannot be mended and should not end the run.
        """

        def apart(found: re.Match[str]) -> str:
            word = found.group()
            self._tell(f"{word!r}, which is a control token of this model, is written apart (first: {where})")
            return f"{word[:1]} {word[1:]}"

        return self._control.sub(apart, words) if self._control is not None else words

    @cached_property
    def _control(self) -> re.Pattern[str] | None:
        """Spellings that the encoder refuses in words."""
        added = self.engine.tokenizer.added_tokens_decoder.values()
        control = {token.content for token in added if token.special}
        control |= {*self.engine.encoder.template.control, *(word for word, _ in self.engine.places.values())}
        return alternatives(sorted(control))

    # Answering

    def _answer(self, asked: Sequence[Asked], hook: str = "") -> list[Reply]:
        """Replies in order; requests of the same settings are batched together."""
        alike: dict[Settings, list[int]] = {}
        for i, each in enumerate(asked):
            found, left_out = settings(each.gen_kwargs, self.max_new_tokens)
            alike.setdefault(found, []).append(i)
            for name in left_out:
                self._tell(f"{name} of the generation settings is not used (first: {each.where})")
        replies: dict[int, Reply] = {}
        before = self.num_unreadable
        with Progress(NAME, len(asked), "requests", shown=self._rank == 0) as progress:
            for group, members in alike.items():
                chance = group.sampling.temperature > 0
                for rows in pieces(members, self.batch_size * (1 if chance else WINDOW)):
                    sampling = group.sampling
                    if chance:
                        # The engine begins every batch with the seed, and --repeats wants other draws.
                        sampling = replace(sampling, seed=sampling.seed + self._drawn)
                        self._drawn += 1
                    samples = {i: sample for i in rows if (sample := self._sample(asked[i])) is not None}
                    with stopping(self.engine, group.stops):
                        said = self.engine.reply(
                            list(samples.values()), sampling, self.batch_size, done=progress.advance
                        )
                    given = dict(zip(samples, said, strict=True))
                    for i in rows:
                        replies[i] = given.get(i, NO_WORDS)
                        if hook:
                            key = (asked[i].context, asked[i].gen_kwargs)
                            self.cache_hook.add_partial(hook, key, replies[i].text)
        if more := self.num_unreadable - before:
            say(f"{more:,} of {len(asked):,} requests could not be read and were answered with no words")
        return [replies[i] for i in range(len(asked))]

    def _sample(self, asked: Asked) -> Sample | None:
        """What is put to the engine; None where it cannot be read and the run goes on all the same."""
        try:
            sample = Sample(asked.turns(), asked.where)
            if self.unreadable == "empty":
                self.engine.encode(sample)
        except DataError as error:
            if self.unreadable == "stop":
                raise
            self.num_unreadable += 1
            say(f"not read: {error}")
            return None
        return sample

    def _losses(self, rows: Sequence[Encoded]) -> list[tuple[float, bool]]:
        """Loss of each row's labels, and whether each of them is the likeliest token."""
        model, config = self.engine.model, self.engine.model.config
        pad = self.engine.tokenizer.pad_token_id
        batch = collate(
            [[row] for row in rows],
            next(iter(self.engine.stop_ids)) if pad is None else pad,
            -1 if config.image_token_id is None else config.image_token_id,
            audio_token_id=config.audio_token_id,
        )
        inputs = {name: moved(value, self.device, model.dtype) for name, value in batch.inputs().items()}
        states_ND = model.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        logits_NV = model.head(states_ND[batch.target_index.to(self.device)]).float()
        target_N = batch.target_ids.to(self.device)
        loss_N = torch.nn.functional.cross_entropy(logits_NV, target_N, reduction="none").double()
        for _, place_id in self.engine.places.values():
            logits_NV[:, place_id] = -torch.inf  # no reply holds one, see Engine
        hit_N = logits_NV.argmax(-1) == target_N
        sizes = [int((row.labels != IGNORE).sum()) for row in rows]
        return [
            (float(loss.sum() if self.loss == "sum" else loss.mean()), bool(hit.all()))
            for loss, hit in zip(loss_N.split(sizes), hit_N.split(sizes), strict=True)
        ]

    def _tell(self, text: str) -> None:
        """Say it, once for what stands before the bracket."""
        what = text.partition(" (first:")[0]
        if what not in self._told:
            self._told.add(what)
            say(text)


class TinyModalChat(TinyModal):
    """The same model, for requests that hold turns: the default."""

    is_simple = False

    def _asked(self, args: tuple[Any, ...]) -> Asked:
        context, doc_to_messages, gen_kwargs, doc_id, task, split = args
        where = f"{task}/{split}/{doc_id}"

        def turns() -> tuple[Message, ...]:
            return self._turns(doc_to_messages(self._doc(task, split, doc_id)), where)

        return Asked(where, context, gen_kwargs, turns)

    def _following(self, args: tuple[Any, ...], **told: Any) -> Following:
        _, doc_to_messages, _, doc_id, task, split = args
        more = doc_to_messages(self._doc(task, split, doc_id), **told)
        if not (isinstance(more, tuple) and len(more) == 4):
            return Following(None, None, None)  # turns alone: the task knows one round
        messages, over, outputs, info = more
        turns = None if over else partial(self._turns, messages, f"{task}/{split}/{doc_id}")
        return Following(turns, outputs, info)

    def _turns(self, messages: Sequence[Mapping[str, Any]], where: str) -> tuple[Message, ...]:
        """lmms-eval's turns as ours; two of one side in a row are one."""
        turns: list[Message] = []
        for message in messages:
            content = message["content"]
            content = [{"type": "text", "text": content}] if isinstance(content, str) else content
            parts = self._placed([part_of(item, where) for item in content], where)
            if turns and turns[-1].role == message["role"]:
                parts = (*turns.pop().parts, Text("\n"), *parts)
            if message["role"] != "system" or any(part != Text("") for part in parts):
                turns.append(Message(message["role"], parts))
        return tuple(turns)


NO_WORDS = Reply("", 0, 0, "stop", "")
"""To what could not be read."""


def settings(given: Mapping[str, Any], max_new_tokens: int = MAX_NEW_TOKENS) -> tuple[Settings, list[str]]:
    """A task's ``generation_kwargs`` in our words, and ``name=value`` of those that we cannot follow.

    As in transformers, ``do_sample = False`` is greedy whatever the temperature says, and ``do_sample =
    True`` alone has temperature 1. Without it a temperature above 0 is wanted as such.

    Args:
        given: not changed; lmms-eval's cache knows a reply by them.
        max_new_tokens: where they set none.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    chance = asked.get("do_sample", True)
    temperature = float(asked.get("temperature", 1.0 if asked.get("do_sample") else 0.0))
    top_p = float(asked.get("top_p", 1.0))
    unused = f"temperature={temperature:g} beside do_sample=False" if not chance and temperature else None
    if not chance or top_p <= 0:  # some tasks write top_p = 0 for the likeliest token
        temperature = 0.0
    longest = int(asked.get("max_new_tokens", asked.get("max_gen_toks", max_new_tokens)))
    sampling = Sampling(max_new_tokens=longest)
    if temperature > 0:
        top_k, seed = int(asked.get("top_k", 0)), int(asked.get("seed", 0))
        sampling = replace(
            sampling, temperature=temperature, top_p=min(top_p, 1.0), top_k=max(top_k, 0), seed=seed
        )
    until = asked.get("until", ())
    stops = tuple(word for word in ([until] if isinstance(until, str) else until) if word)
    # One beam, a penalty of 1 and a switch that is off ask for nothing.
    idle = {name for name, value in asked.items() if value is not True and value in (0, 1)}
    left_out = [f"{name}={value!r}" for name, value in asked.items() if name not in OURS | idle]
    if unused is not None:
        left_out.append(unused)
    return Settings(sampling, () if stops == FILLED_IN else stops), left_out


def part_of(item: Mapping[str, Any], where: str) -> Part:
    """One part of a turn: ``{"type": "text", "text"}``, or a medium under ``url``."""
    if item["type"] == "text":
        return Text(item["text"])
    return medium(item["url"], where, item["type"])


def medium(value: Any, where: str, kind: str = "") -> Medium:
    """A picture or a sound as tasks hand them over.

    Args:
        value: a PIL picture; a path; samples ``{"array", "sampling_rate"}`` or the decoder of ``datasets``;
            ``{"bytes", "path"}`` as ``datasets`` leaves a file.
        where: for the error.
        kind: what lmms-eval takes it for: ``image``, ``audio`` or ``video``. It calls every mapping and every
            path without a known ending a video, so the value itself counts more.

    Raises:
        DataError: it is a video, an address, or nothing that can be seen or heard.
    """
    if isinstance(value, PIL.Image.Image):
        return Image(value)
    if hasattr(value, "get_all_samples"):
        samples = value.get_all_samples()
        return Audio(samples.data, int(samples.sample_rate))
    if isinstance(value, Mapping):
        if value.get("array") is not None:
            return Audio(as_samples(value["array"]), int(value["sampling_rate"]))
        if isinstance(value.get("bytes"), bytes):
            heard = kind == "audio" or Path(value.get("path") or "").suffix.lower() in SOUNDS
            return Audio(value["bytes"]) if heard else Image(value["bytes"])
        value = next((value[key] for key in ("url", "path") if value.get(key) is not None), value)
    if isinstance(value, str | Path):
        ending = Path(value).suffix.lower()
        if re.match(r"(https?|data):", str(value)):
            raise DataError(
                f"{where}: {str(value)[:60]!r} is an address; expected a file. Nothing is fetched."
            )
        if kind == "audio" or ending in SOUNDS:
            return Audio(Path(value))
        if kind == "image" or ending in PICTURES:
            return Image(Path(value))
    found = repr(value) if isinstance(value, str | Path) else f"a {type(value).__name__}"
    raise DataError(
        f"{where}: found {found[:80]}, a video as lmms-eval hands them over; expected pictures and sounds. "
        f"This model sees no videos: leave the task out."
    )


def as_samples(array: Any) -> torch.Tensor:
    """A numpy sound as ours, float32 [samples] or [channels, samples]; whole numbers become full scale 1."""
    samples = np.asarray(array)
    if samples.dtype.kind == "i":
        samples = samples / -float(np.iinfo(samples.dtype).min)
    if samples.ndim == 2 and samples.shape[0] > samples.shape[1]:  # soundfile lays channels side by side
        samples = samples.T
    return torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))


def in_place(parts: Sequence[Part]) -> list[Part]:
    """Media that stand before the words go where the words have ``<image>`` and ``<audio>`` for them.

    That is how tasks write pictures between words for models of LLaVA's kind. Where marks and media differ
    in number, the marks are words like others and the media stay in front.
    """
    media = list(itertools.takewhile(lambda part: not isinstance(part, Text), parts))
    texts = [part.text for part in parts[len(media) :] if isinstance(part, Text)]
    if not media or len(media) + len(texts) < len(parts):
        return list(parts)
    words = "".join(texts)
    waiting = {
        mark: iter(of_kind)
        for mark, kind in ((PLACE, Image), (SOUND_PLACE, Audio))
        if (of_kind := [part for part in media if isinstance(part, kind)])
        and words.count(mark) == len(of_kind)
    }
    if not waiting:
        return list(parts)
    front = [part for part in media if (PLACE if isinstance(part, Image) else SOUND_PLACE) not in waiting]
    cut = re.split(f"({'|'.join(waiting)})", words)
    return [*front, *(next(waiting[word]) if word in waiting else Text(word) for word in cut if word)]


def pieces(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """``items``, ``size`` at a time."""
    return (items[first : first + size] for first in range(0, len(items), size))


@contextmanager
def stopping(engine: Engine, words: Sequence[str]) -> Iterator[None]:
    """An engine that stops at these words as well as at its template's."""
    own = engine.stop_words
    engine.stop_words = (*own, *words)
    try:
        yield
    finally:
        engine.stop_words = own


def device_of(name: str | None) -> torch.device:
    """The device of this rank.

    Raises:
        RecipeError: a GPU was asked for and there is none.
    """
    cuda = torch.cuda.is_available()
    name = name or ("cuda" if cuda else "cpu")
    if name.startswith("cuda") and not cuda:
        raise RecipeError(f"--device {name}: torch sees no GPU here; leave the option out to use the CPU.")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)


def moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Tensors where the model is; floating point in its type."""
    if isinstance(value, tuple):
        return tuple(moved(each, device, dtype) for each in value)
    return value.to(device, dtype if value.is_floating_point() else None)
