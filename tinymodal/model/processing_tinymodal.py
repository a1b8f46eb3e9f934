"""Text, pictures and sounds -> token ids and tensors; and how many tokens a picture takes, without weights.

The image processor holds what must be known of the model to count: the tower's config and the connector's
options. It calls the functions that the model itself calls, so the two cannot disagree. What does the same
for sounds is in ``audio_processing.py``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from transformers import (
    AutoTokenizer,
    BatchFeature,
    ImageProcessingMixin,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.processing_utils import MultiModalData

from .audio import Hearing
from .audio_processing import TinyModalAudioProcessor
from .configuration_tinymodal import AUTO_MAP, TinyModalConfig
from .connectors import find_connector
from .encoders import encoder_of, tower_config
from .geometry import Plan, arrange, num_tokens, plan
from .image import Preparation, cut, load_pixels
from .layout import Layout, Prepared, as_inputs, as_list

Source = str | Path | bytes | PIL.Image.Image

NUM_LAYOUTS = 4_096
"""Layouts that are kept: pictures of a data set share sizes, and one takes a millisecond to plan."""


BLIND = "a picture is given, but this model has no vision tower; [model.vision] in a recipe gives it one"
DEAF = (
    "a sound is given, but this model has no audio tower; [model.audio] in a recipe gives it one, as "
    "recipes/asr-align.toml does"
)


@dataclass(frozen=True, slots=True)
class PictureLayout(Layout):
    """A layout, and how the picture is cut."""

    plan: Plan


class TinyModalImageProcessor(ImageProcessingMixin):
    """Reads and prepares pictures for one tower, and counts their tokens.

    Raises:
        ValueError: if the tower cannot read pictures of the prepared size, or the connector cannot fold its
            grid.
    """

    model_input_names = ["pixel_values", "image_take"]  # noqa: RUF012 - transformers' own class attribute
    _auto_class: Any = "AutoImageProcessor"

    def __init__(
        self,
        preparation: Preparation | dict[str, Any] | None = None,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        connector: str = "mlp",
        options: dict[str, Any] | None = None,
        marks: Sequence[str] = (),
        merge: str = "flat",
        keep_class: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("image_processor_type", None)
        super().__init__(**kwargs)
        self.vision_config = None if vision_config is None else tower_config(vision_config)
        self.connector = connector
        self.options = find_connector(connector).settle(options or {})
        self.marks, self.merge, self.keep_class = list(marks), merge, keep_class
        self.preparation: Preparation | None = None
        self._layouts: dict[Any, PictureLayout] = {}
        if self.vision_config is not None:
            if isinstance(preparation, dict):
                preparation = Preparation.from_dict(preparation)
            self.preparation = preparation or encoder_of(self.vision_config).preparation_of(
                self.vision_config
            )
            self.typical()

    def typical(self) -> PictureLayout:
        """The layout of a picture that has the tower's own size.

        Raises:
            ValueError: if the model has no tower; if its grid and the connector do not fit together.
        """
        if self.preparation is None:
            raise ValueError(BLIND)
        return self.layout(self.preparation.size_px)

    def layout(
        self,
        size_px: tuple[int, int],
        number: int = 0,
        max_tiles: int | None = None,
        fit_pixels: tuple[int, int] | None = None,
    ) -> PictureLayout:
        """How a picture of ``size_px`` (height, width) is cut and what it costs. Pure integers.

        Args:
            size_px: of the picture, upright.
            number: which picture of the conversation it is, from 0; for the mark ``id``.
            max_tiles: at most so many tiles; None: as composed.
            fit_pixels: least and most pixels after resizing; None: as composed.
        """
        how = self.preparation_for(max_tiles, fit_pixels)
        key = (how, size_px, number if "id" in self.marks else 0)
        if key not in self._layouts:
            if len(self._layouts) >= NUM_LAYOUTS:
                self._layouts.clear()
            self._layouts[key] = self._lay_out(how, size_px, key[2])
        return self._layouts[key]

    def _lay_out(self, how: Preparation, size_px: tuple[int, int], number: int) -> PictureLayout:
        tower, connector = encoder_of(self.vision_config), find_connector(self.connector)  # type: ignore[arg-type]
        cut_up = plan(size_px, how)
        before = tuple(
            tower.grid(self.vision_config, tile, keep_class=self.keep_class) for tile in cut_up.tiles_px
        )
        after = [connector.shrink(grid, **self.options) for grid in before]
        counts = tuple(num_tokens(grid) for grid in after)
        if len(after) == 1 and not self.marks:
            return PictureLayout(before, counts, after[0], None, cut_up)
        order = tuple(arrange(cut_up, after, self.marks, self.merge, number))
        return PictureLayout(before, counts, (len(order),), order, cut_up)

    def preparation_for(
        self, max_tiles: int | None = None, fit_pixels: tuple[int, int] | None = None
    ) -> Preparation:
        """As composed, within other limits for one picture.

        Raises:
            ValueError: if the model has no tower, or the limits make no sense.
        """
        if self.preparation is None:
            raise ValueError(BLIND)
        how = self.preparation
        if max_tiles is not None:
            if max_tiles < 1:  # 0 would be the strategy's own default
                raise ValueError(f"max_tiles must be 1 or more, got {max_tiles}; leave it out instead")
            how = replace(how, max_tiles=max_tiles)
        if fit_pixels is not None:
            how = replace(how, fit_pixels=fit_pixels)
        return how

    def prepare(
        self,
        source: Source,
        number: int = 0,
        max_tiles: int | None = None,
        fit_pixels: tuple[int, int] | None = None,
        name: str = "",
    ) -> Prepared:
        """Read one picture; :func:`load_pixels` says what is accepted, :meth:`layout` the rest.

        Args:
            source: the picture.
            number: which picture of the conversation it is, from 0; for the mark ``id``.
            max_tiles: at most so many tiles; None: as composed.
            fit_pixels: least and most pixels after resizing; None: as composed.
            name: what errors call it; the file's own name by default.

        Raises:
            ValueError: if it cannot be read, or the model has no tower.
        """
        how = self.preparation_for(max_tiles, fit_pixels)
        x_HWC = load_pixels(source, how.max_pixels, name)
        found = self.layout((x_HWC.shape[0], x_HWC.shape[1]), number, max_tiles, fit_pixels)
        return Prepared(tuple(cut(x_HWC, how, found.plan)), found)

    def __call__(
        self,
        images: Source | Sequence[Source],
        max_tiles: int | None = None,
        fit_pixels: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Pictures -> ``pixel_values``, and ``image_take`` where needed; see :func:`as_inputs`.

        With marks the numbers of ``id`` begin at 0; texts of several rows are numbered by the processor.
        """
        prepared = [
            self.prepare(image, number, max_tiles, fit_pixels) for number, image in enumerate(as_list(images))
        ]
        return BatchFeature(as_inputs(prepared, "image"))

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From what :meth:`to_dict` gave. What loaders pass besides (``trust_remote_code``) is not ours."""
        made = cls(**image_processor_dict)
        return (made, kwargs) if kwargs.pop("return_unused_kwargs", False) else made

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, from which :meth:`from_dict` makes an equal one."""
        values: dict[str, Any] = {
            "image_processor_type": type(self).__name__,
            "preparation": None if self.preparation is None else self.preparation.to_dict(),
            "vision_config": None,
            "connector": self.connector,
            "options": dict(self.options),
            "marks": list(self.marks),
            "merge": self.merge,
            "keep_class": self.keep_class,
            "auto_map": {k: AUTO_MAP[k] for k in ("AutoImageProcessor", "AutoProcessor")},
        }
        if self.vision_config is not None:
            values["vision_config"] = self.vision_config.to_diff_dict()
            values["vision_config"]["model_type"] = self.vision_config.model_type
        return values


