"""Text and pictures -> token ids and tensors; and how many tokens a picture takes, without any weights.

The image processor holds what must be known of the model to count: the tower's config and the connector's
options. It calls the functions that the model itself calls, so the two cannot disagree.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BatchFeature,
    ImageProcessingMixin,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.processing_utils import MultiModalData

from .configuration_tinymodal import AUTO_MAP, TinyModalConfig
from .connectors import find_connector
from .encoders import encoder_of, tower_config
from .geometry import num_tokens
from .image import Preparation, load_image, prepare

Source = str | Path | bytes | PIL.Image.Image


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """One picture, ready for the tower, and what it costs."""

    values: Tensor
    """float32 [3, H, W]"""
    grid: tuple[int, ...]
    """Rows and columns of tokens, after the connector; ``prod(grid) == tokens``."""
    tokens: int
    """Placeholders it needs among the words."""
    patches: int
    """Positions the tower computes."""
    feature_grid: tuple[int, ...]
    """Rows and columns of patches, before the connector; ``prod(feature_grid) == patches``."""


class TinyModalImageProcessor(ImageProcessingMixin):
    """Reads and prepares pictures for one tower, and counts their tokens.

    Raises:
        ValueError: if the tower cannot read pictures of the prepared size, or the connector cannot fold its
            grid.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - transformers' own class attribute
    _auto_class: Any = "AutoImageProcessor"

    def __init__(
        self,
        preparation: Preparation | dict[str, Any] | None = None,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        connector: str = "mlp",
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("image_processor_type", None)
        super().__init__(**kwargs)
        self.vision_config = None if vision_config is None else tower_config(vision_config)
        self.connector = connector
        self.options = find_connector(connector).settle(options or {})
        self.preparation: Preparation | None = None
        self.feature_grid: tuple[int, ...] = ()
        self.token_grid: tuple[int, ...] = ()
        if self.vision_config is not None:
            tower = encoder_of(self.vision_config)
            if isinstance(preparation, dict):
                preparation = Preparation.from_dict(preparation)
            self.preparation = preparation or tower.preparation_of(self.vision_config)
            self.feature_grid = tower.grid(self.vision_config, self.preparation.size_px)
            self.token_grid = find_connector(connector).shrink(self.feature_grid, **self.options)
        self.num_patches, self.num_tokens = 0, 0
        if self.feature_grid:
            self.num_patches, self.num_tokens = num_tokens(self.feature_grid), num_tokens(self.token_grid)

    def prepare(self, source: Source) -> PreparedImage:
        """Read one picture; see :func:`load_image` for what is accepted and refused.

        Raises:
            ValueError: if it cannot be read, or the model has no tower.
        """
        if self.preparation is None:
            raise ValueError("a picture is given, but this model has no vision tower")
        values = prepare(load_image(source, self.preparation.max_pixels), self.preparation)
        return PreparedImage(values, self.token_grid, self.num_tokens, self.num_patches, self.feature_grid)

    def __call__(self, images: Source | Sequence[Source], **kwargs: Any) -> BatchFeature:
        """Pictures -> ``pixel_values`` float32 [I, 3, H, W]."""
        prepared = [self.prepare(image) for image in as_list(images)]
        return BatchFeature({"pixel_values": torch.stack([p.values for p in prepared])})

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
            "auto_map": {k: AUTO_MAP[k] for k in ("AutoImageProcessor", "AutoProcessor")},
        }
        if self.vision_config is not None:
            values["vision_config"] = self.vision_config.to_diff_dict()
            values["vision_config"]["model_type"] = self.vision_config.model_type
        return values


