"""What an engine says aloud: the speech head's frames, made a sound while they come."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinymodal.core.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from tinymodal.compose.build import Composed
    from tinymodal.model.codec import Codec

# Shapes: n tokens, D language width, Q codebooks, f frames.

Voice = str | int | Path | Tensor | None
"""A voice's name or number; a file with a clip of it, or the clip's codes, int64 [Q, F]; None: the first."""
CLIP_S = 30.0
"""A longer clip is refused: a voice needs a few seconds."""


class Mouth:
    """A model's speech head and its codec.

    Raises:
        CheckpointError: the model has no speech head, or its folder no codec.
    """

    def __init__(self, composed: Composed) -> None:
        self.head: Any = getattr(composed.model, "speech_head", None)
        if self.head is None:
            raise CheckpointError(
                "this model has no speech head, so it does not speak; [model.speech] in a recipe gives it one"
            )
        codec: Codec | None = getattr(composed, "codec", None)
        if codec is None:
            raise CheckpointError(
                "this model has a speech head and no codec to make its frames a sound; load it from the "
                "folder it was saved to, with its folder 'codec'"
            )
        self.codec: Codec = codec
        self.words: Any = composed.model.get_input_embeddings()

    def known(self, voice: Voice) -> int | Tensor:
        """A voice as the speech head knows it: its number, or the codes of a clip.

        Raises:
            DataError: there is no such voice, or its clip cannot be read.
        """
        if voice is None:
            return 0
        if isinstance(voice, str):
            names: tuple[str, ...] = self.head.voices
            if voice not in names:
                has = f"has {', '.join(names)}" if names else "has one voice without a name"
                raise DataError(f"voice '{voice}' is not one of this model's, which {has}")
            return names.index(voice)
        if isinstance(voice, Path):
            from tinymodal.model.audio import load_sound

            try:
                return self.codec.encode(load_sound(voice, max_s=CLIP_S, to_hz=self.codec.rate_hz))
            except (ValueError, OSError) as error:
                raise DataError(f"voice: {error}") from error
        return voice

    def begin(self, voice: int | Tensor, temperature: float, top_k: int, seed: int) -> Utterance:
        """Begin one answer; see ``SpeechHead.begin``.

        Raises:
            DataError: the head has no such voice, or not this choice.
        """
        try:
            speaker = self.head.begin(voice, temperature=temperature, top_k=top_k, seed=seed)
        except ValueError as error:
            raise DataError(f"speaking: {error}") from error
        return Utterance(self, speaker)


class Utterance:
    """One answer on its way out. What has come is the beginning of the whole, without a break."""

    def __init__(self, mouth: Mouth, speaker: Any) -> None:
        self._mouth, self._speaker, self._sound = mouth, speaker, mouth.codec.stream()

    def feed(self, states_nD: Tensor, ids_n: Tensor) -> Tensor:
        """The next tokens, and the states that predicted them -> what can be heard now, float32 [samples]."""
        with torch.inference_mode():
            frames_Qf = self._speaker.feed(states_nD, self._mouth.words(ids_n))
        return self._heard(frames_Qf)

    def rest(self) -> Iterator[Tensor]:
        """The text is over -> the rest, in pieces, float32 [samples]."""
        for frames_Qf in self._speaker.rest():
            yield self._heard(frames_Qf)
        yield self._sound.finish().float().cpu()

    @torch.no_grad()
    def _heard(self, frames_Qf: Tensor) -> Tensor:
        if not frames_Qf.shape[1]:
            return torch.zeros(0)
        return self._sound.feed(frames_Qf.to(self._mouth.codec.device)).float().cpu()