class TinyModalProcessor(ProcessorMixin):
    """Tokenizer, image processor and, if the model hears, what prepares sounds.

    Writes as many placeholders as a picture or a sound has embeddings.
    """

    _auto_class: Any = "AutoProcessor"
    image_token = "<image>"
    audio_token = "<audio>"

    def __init__(
        self,
        image_processor: TinyModalImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        feature_extractor: TinyModalAudioProcessor | None = None,
        **kwargs: Any,
    ) -> None:
        if image_processor is None or tokenizer is None:
            raise ValueError("a processor needs an image processor and a tokenizer")
        self.image_token_id: Any = _id_of(tokenizer, self.image_token)
        self.audio_token_id: Any = None
        """None where the model does not hear; then ``<audio>`` is a word like any other."""
        if feature_extractor is not None:
            self.audio_token_id = _id_of(tokenizer, self.audio_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.feature_extractor = feature_extractor

    @classmethod
    def get_attributes(cls) -> list[str]:
        """What every processor of ours has; transformers cannot save a part that may be None."""
        return ["image_processor", "tokenizer"]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; see ``ProcessorMixin.to_dict``."""
        values = super().to_dict()
        if self.feature_extractor is None:
            values.pop("feature_extractor", None)
        return values

    @classmethod
    def of(
        cls,
        config: TinyModalConfig,
        tokenizer: PreTrainedTokenizerBase,
        preparation: Preparation | None = None,
        hearing: Hearing | None = None,
    ) -> TinyModalProcessor:
        """The processor of a model.

        Args:
            config: the model's.
            tokenizer: its language model's, with the token ``<image>``, and ``<audio>`` if the model hears.
            preparation: how pictures are prepared; None for the way of the tower's family.
            hearing: how sounds are prepared; None for the way of the tower's family.

        Raises:
            ValueError: if tokenizer and config name different placeholder ids, or the sizes do not fit
                together.
        """
        chosen = config.connectors.get("image", {"name": "mlp", "options": {}})
        vision = copy.deepcopy(config.vision_config)
        image_processor = TinyModalImageProcessor(
            preparation,
            vision,
            chosen["name"],
            chosen["options"],
            chosen.get("marks", ()),
            chosen.get("merge", "flat"),
            config.keep_class,
        )
        ear = None
        if config.audio_config is not None:
            chosen = config.connectors["audio"]
            audio = copy.deepcopy(config.audio_config)
            ear = TinyModalAudioProcessor(hearing, audio, chosen["name"], chosen["options"])
        processor = cls(image_processor, tokenizer, feature_extractor=ear)
        for token, here, there in (
            (cls.image_token, processor.image_token_id, config.image_token_id),
            (cls.audio_token, processor.audio_token_id, config.audio_token_id),
        ):
            if here is not None and there is not None and here != there:
                raise ValueError(f"token {token!r} is {here} in the tokenizer but {there} in the config")
        return processor

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> TinyModalProcessor:
        """Read what ``save_pretrained`` wrote; a local folder or a Hub name."""
        # Not by way of AutoImageProcessor: where our package is installed, its own classes need no trust.
        image_processor = TinyModalImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        ear = None
        if "feature_extractor" in cls.get_processor_dict(pretrained_model_name_or_path, **kwargs)[0]:
            ear = TinyModalAudioProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        # The tokenizer's files say what it is. Without a config in hand AutoTokenizer would ask the model's.
        kwargs["config"] = PreTrainedConfig()
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls(image_processor, tokenizer, feature_extractor=ear)

    def prepare(self, source: Source, number: int = 0, **limits: Any) -> Prepared:
        """Read one picture; see :meth:`TinyModalImageProcessor.prepare`."""
        return self.image_processor.prepare(source, number, **limits)

    def prepare_sound(self, source: Any, rate_hz: int | None = None, **stretch: Any) -> Prepared:
        """Read one sound; see :meth:`TinyModalAudioProcessor.prepare`.

        Raises:
            ValueError: if it cannot be read, or the model does not hear.
        """
        if self.feature_extractor is None:
            raise ValueError(DEAF)
        return self.feature_extractor.prepare(source, rate_hz, **stretch)

    @property
    def places(self) -> dict[str, str]:
        """The placeholder's word for each kind of media that the tokenizer has one for."""
        heard = {} if self.audio_token_id is None else {"audio": self.audio_token}
        return {"image": self.image_token, **heard}

    def placeholder(self, tokens: int, kind: str = "image") -> str:
        """The text that holds the place of one picture or sound."""
        return self.places[kind] * tokens

    def __call__(
        self,
        images: Source | Sequence[Source] | None = None,
        text: str | Sequence[str] | None = None,
        return_mm_token_type_ids: bool = False,
        max_tiles: int | None = None,
        fit_pixels: tuple[int, int] | None = None,
        audio: Any = None,
        sampling_rate: int | None = None,
        return_text_replacement_offsets: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Texts with ``<image>`` and ``<audio>`` where media go -> what the model's forward takes.

        Args:
            images: pictures of all texts in reading order; lists of lists, one a text, are taken too.
            text: one text or several.
            return_mm_token_type_ids: also return 0 for words, 1 for places of pictures and 3 of sounds, as
                transformers numbers them.
            max_tiles: at most so many tiles a picture; None: as composed.
            fit_pixels: least and most pixels of a picture after resizing; None: as composed.
            audio: sounds of all texts in reading order, or lists of them.
            sampling_rate: of sounds that are samples; files say their own.
            return_text_replacement_offsets: also return, for each text, what its placeholders became, as
                transformers' own processors do and vLLM asks.
            **kwargs: for the tokenizer; ``return_tensors`` is "pt", and several texts are padded on the left.

        Returns:
            ``input_ids``, ``attention_mask`` int64 [B, T] and, with pictures or sounds, what
            :func:`as_inputs` gives.

        Raises:
            ValueError: if the texts do not have as many places as there are pictures, or as there are sounds.
        """
        # transformers passes what a conversation has none of.
        if kwargs.pop("videos", None) is not None:
            raise ValueError("videos are given, but this model reads pictures; give some of their frames")
        pictures = [] if images is None else as_list(images)
        sounds = [] if audio is None else as_list(audio)
        if sounds and self.feature_extractor is None:
            raise ValueError(DEAF)
        limits = {"max_tiles": max_tiles, "fit_pixels": fit_pixels}
        if text is None:
            seen = self.image_processor(pictures, **limits) if pictures else {}
            return BatchFeature({**seen, **(self.feature_extractor(sounds, sampling_rate) if sounds else {})})
        texts = [text] if isinstance(text, str) else list(text)
        per_text = [t.count(self.image_token) for t in texts]
        for kind, token in self.places.items():
            given, word = (pictures, "pictures") if kind == "image" else (sounds, "sounds")
            found = sum(t.count(token) for t in texts)
            if found != len(given):
                raise ValueError(f"{found} places ({token}) in the text but {len(given)} {word}")
        numbers = (n for count in per_text for n in range(count))
        prepared: dict[str, list[Any]] = {
            "image": [self.prepare(image, n, **limits) for image, n in zip(pictures, numbers, strict=True)],
            "audio": [self.prepare_sound(sound, sampling_rate) for sound in sounds],
        }
        values: dict[str, Any] = {}
        for kind, media in prepared.items():
            values |= as_inputs(media, kind) if media else {}
        texts, became = self._widen(texts, prepared)
        # On the left: what is generated follows the last word of every row.
        left = {"padding": len(texts) > 1, "padding_side": "left"}
        kwargs = {"return_tensors": "pt", **left, **kwargs}
        words = dict(self.tokenizer(texts, **kwargs))
        if return_mm_token_type_ids:
            ids = torch.as_tensor(words["input_ids"])
            words["mm_token_type_ids"] = ids.eq(self.image_token_id).long()
            if self.audio_token_id is not None:
                words["mm_token_type_ids"] += 3 * ids.eq(self.audio_token_id).long()
        if return_text_replacement_offsets:
            words["text_replacement_offsets"] = became
        return BatchFeature({**words, **values})

    def _widen(
        self, texts: Sequence[str], prepared: dict[str, list[Any]]
    ) -> tuple[list[str], list[list[dict[str, Any]]]]:
        """Each placeholder as often as its medium has tokens; and what became of each, text by text."""
        tokens = {kind: iter([medium.tokens for medium in media]) for kind, media in prepared.items()}
        kinds = {token: kind for kind, token in self.places.items()}
        places = re.compile("|".join(map(re.escape, kinds)))
        wide, became = [], []
        for text in texts:
            pieces: list[str] = []
            changes: list[dict[str, Any]] = []
            end = length = 0
            for found in places.finditer(text):
                kind = kinds[found.group()]
                word = self.placeholder(next(tokens[kind]), kind)
                pieces += (text[end : found.start()], word)
                length += found.start() - end + len(word)
                end = found.end()
                new = {"new_span": (length - len(word), length), "replacement": word}
                changes.append({"type": kind, "span": found.span(), "text": found.group(), **new})
            wide.append("".join((*pieces, text[end:])))
            became.append(changes)
        return wide, became

    def _get_num_multimodal_tokens(
        self,
        image_sizes: Sequence[Sequence[int]] | None = None,
        audio_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """What vLLM plans with.

        Args:
            image_sizes: (height, width) px of pictures: their tokens and tiles are counted.
            audio_lengths: samples of sounds at ``feature_extractor.sampling_rate``: their tokens are.
            **kwargs: of other media.
        """
        counts: dict[str, list[int]] = {}
        if image_sizes is not None:
            layouts = [self.image_processor.layout((int(h), int(w))) for h, w in image_sizes]
            counts["num_image_tokens"] = [found.tokens for found in layouts]
            counts["num_image_patches"] = [len(found.tile_tokens) for found in layouts]
        if audio_lengths is not None:
            if self.feature_extractor is None:
                raise ValueError(DEAF)
            ear = self.feature_extractor
            counts["num_audio_tokens"] = [ear.layout(int(length)).tokens for length in audio_lengths]
        return MultiModalData(**counts)

    @property
    def model_input_names(self) -> list[str]:
        """Keys of what a call returns."""
        heard = [] if self.feature_extractor is None else self.feature_extractor.model_input_names
        return ["input_ids", "attention_mask", "pixel_values", "image_take", *heard]


def _id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The placeholder's number.

    Raises:
        ValueError: the tokenizer does not have it.
    """
    found: Any = tokenizer.convert_tokens_to_ids(token)
    if found is None or found == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no token {token!r}; add it as a special token first")
    return int(found)
