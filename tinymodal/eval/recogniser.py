"""The recogniser that judges made speech: which words of the made world are heard in a clip.

It is trained on clips only (``recipes/starter_audio.py``): never on what a model said, and never on the
voices that models speak with (``speak`` in :mod:`tinymodal.data.voices`). It knows a closed list of words,
and one more, ``OTHER``, learned from words that are not in the list: what is garbled should be written as
that, not as the nearest word. It shares nothing with the towers, not even the log-mel.

0.22 million parameters, 0.45 MB as float16. They lie beside the clips it was trained on, in
``starter/recogniser``, and not in the starter model: no model is made of them, they belong to measuring.

A word is two classes, its beginning and its end, in this order; the best path through words and silence is
read off with the Viterbi algorithm (:func:`decode`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tinymodal.core.errors import DataError

# Shapes: N clips, M mel bands, F mel frames, S positions, W width, V words, C = 1 + 2V classes.

FOLDER = Path(__file__).resolve().parents[1] / "starter" / "recogniser"
RATE_HZ = 16_000
HOP = 240
"""Samples from one mel frame to the next: 67 frames a second."""
WINDOW = 400
NUM_BANDS = 40
STRIDE = 2
"""Mel frames to a position."""
POSITIONS_PER_S = RATE_HZ / (HOP * STRIDE)
"""33.3"""
FLOOR = 5.0
"""What is more than so many powers of ten below the loudest is silence."""
OTHER = "<other>"
SILENCE = 0
"""Class of silence; word v begins as class 1 + 2v and ends as class 2 + 2v."""
WORD_COST = 4.0
"""Log-probability that each word costs; chosen on voices of ``val``."""


class Recogniser(nn.Module):
    """Log-mel, two convolutions, and blocks that each mix in time and among channels; a class per position.

    No clip depends on another one in its batch: norms are over channels, position by position.

    Args:
        words: the list of words, ``OTHER`` among them or not.
        width: of a position.
        dilations: of each block's convolution in time.
    """

    bands_MK: Tensor
    window_K: Tensor

    def __init__(
        self, words: Sequence[str], width: int = 96, dilations: Sequence[int] = (1, 2, 1, 2, 4)
    ) -> None:
        super().__init__()
        self.words, self.dilations = tuple(words), tuple(dilations)
        self.width = width
        self.register_buffer("bands_MK", mel_bands(NUM_BANDS, WINDOW, RATE_HZ), persistent=False)
        self.register_buffer("window_K", torch.hann_window(WINDOW), persistent=False)
        self.inlet = nn.Conv1d(NUM_BANDS, width, 5, padding=2)
        self.fold = nn.Conv1d(width, width, 3, stride=STRIDE, padding=1)
        self.blocks = nn.ModuleList(_Block(width, dilation) for dilation in self.dilations)
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, 1 + 2 * len(self.words))

    def mel(self, wave_NT: Tensor) -> Tensor:
        """Log-mel relative to the loudest of each clip, float32 [N, M, F], -1 (silence) to 1."""
        spectrum_NKF = torch.stft(wave_NT, WINDOW, HOP, window=self.window_K, return_complex=True).abs() ** 2
        log_NMF = (self.bands_MK @ spectrum_NKF).clamp_min(1e-10).log10()
        loudest_N11 = log_NMF.amax((1, 2), keepdim=True)
        return (log_NMF - loudest_N11).clamp_min(-FLOOR) * (2 / FLOOR) + 1

    def forward(self, mel_NMF: Tensor) -> Tensor:
        """Logits of the classes, [N, S, C]."""
        x_NWF = F.gelu(self.inlet(mel_NMF))
        x_NSW = F.gelu(self.fold(x_NWF)).transpose(1, 2)
        for block in self.blocks:
            x_NSW = x_NSW + block(x_NSW)
        return self.classes(self.norm(x_NSW))

    @torch.inference_mode()
    def hear(self, wave: Tensor | NDArray[np.float32], rate_hz: int = RATE_HZ) -> tuple[str, ...]:
        """The words in a clip, float32 [samples]; none in silence and in clips under a tenth of a second.

        Raises:
            DataError: the samples are not one row of finite numbers.
        """
        samples = np.asarray(wave, np.float32)
        if samples.ndim != 1 or not np.isfinite(samples).all():
            raise DataError(
                f"the recogniser was given {list(samples.shape)} samples"
                f"{'' if samples.ndim != 1 else ', not all of them finite'}; expected one row of numbers"
            )
        if rate_hz != RATE_HZ:
            import soxr

            samples = soxr.resample(samples, rate_hz, RATE_HZ)
        if len(samples) < RATE_HZ // 10 or not samples.any():
            return ()
        logits_SC = self(self.mel(torch.from_numpy(np.array(samples))[None]))[0]
        return tuple(self.words[word] for word in decode(logits_SC.log_softmax(-1).numpy()))

    def transcribe(self, wave: Tensor | NDArray[np.float32], rate_hz: int = RATE_HZ) -> str:
        """The words in a clip with a space between them, see :meth:`hear`."""
        return " ".join(self.hear(wave, rate_hz))

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` (float16)."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.to(torch.float16).contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = {"words": self.words, "width": self.width, "dilations": self.dilations}
        (folder / "config.json").write_text(json.dumps(config) + "\n")


@cache
def recogniser(folder: Path = FOLDER) -> Recogniser:
    """The recogniser that lies in a folder, ready to hear.

    Raises:
        DataError: there is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        net = Recogniser(**json.loads((folder / "config.json").read_text()))
        net.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{folder}: no recogniser of speech ({' '.join(str(error).split())[:200]}); install TinyModal "
            f"again, or make one with recipes/starter_audio.py"
        ) from error
    return net.eval()


