"""What every speech head is made of: voices, how a token is read, the blocks, and its two verbs.

A speech head stands beside the language model and changes nothing about the text. Of every token of an answer
it reads the last state that predicted it and its word embedding, and gives frames of a codec. The designs are
in ``talker.py`` and ``unit_decoder.py``. Both are causal, so the same blocks run over whole answers that lie
end to end (:class:`Apart`) and over one that grows (:class:`Memory`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Shapes: Z answers, P tokens of all, G frames of all, Q codebooks, M places of all sequences, L places of the
# longest, D language width, W width of the head, A attention heads, H width of one.

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(number of the block, q, k, v), each [M, A, H] -> what each place attends to, [M, A, H]."""
Loss = tuple[Tensor, int, dict[str, Tensor]]
"""Sum of the loss, float32 []; what it is a sum over; and measures, sums over the same."""


class Answers(NamedTuple):
    """Spoken answers, end to end."""

    states_PD: Tensor
    """Of every token the last state that predicted it."""
    words_PD: Tensor
    """The tokens' word embeddings."""
    tokens: tuple[int, ...]
    """Tokens of each answer, in sum P."""
    codes_QG: Tensor
    """int64, of the books that the head speaks."""
    frames: tuple[int, ...]
    """Frames of each answer, in sum G."""
    voices_Z: Tensor
    """int64"""


