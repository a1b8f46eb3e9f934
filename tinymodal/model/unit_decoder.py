"""Units of an answer, all places of a token at once (LLaMA-Omni, arXiv:2409.06666).

Every token becomes ``upsample`` places; causal blocks say of each place which unit it is, or none; CTC
(Graves et al., ICML 2006) finds out in training which places belong to which units. Greedy: neighbours of one
unit are one, and nothing is left out. A unit vocoder makes them a sound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .speech_head import Answers, Loss, Memory, Speaker, SpeechHead

# Shapes: Z answers, P tokens, G frames of all answers, L places of the longest, V units, W width of the head.


class UnitDecoder(SpeechHead):
    """``upsample`` places for every token, each a unit or nothing."""

    measures = ("speech_written", "speech_lost")

    def __init__(self, width_D: int, *, books: int = 1, upsample: int = 25, **shared: Any) -> None:
        """See :class:`SpeechHead`.

        Args:
            width_D: of the language model.
            books: one.
            upsample: places for units of each token. An answer with more units than places, one more for each
                pair of equal neighbours, cannot be learned.
            **shared: see there.

        Raises:
            ValueError: several books, or what :class:`SpeechHead` refuses.
        """
        if books != 1:
            raise ValueError(f"design 'units' speaks one codebook, got books = {books}")
        if upsample < 1:
            raise ValueError(f"upsample must be at least 1, got {upsample}")
        super().__init__(width_D, books=books, **shared)
        self.upsample, self.blank = upsample, self.book_size
        self.place = nn.Embedding(upsample, self.width)
        self.predict = nn.Linear(self.width, self.book_size + 1)

    def count(self, frames: Sequence[int]) -> int:
        """Frames."""
        return sum(frames)

    def forward(self, answers: Answers) -> Loss:
        """See :meth:`SpeechHead.loss`.

        ``speech_written``: units that greedy decoding would speak. ``speech_lost``: units of answers that
        have too few places; they count and teach nothing.
        """
        units_G, logits = answers.codes_QG[0], self.taught(answers)
        places = [num * self.upsample for num in answers.tokens]
        said_LZV = nn.utils.rnn.pad_sequence([each.float().log_softmax(-1) for each in logits])
        losses_Z = self.align(said_LZV, units_G, places, answers.frames)
        with torch.no_grad():
            each = zip(units_G.split(list(answers.frames)), places, strict=True)
            lost = [len(units) * (len(units) + (units[1:] == units[:-1]).sum() > num) for units, num in each]
            written = [collapsed(each.argmax(-1), self.blank).sum() for each in logits]
            measures = {
                "speech_written": torch.stack(written).sum().float(),
                "speech_lost": torch.stack(lost).sum().float(),
            }
        return losses_Z.sum(), self.count(answers.frames), measures

    def align(
        self, said_LZV: Tensor, units_G: Tensor, places: Sequence[int], frames: Sequence[int]
    ) -> Tensor:
        """CTC of each answer, float32 [Z]: over all ways in which its places give its units."""
        return F.ctc_loss(
            said_LZV,
            units_G,
            torch.tensor(places),
            torch.tensor(frames),
            blank=self.blank,
            reduction="none",
            zero_infinity=True,
        )

    def taught(self, answers: Answers) -> tuple[Tensor, ...]:
        """Logits of each answer's places, [tokens * upsample, V + 1]."""
        places = [num * self.upsample for num in answers.tokens]
        x_MW = self.spread(self.tokens(answers.states_PD, answers.words_PD))
        begun = zip(self.voices_of(answers).split(1), x_MW.split(places), strict=True)
        x_MW = torch.cat([part for both in begun for part in both])
        lengths = [1 + num for num in places]
        x_MW = self.run_apart(x_MW, lengths)
        return tuple(self.predict(answer[1:]) for answer in x_MW.split(lengths))

    def spread(self, tokens_PW: Tensor) -> Tensor:
        """Places of tokens, [P * upsample, W]."""
        return (tokens_PW[:, None] + self.place.weight).flatten(0, 1)

    def begin(
        self, voice: int | Tensor = 0, *, temperature: float = 0.0, top_k: int = 0, seed: int = 0
    ) -> UnitSpeaker:
        """See :meth:`SpeechHead.begin`. There is no chance in it.

        Raises:
            ValueError: a temperature above 0, or no such voice.
        """
        if temperature > 0:
            raise ValueError(f"design 'units' takes the likeliest units only, got temperature {temperature}")
        return UnitSpeaker(self, voice)


class UnitSpeaker(Speaker):
    """See :meth:`SpeechHead.begin`."""

    @torch.inference_mode()
    def __init__(self, head: UnitDecoder, voice: int | Tensor) -> None:
        self.head, self.memory = head, Memory(head)
        self.voice_1W: Tensor | None = head.voice_of(voice)
        self.last_1: Tensor | None = None

    @torch.inference_mode()
    def feed(self, state_1D: Tensor, word_1D: Tensor) -> Tensor:
        head = self.head
        x_LW = head.spread(head.tokens(state_1D.to(head.device), word_1D.to(head.device)))
        num = len(x_LW)
        if self.voice_1W is not None:
            x_LW, self.voice_1W = torch.cat((self.voice_1W, x_LW)), None
        best_L = head.predict(self.memory.run(x_LW)[-num:]).argmax(-1)
        kept_L = collapsed(best_L, head.blank, self.last_1)
        self.last_1 = best_L[-1:]
        return best_L[kept_L][None]

    def rest(self) -> Iterator[Tensor]:
        yield torch.empty(1, 0, dtype=torch.int64, device=self.head.device)


def collapsed(best_L: Tensor, blank: int, last_1: Tensor | None = None) -> Tensor:
    """Which places of a greedy path are spoken, bool [L]: no blanks, and of a run the first.

    Args:
        best_L: the likeliest unit of each place.
        blank: what says nothing.
        last_1: int64 [1], the place before; None: there is none.
    """
    before_L = torch.cat((best_L.new_full((1,), blank) if last_1 is None else last_1, best_L[:-1]))
    return (best_L != blank) & (best_L != before_L)
