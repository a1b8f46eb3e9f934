"""Towers that hear, by the ``model_type`` in their ``config.json``, each behind the shape of ``AudioTower``.

No masks: a window is as long as it is (``audio.py`` fills it with silence up to a step), windows of one
length are a batch, and none depends on another. So a clip of 2 s costs 2 s of tower, of Whisper as well,
whose own class in transformers reads 30 s and nothing else.

``AUDIO_ENCODERS`` at the end is the table; what is not in it and begins with sounds goes to the general
adapter of ``hf_audio.py``.
"""

# Shapes: N windows, S positions, E width of a hidden state, C channels.

from __future__ import annotations

import difflib
from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, PreTrainedConfig

from .audio import Hearing
from .ear import Ear, EarConfig
from .hf_audio import AnyAudio, HFAudioTower, audio_class, keep_positions
from .media import Features
from .sound_tower import AudioTower, Layers, read_layers, require_bands


class Whisper(HFAudioTower):
    """The encoder of Whisper (arXiv:2212.04356), and encoders made like it: Voxtral's.

    Reads windows of any length up to its positions; those of a short one are the first of its table.
    """

    @classmethod
    def hearing_of(cls, config: PreTrainedConfig) -> Hearing:
        window_s = min(30.0, cls.max_window(config) / 100)
        return Hearing("log_mel", num_bands=config.num_mel_bins, window_s=window_s, step_s=min(0.5, window_s))

    @classmethod
    def stride(cls, config: PreTrainedConfig) -> int:
        return 2 * 160

    @classmethod
    def max_window(cls, config: PreTrainedConfig) -> int:
        return 2 * int(config.max_source_positions)

    @classmethod
    def grid(cls, config: PreTrainedConfig, size: tuple[int, ...]) -> tuple[int, ...]:
        frames, most = size[-1], cls.max_window(config)
        if not 1 <= frames <= most:
            raise ValueError(
                f"a {config.model_type!r} of {config.max_source_positions} positions hears windows of 1 to "
                f"{most} frames ({most / 100:g} s), got {frames}; cut the sound with window_s"
            )
        return (-(-frames // 2),)

    def forward(self, values: Tensor) -> Features:
        grid = self.grid(self.config, (values.shape[-1],))
        require_bands(values, self.config.num_mel_bins, self.config)
        whole: Any = self.backbone
        # As WhisperEncoder.forward, which refuses all lengths but one.
        x_NSE = F.gelu(whole.conv2(F.gelu(whole.conv1(values)))).transpose(1, 2)
        x_NSE = x_NSE + whole.embed_positions.weight[: x_NSE.shape[1]]
        states = [F.dropout(x_NSE, whole.dropout, whole.training)]
        for block in whole.layers:
            out = block(states[-1], None)
            states.append(out[0] if isinstance(out, tuple) else out)
        return Features(self.join([self.end(states[layer], layer) for layer in self.layers]), grid)

    def end(self, state: Tensor, layer: int) -> Tensor:
        """A hidden state as it is read: the last one after the norm."""
        whole: Any = self.backbone
        return whole.layer_norm(state) if layer == max(self.layers) else state

    @classmethod
    def last_norm(cls, config: PreTrainedConfig) -> str:
        return "layer_norm"


class Qwen2Audio(Whisper):
    """The encoder of Qwen2-Audio (arXiv:2407.10759) and Audio Flamingo 3 (arXiv:2507.08128).

    Whisper's, and the mean of each two positions. Of an odd number the last is left out, as there. Earlier
    hidden states are halved in the same way.
    """

    @classmethod
    def stride(cls, config: PreTrainedConfig) -> int:
        return 4 * 160

    @classmethod
    def grid(cls, config: PreTrainedConfig, size: tuple[int, ...]) -> tuple[int, ...]:
        positions = super().grid(config, size)[0] // 2
        if not positions:
            raise ValueError(f"a {config.model_type!r} needs 3 frames for a position, got {size[-1]}")
        return (positions,)

    def end(self, state: Tensor, layer: int) -> Tensor:
        halved = F.avg_pool1d(state.transpose(1, 2), 2).transpose(1, 2)
        return super().end(halved, layer)


class Wav2Vec2(HFAudioTower):
    """wav2vec 2.0 (arXiv:2006.11477), HuBERT (arXiv:2106.07447), data2vec (arXiv:2202.03555): waves in.

    All hear through the same seven convolutions; norms differ, and stand where the config says.
    """

    @classmethod
    def hearing_of(cls, config: PreTrainedConfig) -> Hearing:
        return Hearing("wave", normalise=True)

    @classmethod
    def stride(cls, config: PreTrainedConfig) -> int:
        return prod(config.conv_stride)

    @classmethod
    def grid(cls, config: PreTrainedConfig, size: tuple[int, ...]) -> tuple[int, ...]:
        length = size[-1]
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            length = (length - kernel) // stride + 1
        if length < 1:
            least = 1
            for kernel, stride in zip(
                reversed(config.conv_kernel), reversed(config.conv_stride), strict=True
            ):
                least = (least - 1) * stride + kernel
            raise ValueError(
                f"a {config.model_type!r} needs {least} samples for a position, got {size[-1]}; fill the "
                f"sound up with silence (step_s)"
            )
        return (length,)

    @classmethod
    def last_norm(cls, config: PreTrainedConfig) -> str | None:
        # The other kind has its norm before the first block, and it stays.
        return "encoder.layer_norm" if getattr(config, "do_stable_layer_norm", False) else None

    @classmethod
    def strip(cls, backbone: Any) -> None:
        # Stands for what SpecAugment masks; some have it with nothing to mask.
        backbone.masked_spec_embed = None

    def run(self, values: Tensor, **flags: Any) -> Any:
        return self.backbone(values[:, 0], **flags)


class WavLM(Wav2Vec2):
    """WavLM (arXiv:2110.13900). Its base models were trained on waves as they are, the large one not."""

    @classmethod
    def hearing_of(cls, config: PreTrainedConfig) -> Hearing:
        return Hearing("wave", normalise=config.feat_extract_norm == "layer")


class Conformer(Wav2Vec2):
    """wav2vec 2.0 with Conformer blocks (arXiv:2010.05171)."""

    @classmethod
    def last_norm(cls, config: PreTrainedConfig) -> str:
        return "encoder.layer_norm"

    @classmethod
    def strip(cls, backbone: Any) -> None:
        super().strip(backbone)
        # Made by transformers and never asked.
        backbone.encoder.pos_conv_embed = nn.Identity()

    def run(self, values: Tensor, **flags: Any) -> Any:
        with keep_positions(self.backbone):
            return super().run(values, **flags)


class Wav2Vec2Bert(HFAudioTower):
    """wav2vec2-BERT (arXiv:2312.05187): Kaldi's filter bank in, two frames a position."""

    @classmethod
    def hearing_of(cls, config: PreTrainedConfig) -> Hearing:
        return Hearing("fbank", num_bands=config.feature_projection_input_dim // 2)

    @classmethod
    def stride(cls, config: PreTrainedConfig) -> int:
        return 2 * 160

    @classmethod
    def grid(cls, config: PreTrainedConfig, size: tuple[int, ...]) -> tuple[int, ...]:
        if size[-1] < 1:
            raise ValueError(f"a {config.model_type!r} needs a frame, got {size[-1]}")
        return (size[-1],)

    def run(self, values: Tensor, **flags: Any) -> Any:
        with keep_positions(self.backbone):
            return super().run(values, **flags)


class CLAP(HFAudioTower):
    """The half of CLAP that hears (arXiv:2211.06687): a Swin over the decibels of 10 s.

    It stretches every window to one width, so windows are 10 s, whatever the sound. Its last rows and columns
    of features become positions in time, the rows of frequency side by side in a feature: 32 of 2 x 768.
    """

    @classmethod
    def build(
        cls, config: PreTrainedConfig, feature_layer: Layers = -1, attn: str | None = None
    ) -> HFAudioTower:
        stages = len(config.depths)
        if feature_layer == "weighted" or set(read_layers(stages, feature_layer)[0]) != {stages}:
            raise ValueError(
                f"a {config.model_type!r} works in stages, of which only the last one's output can be read; "
                f"got feature_layer {feature_layer!r}, take -1"
            )
        cut = cls.settled(config)
        # Windows are never longer than it reads, so what joins longer ones is not needed.
        if cut.enable_fusion and cut.fusion_type == "channel_map":
            raise ValueError("a CLAP that joins long sounds by channel_map cannot be read window by window")
        cut.enable_fusion = False
        if attn is not None:
            cut._attn_implementation = attn
        bands = cls._rows(cut)[1]
        width = cut.patch_embeds_hidden_size * 2 ** (stages - 1) * bands
        return cls(cut, cls.new_backbone(cut), *read_layers(stages, feature_layer), width)

    @classmethod
    def hearing_of(cls, config: PreTrainedConfig) -> Hearing:
        # One frame more than there are hops.
        window_s = min(10.0, (cls.max_window(config) - 1) / 100)
        scale: Any = "htk" if config.enable_fusion else "slaney"
        return Hearing(
            "clap_mel", num_bands=config.num_mel_bins, scale=scale, window_s=window_s, step_s=window_s
        )

    @classmethod
    def stride(cls, config: PreTrainedConfig) -> int:
        hearing = cls.hearing_of(config)
        return round(hearing.window / cls._rows(config)[0])

    @classmethod
    def max_window(cls, config: PreTrainedConfig) -> int:
        return int(config.spec_size) ** 2 // int(config.num_mel_bins)

    @classmethod
    def grid(cls, config: PreTrainedConfig, size: tuple[int, ...]) -> tuple[int, ...]:
        most = cls.max_window(config)
        if not 1 <= size[-1] <= most:
            raise ValueError(
                f"a {config.model_type!r} hears windows of 1 to {most} frames, got {size[-1]}; cut the sound "
                f"with window_s"
            )
        return (cls._rows(config)[0],)

    @classmethod
    def _rows(cls, config: PreTrainedConfig) -> tuple[int, int]:
        """Positions in time, and rows of frequency at each."""
        stride = config.patch_stride
        side = config.spec_size // (stride if isinstance(stride, int) else stride[0])
        side //= 2 ** (len(config.depths) - 1)
        # The spectrogram is folded into a square: so many stretches of time stand one below the other.
        folds = config.spec_size // config.num_mel_bins
        return side * folds, side // folds

    def run(self, values: Tensor, **flags: Any) -> Any:
        out = self.backbone(values.transpose(1, 2)[:, None], **flags)
        # [N, C, rows of frequency, S] -> [N, S, rows * C]
        out.last_hidden_state = out.last_hidden_state.permute(0, 3, 2, 1).flatten(2)
        return out


def audio_encoder_of(config: PreTrainedConfig) -> type[AudioTower]:
    """The adapter for a tower's config.

    Raises:
        ValueError: if there is none; names the nearest.
    """
    if config.model_type in AUDIO_ENCODERS:
        return AUDIO_ENCODERS[config.model_type]
    if audio_class(config) is not None:
        return AnyAudio
    raise _unknown(config.model_type)


def _unknown(model_type: str) -> ValueError:
    close = difflib.get_close_matches(model_type, AUDIO_ENCODERS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return ValueError(
        f"no audio tower for model_type {model_type!r}; known: {', '.join(AUDIO_ENCODERS)}, and whatever of "
        f"transformers begins with sounds{hint}"
    )


def audio_tower_config(config: PreTrainedConfig | Mapping[str, Any]) -> PreTrainedConfig:
    """A tower's config from what its ``config.json`` holds.

    Of a whole CLAP or Qwen2-Audio the part that hears; that of a whole Whisper is Whisper's own.

    Raises:
        ValueError: if there is no adapter for it.
    """
    if isinstance(config, PreTrainedConfig):
        found = config
    else:
        values = dict(config)
        model_type = values.pop("model_type", None)
        if model_type in EARS_OF_OURS:
            found = EARS_OF_OURS[model_type](**values)
        elif model_type in CONFIG_MAPPING:
            found = CONFIG_MAPPING[model_type](**values)
        else:
            raise _unknown(str(model_type))
    part = getattr(found, "audio_config", None)
    if found.model_type not in AUDIO_ENCODERS and isinstance(part, PreTrainedConfig):
        found = part
    audio_encoder_of(found)
    return found


EARS_OF_OURS: dict[str, type[PreTrainedConfig]] = {EarConfig.model_type: EarConfig}
"""Configs that transformers' ``AutoConfig`` does not know."""

AUDIO_ENCODERS: dict[str, type[AudioTower]] = {
    "whisper": Whisper,
    "voxtral_encoder": Whisper,
    "qwen2_audio_encoder": Qwen2Audio,
    "audioflamingo3_encoder": Qwen2Audio,
    "wav2vec2": Wav2Vec2,
    "hubert": Wav2Vec2,
    "wavlm": WavLM,
    "data2vec-audio": Wav2Vec2,
    "unispeech": Wav2Vec2,
    "unispeech-sat": Wav2Vec2,
    "wav2vec2-conformer": Conformer,
    "wav2vec2-bert": Wav2Vec2Bert,
    "clap_audio_model": CLAP,
    "tinymodal_ear": Ear,
}