class SpeechHead(nn.Module, ABC):
    """States of answers in, frames out; trained by :meth:`loss`, heard by :meth:`begin`."""

    measures: tuple[str, ...] = ()
    """Names of what :meth:`loss` tells beside the loss."""

    def __init__(
        self,
        width_D: int,
        *,
        books: int,
        book_size: int,
        layers: int = 2,
        width: int | None = None,
        heads: int | None = None,
        voices: Sequence[str] = (),
        reference: int = 0,
    ) -> None:
        """Make the shared parts.

        Args:
            width_D: of the language model's states and word embeddings.
            books: codebooks that are spoken.
            book_size: codes of each book.
            layers: blocks.
            width: of the blocks; None: ``width_D``.
            heads: of attention; None: one for 64 of the width, at least four where it can be cut so. (Of the
                width 96, four spoke 49 of 60 made answers rightly after 300 steps, one spoke 30.)
            voices: names; none: one voice without a name.
            reference: numbers that a voice unknown by name is told by, taken from a clip of it. Half of the
                answers then train on their own sound's. 0: voices by name only.

        Raises:
            ValueError: sizes that do not fit together.
        """
        super().__init__()
        width = width or width_D
        fitting = (n for n in range(max(4, width // 64), 0, -1) if width % (2 * n) == 0)
        heads = heads or next(fitting, 1)
        if width % (2 * heads):
            raise ValueError(f"a speech head of width {width} has {heads} heads; expected an even part each")
        if min(books, book_size, layers) < 1:
            raise ValueError(f"a speech head of {books} books of {book_size} codes and {layers} layers")
        self.books, self.book_size, self.voices = books, book_size, tuple(voices)
        self.width, self.heads = width, heads
        self.voice = nn.Embedding(max(1, len(self.voices)), width)
        self.tokens = TokenReader(width_D, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.reference = Reference(books, book_size, reference, width) if reference else None

    @property
    def device(self) -> torch.device:
        return self.voice.weight.device

    def loss(
        self,
        states_PD: Tensor,
        words_PD: Tensor,
        tokens: Sequence[int],
        codes_QG: Tensor,
        frames: Sequence[int],
        voices_Z: Tensor,
    ) -> Loss:
        """How unlikely the head finds spoken answers; the arguments are :class:`Answers`.

        Raises:
            ValueError: codes of fewer books than the head speaks.
        """
        codes_QG = self.spoken(codes_QG)
        answers = Answers(states_PD, words_PD, tuple(tokens), codes_QG, tuple(frames), voices_Z)
        # Through __call__, so that what is hooked to the module, as sharding is, happens.
        found: Loss = self(answers)
        return found

    @abstractmethod
    def forward(self, answers: Answers) -> Loss:
        """See :meth:`loss`."""

    @abstractmethod
    def count(self, frames: Sequence[int]) -> int:
        """What the loss of answers of so many frames is a sum over."""

    @abstractmethod
    def begin(
        self, voice: int | Tensor = 0, *, temperature: float = 0.0, top_k: int = 0, seed: int = 0
    ) -> Speaker:
        """Begin to speak one answer.

        Args:
            voice: its number; or codes of a clip, int64 [Q, F], if the head was made with ``reference``.
            temperature: 0 takes the likeliest codes.
            top_k: the likeliest codes that stay in play; 0 keeps all.
            seed: of the choice.

        Raises:
            ValueError: no such voice, or a choice that the design does not have.
        """

    def spoken(self, codes_QG: Tensor) -> Tensor:
        """The books that this head speaks.

        Raises:
            ValueError: there are fewer.
        """
        if len(codes_QG) < self.books:
            raise ValueError(f"codes of {len(codes_QG)} books for a speech head that speaks {self.books}")
        return codes_QG[: self.books]

    def voices_of(self, answers: Answers) -> Tensor:
        """What each answer's sequence begins with, [Z, W]."""
        named_ZW: Tensor = self.voice(answers.voices_Z)
        if self.reference is None:
            return named_ZW
        heard_ZW = self.reference(answers.codes_QG, answers.frames)
        # By the answer's own length: half of them, without chance and whatever stands beside them.
        odd_Z = torch.tensor([length % 2 == 1 for length in answers.frames], device=named_ZW.device)
        return torch.where(odd_Z[:, None], heard_ZW, named_ZW)

    def voice_of(self, voice: int | Tensor) -> Tensor:
        """What a sequence in this voice begins with, [1, W].

        Raises:
            ValueError: no such voice; a clip for a head that knows voices by name only; a clip without a
                frame, or codes that are none of this head's.
        """
        if isinstance(voice, Tensor):
            if self.reference is None:
                raise ValueError("this speech head knows voices by name only, and was given a clip")
            if voice.dim() != 2 or not voice.numel() or voice.is_floating_point():
                raise ValueError(
                    f"a clip of a voice is codes, int64 [books, frames], at least one frame; got "
                    f"{str(voice.dtype).removeprefix('torch.')} {list(voice.shape)}"
                )
            codes_QF = self.spoken(voice).to(self.device)
            least, most = int(codes_QF.min()), int(codes_QF.max())
            if least < 0 or most >= self.book_size:
                raise ValueError(
                    f"a clip with the codes {least} to {most} for a speech head of {self.book_size}; encode "
                    f"it with the model's own codec"
                )
            heard: Tensor = self.reference(codes_QF, (codes_QF.shape[1],))
            return heard
        known = self.voice.num_embeddings
        if not 0 <= voice < known:
            raise ValueError(f"voice {voice} of a speech head with {known}")
        return self.voice.weight[voice : voice + 1]

    def run(self, x_MW: Tensor, positions_M: Tensor, attend: Attend) -> Tensor:
        """The blocks and the last norm, [M, W] -> [M, W]."""
        turns = turns_of(positions_M, self.width // self.heads)
        for number, block in enumerate(self.blocks):
            x_MW = block(x_MW, turns, number, attend)
        normed: Tensor = self.norm(x_MW)
        return normed

    def run_apart(self, x_MW: Tensor, lengths: Sequence[int]) -> Tensor:
        """:meth:`run` over sequences of these lengths that lie end to end."""
        positions_M = torch.cat([torch.arange(length) for length in lengths]).to(x_MW.device)
        return self.run(x_MW, positions_M, Apart(lengths, x_MW.device))


class Speaker(ABC):
    """One answer being spoken. What is said does not depend on how its tokens are handed over."""

    @abstractmethod
    def feed(self, state_1D: Tensor, word_1D: Tensor) -> Tensor:
        """Hear of the next token, or of several.

        Args:
            state_1D: the last state that predicted it, [1, D].
            word_1D: its word embedding.

        Returns:
            Frames that are new and final, int64 [Q, f]; f may be 0.
        """

    @abstractmethod
    def rest(self) -> Iterator[Tensor]:
        """The text is over: the frames that are left, in stretches, int64 [Q, f] each."""

    def finish(self) -> Tensor:
        """The text is over: all frames that are left, int64 [Q, f]."""
        return torch.cat(list(self.rest()), dim=1)


class TokenReader(nn.Module):
    """State and word of a token -> one vector; a gate says how much of each (LLaMA-Omni 2)."""

    def __init__(self, width_D: int, width: int) -> None:
        super().__init__()
        # States of some families are hundreds long, and their word embeddings a hundredth.
        self.state_norm = nn.RMSNorm(width_D, eps=1e-6)
        self.word_norm = nn.RMSNorm(width_D, eps=1e-6)
        self.gate = nn.Linear(2 * width_D, width)
        self.state = nn.Linear(width_D, width)
        self.word = nn.Linear(width_D, width)

    def forward(self, states_PD: Tensor, words_PD: Tensor) -> Tensor:
        dtype = self.state.weight.dtype
        states_PD, words_PD = self.state_norm(states_PD.to(dtype)), self.word_norm(words_PD.to(dtype))
        gate_PW = self.gate(torch.cat((states_PD, words_PD), dim=-1)).sigmoid()
        return gate_PW * self.state(states_PD) + (1 - gate_PW) * self.word(words_PD)


class Reference(nn.Module):
    """A clip of a voice -> what a sequence begins with: the mean of its codes, through a narrow place.

    The mean forgets the order of the frames, and the narrow place most of what was said, so that in training
    an answer's own sound may stand for its voice.
    """

    def __init__(self, books: int, book_size: int, narrow: int, width: int) -> None:
        super().__init__()
        self.book_size = book_size
        self.codes = nn.Embedding(books * book_size, narrow)
        self.out = nn.Linear(narrow, width)

    def forward(self, codes_QG: Tensor, frames: Sequence[int]) -> Tensor:
        shift_Q1 = torch.arange(len(codes_QG), device=codes_QG.device)[:, None] * self.book_size
        each_GN = self.codes(codes_QG + shift_Q1).mean(0)
        means = [stretch.mean(0) for stretch in each_GN.split(list(frames))]
        return self.out(torch.stack(means))


class Block(nn.Module):
    """Attention with turned positions, and a gated MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        # With a gate 8/3 of the width costs what 4 does without; a multiple of 8.
        inner = -(-8 * width // 24) * 8
        self.up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x_MW: Tensor, turns: tuple[Tensor, Tensor], number: int, attend: Attend) -> Tensor:
        q_MAH, k_MAH, v_MAH = self.qkv(self.norm(x_MW)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        heard_MAH = attend(number, turned(q_MAH, turns), turned(k_MAH, turns), v_MAH)
        x_MW = x_MW + self.out(heard_MAH.flatten(1))
        gate, value = self.up(self.mlp_norm(x_MW)).chunk(2, dim=-1)
        return x_MW + self.down(F.silu(gate) * value)


def turns_of(positions_M: Tensor, width_H: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, float32 [M, 1, H] each (RoFormer, arXiv:2104.09864)."""
    # No buffer: one that is not saved is lost where transformers builds a model without numbers in it.
    steps = torch.arange(0, width_H, 2, device=positions_M.device, dtype=torch.float32)
    angles = positions_M[:, None, None].float() * 10_000.0 ** (-steps / width_H)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def turned(x_MAH: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys, turned by their positions."""
    cos, sin = turns
    first, second = x_MAH.float().chunk(2, dim=-1)
    return (x_MAH.float() * cos + torch.cat((-second, first), dim=-1) * sin).to(x_MAH.dtype)


class Apart:
    """Attention of sequences that lie end to end, each causal and to itself.

    For the attention alone they stand side by side, filled up at their ends, where no causal query looks.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        longest = max(lengths)
        self.shape = (len(lengths), longest)
        self.take: Tensor | None = None
        if sum(lengths) < len(lengths) * longest:
            lengths_Z1 = torch.tensor(lengths)[:, None]
            starts_Z1 = lengths_Z1.cumsum(0) - lengths_Z1
            place_1L = torch.arange(longest)[None]
            self.take = (starts_Z1 + place_1L.minimum(lengths_Z1 - 1)).flatten().to(device)
            own = [torch.arange(length) + z * longest for z, length in enumerate(lengths)]
            self.back_M = torch.cat(own).to(device)

    def __call__(self, number: int, q_MAH: Tensor, k_MAH: Tensor, v_MAH: Tensor) -> Tensor:
        q, k, v = (
            (x if self.take is None else x.index_select(0, self.take))
            .unflatten(0, self.shape)
            .transpose(1, 2)
            for x in (q_MAH, k_MAH, v_MAH)
        )
        heard = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1)
        return heard if self.take is None else heard.index_select(0, self.back_M)


class Memory:
    """Attention of one sequence that grows: keys and values of every block so far."""

    def __init__(self, head: SpeechHead) -> None:
        self.head = head
        self.length = 0
        self.kept: list[tuple[Tensor, Tensor]] = []

    def run(self, x_MW: Tensor) -> Tensor:
        """The head's blocks over the sequence's next places."""
        positions_M = torch.arange(self.length, self.length + len(x_MW), device=x_MW.device)
        x_MW = self.head.run(x_MW, positions_M, self)
        self.length += len(x_MW)
        return x_MW

    def __call__(self, number: int, q_MAH: Tensor, k_MAH: Tensor, v_MAH: Tensor) -> Tensor:
        before, length = self.length, self.length + len(q_MAH)
        keys, values = self._room(number, k_MAH, length)
        keys[:, before:length] = k_MAH.transpose(0, 1)
        values[:, before:length] = v_MAH.transpose(0, 1)
        mask = None
        if len(q_MAH) > 1:
            mask = torch.ones(len(q_MAH), length, dtype=torch.bool, device=q_MAH.device).tril(before)
        q_AMH = q_MAH.transpose(0, 1)
        heard = F.scaled_dot_product_attention(
            q_AMH[None], keys[None, :, :length], values[None, :, :length], attn_mask=mask
        )
        return heard[0].transpose(0, 1)

    def _room(self, number: int, like_MAH: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a block, [A, at least ``length``, H] each."""
        if number < len(self.kept) and self.kept[number][0].shape[1] >= length:
            return self.kept[number]
        _, heads, width = like_MAH.shape
        wider = like_MAH.new_empty(2, heads, max(64, 2 * length), width)
        if number < len(self.kept):
            for old, new in zip(self.kept[number], wider.unbind(0), strict=True):
                new[:, : self.length] = old[:, : self.length]
        self.kept[number : number + 1] = [(wider[0], wider[1])]
        return self.kept[number]