class _Block(nn.Module):
    """Pointwise with a gate, a convolution in time for each channel, pointwise."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, 2 * width)
        self.time = nn.Conv1d(width, width, 9, padding=4 * dilation, dilation=dilation, groups=width)
        self.out = nn.Linear(width, width)

    def forward(self, x_NSW: Tensor) -> Tensor:
        y_NSW = F.glu(self.gate(self.norm(x_NSW)), -1)
        y_NSW = self.time(y_NSW.transpose(1, 2)).transpose(1, 2)
        return self.out(F.silu(y_NSW))


def mel_bands(num_bands: int, window: int, rate_hz: int) -> Tensor:
    """Triangles even on the mel scale from 60 Hz to 7,600 Hz, float32 [M, K] for K = window / 2 + 1."""

    def mel(hz: float) -> float:
        return float(2595 * np.log10(1 + hz / 700))

    edges = 700 * (10 ** (np.linspace(mel(60), mel(7600), num_bands + 2) / 2595) - 1)
    hz_K = np.linspace(0, rate_hz / 2, window // 2 + 1)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (hz_K - low) / (middle - low), (high - hz_K) / (high - middle)
    return torch.from_numpy(np.clip(np.minimum(rising, falling), 0, None).astype(np.float32))


# --- paths through words --------------------------------------------------------------------------


def word_classes(word: int) -> tuple[int, int]:
    """Classes of the beginning and of the end of a word."""
    return 1 + 2 * word, 2 + 2 * word


def place_classes(
    words: Sequence[int], places: Sequence[tuple[float, float]], num_positions: int, positions_per_s: float
) -> NDArray[np.int64]:
    """The class at each position, int64 [S], of words whose first and last second are known.

    The first half of a word's positions are its beginning. A word too short for a position gets the nearest.
    """
    classes_S = np.full(num_positions, SILENCE)
    for word, (start, end) in zip(words, places, strict=True):
        first = min(round(start * positions_per_s), num_positions - 1)
        last = min(max(round(end * positions_per_s), first + 1), num_positions)
        begin, finish = word_classes(word)
        classes_S[first:last] = finish
        classes_S[first : first + (last - first + 1) // 2] = begin
    return classes_S


def decode(log_probs_SC: NDArray[np.float32], word_cost: float = WORD_COST) -> list[int]:
    """The words of the likeliest path, each of which costs ``word_cost``."""
    begins_SV, ends_SV = log_probs_SC[:, 1::2], log_probs_SC[:, 2::2]
    num_positions, num_words = begins_SV.shape
    silence = float(log_probs_SC[0, SILENCE])
    begin_V = begins_SV[0] - word_cost
    end_V = np.full(num_words, -np.inf, np.float32)
    # Where each state came from: the word it left (or stayed in), -1 silence; a state entered begins a word.
    before_silence = np.full(num_positions, -1)
    before_begin = np.full((num_positions, num_words), -2)  # -2: stayed
    before_end = np.zeros((num_positions, num_words), bool)  # True: from the beginning of the same word
    left_ended = np.zeros(num_positions, bool)
    before_begin[0] = -1
    for s in range(1, num_positions):
        begun, ended = int(begin_V.argmax()), int(end_V.argmax())
        left_ended[s] = end_V[ended] >= begin_V[begun]
        word = ended if left_ended[s] else begun
        left = float(end_V[ended] if left_ended[s] else begin_V[begun])
        enter = max(left, silence) - word_cost
        entered_V = enter > begin_V
        from_begin_V = begin_V > end_V
        end_V = np.where(from_begin_V, begin_V, end_V) + ends_SV[s]
        begin_V = np.where(entered_V, enter, begin_V) + begins_SV[s]
        before_begin[s] = np.where(entered_V, word if left > silence else -1, -2)
        before_end[s] = from_begin_V
        before_silence[s] = word if left > silence else -1
        silence = max(left, silence) + float(log_probs_SC[s, SILENCE])
    # Back along the best path: state is silence (-1), or a word, in its beginning or its end.
    begun, ended = int(begin_V.argmax()), int(end_V.argmax())
    scores = (silence, float(begin_V[begun]), float(end_V[ended]))
    state, in_end = ((-1, False), (begun, False), (ended, True))[int(np.argmax(scores))]
    found: list[int] = []
    for s in range(num_positions - 1, -1, -1):
        if state < 0:
            state, in_end = int(before_silence[s]), bool(left_ended[s])
        elif in_end:
            in_end = not before_end[s, state]
        elif before_begin[s, state] != -2:
            found.append(state)
            state, in_end = int(before_begin[s, state]), bool(left_ended[s])
    return found[::-1]