class TinyModalProcessor(ProcessorMixin):
    """Tokenizer and image processor: writes as many placeholders as a picture has embeddings."""

    _auto_class: Any = "AutoProcessor"
    image_token = "<image>"

    def __init__(
        self,
        image_processor: TinyModalImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        if image_processor is None or tokenizer is None:
            raise ValueError("a processor needs an image processor and a tokenizer")
        self.image_token_id: Any = tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"the tokenizer has no token {self.image_token!r}; add it as a special token first"
            )
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def of(
        cls,
        config: TinyModalConfig,
        tokenizer: PreTrainedTokenizerBase,
        preparation: Preparation | None = None,
    ) -> TinyModalProcessor:
        """The processor of a model.

        Args:
            config: the model's.
            tokenizer: its language model's, with the token ``<image>``.
            preparation: how pictures are prepared; None for the way of the tower's family.

        Raises:
            ValueError: if tokenizer and config name different placeholder ids, or the sizes do not fit
                together.
        """
        chosen = config.connectors.get("image", {"name": "mlp", "options": {}})
        vision = copy.deepcopy(config.vision_config)
        image_processor = TinyModalImageProcessor(preparation, vision, chosen["name"], chosen["options"])
        processor = cls(image_processor, tokenizer)
        if config.image_token_id is not None and config.image_token_id != processor.image_token_id:
            raise ValueError(
                f"token {cls.image_token!r} is {processor.image_token_id} in the tokenizer but "
                f"{config.image_token_id} in the config"
            )
        return processor

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> TinyModalProcessor:
        """Read what ``save_pretrained`` wrote; a local folder or a Hub name."""
        # Not by way of AutoImageProcessor: where our package is installed, its own classes need no trust.
        image_processor = TinyModalImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        # The tokenizer's files say what it is. Without a config in hand AutoTokenizer would ask the model's.
        kwargs["config"] = PreTrainedConfig()
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return cls(image_processor, tokenizer)

    def prepare(self, source: Source) -> PreparedImage:
        """Read one picture; see :meth:`TinyModalImageProcessor.prepare`."""
        return self.image_processor.prepare(source)

    def placeholder(self, tokens: int) -> str:
        """The text that holds the place of one picture."""
        return self.image_token * tokens

    def __call__(
        self,
        images: Source | Sequence[Source] | None = None,
        text: str | Sequence[str] | None = None,
        return_mm_token_type_ids: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Texts with ``<image>`` where the pictures go -> what the model's forward takes.

        Args:
            images: pictures of all texts in reading order; lists of lists, one a text, are taken too.
            text: one text or several.
            return_mm_token_type_ids: also return 1 for placeholders and 0 for words.
            **kwargs: for the tokenizer; ``return_tensors`` is "pt" and ``padding`` on for several texts.

        Returns:
            ``input_ids``, ``attention_mask`` int64 [B, T] and, with pictures, ``pixel_values`` float32 [I, 3,
            H, W].

        Raises:
            ValueError: if the texts do not have as many places as there are pictures.
        """
        prepared = [] if images is None else [self.prepare(image) for image in as_list(images)]
        values = {"pixel_values": torch.stack([p.values for p in prepared])} if prepared else {}
        if text is None:
            return BatchFeature(values)
        texts = [text] if isinstance(text, str) else list(text)
        places = sum(t.count(self.image_token) for t in texts)
        if places != len(prepared):
            raise ValueError(f"{places} places ({self.image_token}) in the text but {len(prepared)} pictures")
        tokens = iter(p.tokens for p in prepared)
        texts = [self._widen(t, tokens) for t in texts]
        kwargs = {"return_tensors": "pt", "padding": len(texts) > 1, **kwargs}
        words = dict(self.tokenizer(texts, **kwargs))
        if return_mm_token_type_ids:
            words["mm_token_type_ids"] = torch.as_tensor(words["input_ids"]).eq(self.image_token_id).long()
        return BatchFeature({**words, **values})

    def _widen(self, text: str, tokens: Any) -> str:
        first, *rest = text.split(self.image_token)
        return first + "".join(self.placeholder(next(tokens)) + piece for piece in rest)

    def _get_num_multimodal_tokens(
        self, image_sizes: Sequence[Sequence[int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """Tokens of pictures of (height, width) px; what vLLM plans with. One tile a picture."""
        if image_sizes is None:
            return MultiModalData()
        n = len(image_sizes)
        return MultiModalData(
            num_image_tokens=[self.image_processor.num_tokens] * n, num_image_patches=[1] * n
        )

    @property
    def model_input_names(self) -> list[str]:
        """Keys of what a call returns."""
        return ["input_ids", "attention_mask", "pixel_values"]


def as_list(images: Any) -> list[Source]:
    """One picture, several, or several lists of them -> one list in reading order."""
    if not isinstance(images, (list, tuple)):
        return [images]
    return [image for entry in images for image in as_list(entry)]
