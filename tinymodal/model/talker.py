"""A talker: frame after frame of a codec, in turn with the tokens of the answer.

Tokens and columns of frames take turns in one causal sequence: ``read`` tokens, up to ``write`` columns, the
next tokens, and so on (LLaMA-Omni 2, arXiv:2505.02625; CosyVoice 2, arXiv:2412.10117), so that it speaks
while the text is still growing. Several codebooks are written one column late each, see ``delay.py``.

It is not told where in the sound a token is spoken, and learns it within what the turns allow. Two rules of
our own keep it from guessing. A turn never writes a larger share of the frames than was read of the tokens,
less one: where it would, it ends early, with HOLD, so an answer that is spoken fast is not guessed ahead of
its text. And END may follow only once the text is over, which a learned mark tells: speech does not end
before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .delay import delayed, pick, undelay
from .speech_head import Answers, Loss, Memory, Speaker, SpeechHead
from .unit_decoder import UnitDecoder

# Shapes: Z answers, P tokens of all, G frames of all, Q codebooks, V codes of a book, C columns of all,
# M places of all sequences, N of them that predict, D language width, W width of the head.

IGNORE = -100
"""Label of what is not predicted."""


class Turns(NamedTuple):
    """How tokens and columns of one answer follow each other."""

    stretches: tuple[int, ...]
    """Columns that are written after each ``read`` tokens."""
    held: tuple[bool, ...]
    """Of each stretch: whether it ends with HOLD."""
    columns: int
    """All columns, those after the end of the text included."""


def turns(tokens: int, frames: int, books: int, read: int, write: int) -> Turns:
    """The turns of an answer of so many tokens and frames."""
    stretches: list[int] = []
    held: list[bool] = []
    written = 0
    for heard in range(read, tokens + 1, read):
        # A token behind the even share: where the first tokens are the short ones, an even share would reach
        # into sounds of tokens that were not read.
        allowed = min(written + write, frames * (heard - 1) // tokens)
        stretches.append(allowed - written)
        held.append(allowed < written + write)
        written = allowed
    # END is the first book's frame after the last; the last book's last frame comes after books - 1 columns.
    return Turns(tuple(stretches), tuple(held), frames + max(books - 1, 1))


class Plan(NamedTuple):
    """A batch of answers as one sequence of places."""

    lengths: list[int]
    """Places of each answer."""
    take_M: Tensor
    """int64: what stands at each place, of voices, tokens, the mark for the end of the text, and columns."""
    from_N: Tensor
    """int64: the places that predict,"""
    what_N: Tensor
    """and what: the columns of all answers, and HOLD behind them."""


def _plan(tokens: Sequence[int], each: Sequence[Turns], read: int) -> Plan:
    """Where everything stands. Plain integers, on the CPU."""
    hold = sum(t.columns for t in each)
    mark = len(tokens) + sum(tokens)
    take: list[int] = []
    come_from: list[int] = []
    what: list[int] = []
    lengths: list[int] = []
    token, column = len(tokens), 0
    for z, (num, planned) in enumerate(zip(tokens, each, strict=True)):
        before, last_token, last_column = len(take), token + num, column + planned.columns
        take.append(z)
        for stretch, held in zip(planned.stretches, planned.held, strict=True):
            take += range(token, token + read)
            token += read
            # Each place predicts what stands at the next.
            come_from += range(len(take) - 1, len(take) - 1 + stretch)
            what += range(column, column + stretch)
            take += range(mark + 1 + column, mark + 1 + column + stretch)
            column += stretch
            if held:
                come_from.append(len(take) - 1)
                what.append(hold)
        take += (*range(token, last_token), mark)
        come_from += range(len(take) - 1, len(take) - 1 + last_column - column)
        what += range(column, last_column)
        # The last column is predicted, and nothing after it.
        take += range(mark + 1 + column, mark + last_column)
        token, column = last_token, last_column
        lengths.append(len(take) - before)
    return Plan(lengths, torch.tensor(take), torch.tensor(come_from), torch.tensor(what))


class Talker(SpeechHead):
    """Frame after frame, several books with a delay, tokens and frames in turn."""

    measures = ("speech_right",)

    def __init__(
        self, width_D: int, *, read: int = 2, write: int = 10, longest: int = 100, **shared: Any
    ) -> None:
        """See :class:`SpeechHead`.

        Args:
            width_D: of the language model.
            read: tokens that are read before each stretch of frames.
            write: frames that are written after them.
            longest: frames for each token at most when speaking: where a head never ends, its speech does.
            **shared: see there.
        """
        super().__init__(width_D, **shared)
        if min(read, write, longest) < 1:
            raise ValueError(f"read {read}, write {write} and longest {longest} must be at least 1")
        self.read, self.write, self.longest = read, write, longest
        # Of every book one code more: nothing here, before it begins and after it has ended.
        self.codes = nn.Embedding(self.books * (self.book_size + 1), self.width)
        self.end_of_text = nn.Embedding(1, self.width)
        # Two more for END and HOLD; only the first book has them, the others' are never asked.
        self.predict = nn.Linear(self.width, self.books * (self.book_size + 2))
        with torch.no_grad():
            # A sum of Q of them is as long as a token.
            self.codes.weight.mul_((3 * self.books) ** -0.5)
        self.end, self.hold, self.nothing = self.book_size, self.book_size + 1, self.book_size

    def count(self, frames: Sequence[int]) -> int:
        """Codes, and END of each answer. HOLD is learned too, and is none of what was said."""
        return self.books * sum(frames) + len(frames)

    def forward(self, answers: Answers) -> Loss:
        """See :meth:`SpeechHead.loss`. ``speech_right``: codes that are the likeliest, END among them."""
        logits_NQV, targets_NQ = self.taught(answers)
        loss = F.cross_entropy(
            logits_NQV.flatten(0, 1).float(), targets_NQ.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        with torch.no_grad():
            said_NQ = (targets_NQ != IGNORE) & (targets_NQ != self.hold)
            right = ((logits_NQV.argmax(-1) == targets_NQ) & said_NQ).sum().float()
        return loss, self.count(answers.frames), {"speech_right": right}

    def taught(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """Logits where something is predicted, [N, Q, V + 2], and what it is, int64 [N, Q].

        Answer by answer and in order; ``IGNORE`` where a column has no frame of a book.
        """
        codes_QG, frames, device = answers.codes_QG, answers.frames, answers.codes_QG.device
        each = [
            turns(num, length, self.books, self.read, self.write)
            for num, length in zip(answers.tokens, frames, strict=True)
        ]
        columns = [planned.columns for planned in each]
        index_QC = delayed(frames, columns, self.books)
        plan = _plan(answers.tokens, each, self.read)
        x_MW = torch.cat(
            (
                self.voices_of(answers),
                self.tokens(answers.states_PD, answers.words_PD),
                self.end_of_text.weight,
                self.embed(pick(codes_QG, index_QC, self.nothing)),
            )
        ).index_select(0, plan.take_M.to(device))
        x_MW = self.run_apart(x_MW, plan.lengths)
        logits_NQV = self.logits(x_MW.index_select(0, plan.from_N.to(device)))

        columns_Z = torch.tensor(columns)
        targets_QC = pick(codes_QG, index_QC, IGNORE)
        targets_QC[0, (columns_Z.cumsum(0) - columns_Z + torch.tensor(frames)).to(device)] = self.end
        hold_Q1 = targets_QC.new_full((self.books, 1), IGNORE)
        hold_Q1[0] = self.hold
        return logits_NQV, torch.cat((targets_QC, hold_Q1), 1).T.index_select(0, plan.what_N.to(device))

    def embed(self, columns_QC: Tensor) -> Tensor:
        """Columns as the blocks read them, [C, W]."""
        shift_Q1 = torch.arange(self.books, device=columns_QC.device)[:, None] * (self.book_size + 1)
        return self.codes(columns_QC + shift_Q1).sum(0)

    def logits(self, x_NW: Tensor) -> Tensor:
        """[N, W] -> [N, Q, V + 2]."""
        return self.predict(x_NW).unflatten(-1, (self.books, -1))

    def begin(
        self, voice: int | Tensor = 0, *, temperature: float = 0.0, top_k: int = 0, seed: int = 0
    ) -> TalkerSpeaker:
        """See :meth:`SpeechHead.begin`."""
        return TalkerSpeaker(self, voice, temperature, top_k, seed)


class TalkerSpeaker(Speaker):
    """See :meth:`SpeechHead.begin`."""

    @torch.inference_mode()
    def __init__(self, head: Talker, voice: int | Tensor, temperature: float, top_k: int, seed: int) -> None:
        self.head, self.temperature, self.top_k = head, temperature, top_k
        self.random = torch.Generator(head.device).manual_seed(seed)
        self.memory = Memory(head)
        # What stands at the next places; run when something is to be predicted from the last of them.
        self.waiting = [head.voice_of(voice)]
        self.unread: list[Tensor] = []
        self.num_tokens = 0
        self.columns: list[Tensor] = []
        self.frames: int | None = None
        """How many there are, once that is known."""
        self.given = 0

    @torch.inference_mode()
    def feed(self, state_1D: Tensor, word_1D: Tensor) -> Tensor:
        head = self.head
        read_PW = head.tokens(state_1D.to(head.device), word_1D.to(head.device))
        for token_1W in read_PW.split(1):
            self.unread.append(token_1W)
            self.num_tokens += 1
            if len(self.unread) == head.read:
                self._read()
                self._write(head.write, over=False)
        return self._new()

    def rest(self) -> Iterator[Tensor]:
        self._read()
        self.waiting.append(self.head.end_of_text.weight)
        ended = False
        while not ended:
            # Not around the whole: what is yielded to would be in this mode too.
            with torch.inference_mode():
                ended = self._write(self.head.write, over=True)
                new_Qf = self._new()
            yield new_Qf

    def _read(self) -> None:
        self.waiting += self.unread
        self.unread = []

    def _write(self, most: int, over: bool) -> bool:
        """Write up to ``most`` columns; whether the speech has ended. ``over``: whether the text has."""
        for _ in range(most):
            chosen_Q = self._choose(self._logits(), over)
            if chosen_Q is None:
                return False
            self.columns.append(chosen_Q)
            self.waiting.append(self.head.embed(chosen_Q[:, None]))
            if self.frames is not None and len(self.columns) >= self.frames + self.head.books - 1:
                return True
        return False

    def _logits(self) -> Tensor:
        """Of the next column, float32 [Q, V + 2]."""
        x_MW = self.memory.run(torch.cat(self.waiting))
        self.waiting = []
        return self.head.logits(x_MW[-1:])[0].float()

    def _choose(self, logits_QV: Tensor, over: bool) -> Tensor | None:
        """The next column, int64 [Q]; None: HOLD."""
        head, number = self.head, len(self.columns)
        logits_QV[1:, head.end :] = -torch.inf
        # Speech neither ends before its text nor without a sound, and what has no more text reads no more.
        may_end = over and number > 0 and self.frames is None
        logits_QV[0, head.end] = logits_QV[0, head.end] if may_end else -torch.inf
        logits_QV[0, head.hold] = -torch.inf if over else logits_QV[0, head.hold]
        chosen_Q = self._draw(logits_QV)
        if self.frames is None:
            first = int(chosen_Q[0])
            if first == head.hold:
                return None
            if first == head.end or (over and number >= head.longest * self.num_tokens):
                self.frames = number
        frames = number + 1 if self.frames is None else self.frames
        frame_Q = number - torch.arange(head.books, device=chosen_Q.device)
        return chosen_Q.masked_fill((frame_Q < 0) | (frame_Q >= frames), head.nothing)

    def _draw(self, logits_QV: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits_QV.argmax(-1)
        logits_QV = logits_QV / self.temperature
        if 0 < self.top_k < logits_QV.shape[-1]:
            least_Q1 = logits_QV.topk(self.top_k).values[:, -1:]
            logits_QV = logits_QV.masked_fill(logits_QV < least_Q1, -torch.inf)
        return torch.multinomial(logits_QV.softmax(-1), 1, generator=self.random)[:, 0]

    def _new(self) -> Tensor:
        """Frames that are whole and were not given yet, int64 [Q, f]."""
        books = self.head.books
        whole = max(len(self.columns) - books + 1, 0)
        whole = whole if self.frames is None else min(whole, self.frames)
        first, self.given = self.given, whole
        if whole == first:
            return torch.empty(books, 0, dtype=torch.int64, device=self.head.device)
        return undelay(torch.stack(self.columns[first : whole + books - 1], dim=1))


DESIGNS: dict[str, type[SpeechHead]] = {"talker": Talker, "units": UnitDecoder}
SHARED = frozenset({"books", "book_size", "layers", "width", "heads", "voices", "reference"})
OWN = {"talker": frozenset({"read", "write", "longest"}), "units": frozenset({"upsample"})}


def build_speech_head(config: Mapping[str, Any], width_D: int) -> SpeechHead:
    """The head that a config describes.

    Args:
        config: ``design`` (``talker``, which is the default, or ``units``), ``books`` and ``book_size``; and,
            each with a default, ``layers``, ``width``, ``heads``, ``voices``, ``reference``, ``read``,
            ``write`` and ``longest`` (talker) and ``upsample`` (units). ``codec`` and the other design's keys
            are not read.
        width_D: of the language model.

    Raises:
        ValueError: an unknown design or key, or sizes that do not fit together.
    """
    design = config.get("design", "talker")
    if design not in DESIGNS:
        raise ValueError(f"unknown design '{design}' of a speech head; known: {', '.join(DESIGNS)}")
    known = SHARED.union(*OWN.values()) | {"design", "codec"}
    for key in config:
        if key not in known:
            raise ValueError(f"unknown key '{key}' of a speech head; known: {', '.join(sorted(known))}")
    for key in ("books", "book_size"):
        if not isinstance(config.get(key), int):
            raise ValueError(f"a speech head needs '{key}', as its codec has it; got {config.get(key)}")
    kept = {key: value for key, value in config.items() if key in SHARED | OWN[design]}
    return DESIGNS[design](width_D, **kept)
