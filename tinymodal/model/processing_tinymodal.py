"""Text and pictures -> token ids and tensors; and how many tokens a picture takes, without any weights.

The image processor holds what must be known of the model to count: the tower's config and the connector's
options. It calls the functions that the model itself calls, so the two cannot disagree.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from .geometry import Plan, arrange, num_tokens, plan
from .image import Preparation, cut, load_pixels
from .layout import Picture, lay_out

Source = str | Path | bytes | PIL.Image.Image

NUM_LAYOUTS = 4_096
"""Layouts that are kept: pictures of a data set share sizes, and one takes a millisecond to plan."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What a picture of a given size costs, and where its tokens go. Needs no pixels and no weights."""

    plan: Plan
    feature_grids: tuple[tuple[int, ...], ...]
    """Rows and columns of patches of each tile, before the connector."""
    tile_tokens: tuple[int, ...]
    """Embeddings of each tile."""
    grid: tuple[int, ...]
    """Rows and columns of tokens, or their number where they are no rectangle; ``prod(grid) == tokens``."""
    order: tuple[int, ...] | None
    """Which embedding stands at each place (``geometry.arrange``); None: one tile, in its own order."""

    @property
    def tokens(self) -> int:
        """Placeholders it needs among the words."""
        return num_tokens(self.grid)

    @property
    def patches(self) -> int:
        """Positions the tower computes."""
        return sum(num_tokens(grid) for grid in self.feature_grids)


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """One picture, ready for the tower, and what it costs; see :class:`Layout`."""

    tiles: tuple[Tensor, ...]
    """float32 [3, H, W] each; ``seen``: the tower's features, [*grid, E] each"""
    grid: tuple[int, ...]
    tokens: int
    patches: int
    feature_grids: tuple[tuple[int, ...], ...]
    tile_tokens: tuple[int, ...]
    order: list[int] | None
    size_px: tuple[int, int]
    """Height and width of the picture that was read, upright."""
    seen: bool = False
    """The tower has run already."""
    key: str = ""
    """Under which the tower's features are kept; empty: nowhere."""

    @classmethod
    def of(cls, tiles: Sequence[Tensor], layout: Layout, seen: bool = False, key: str = "") -> PreparedImage:
        """``tiles`` of a picture that is laid out so."""
        order = None if layout.order is None else list(layout.order)
        return cls(
            tuple(tiles),
            layout.grid,
            layout.tokens,
            layout.patches,
            layout.feature_grids,
            layout.tile_tokens,
            order,
            layout.plan.source_px,
            seen,
            key,
        )


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
        self._layouts: dict[Any, Layout] = {}
        if self.vision_config is not None:
            if isinstance(preparation, dict):
                preparation = Preparation.from_dict(preparation)
            self.preparation = preparation or encoder_of(self.vision_config).preparation_of(
                self.vision_config
            )
            self.typical()

    def typical(self) -> Layout:
        """The layout of a picture that has the tower's own size.

        Raises:
            ValueError: if the model has no tower; if its grid and the connector do not fit together.
        """
        if self.preparation is None:
            raise ValueError("a picture is given, but this model has no vision tower")
        return self.layout(self.preparation.size_px)

    def layout(
        self,
        size_px: tuple[int, int],
        number: int = 0,
        max_tiles: int | None = None,
        fit_pixels: tuple[int, int] | None = None,
    ) -> Layout:
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

    def _lay_out(self, how: Preparation, size_px: tuple[int, int], number: int) -> Layout:
        tower, connector = encoder_of(self.vision_config), find_connector(self.connector)  # type: ignore[arg-type]
        cut_up = plan(size_px, how)
        before = tuple(
            tower.grid(self.vision_config, tile, keep_class=self.keep_class) for tile in cut_up.tiles_px
        )
        after = [connector.shrink(grid, **self.options) for grid in before]
        counts = tuple(num_tokens(grid) for grid in after)
        if len(after) == 1 and not self.marks:
            return Layout(cut_up, before, counts, after[0], None)
        order = tuple(arrange(cut_up, after, self.marks, self.merge, number))
        return Layout(cut_up, before, counts, (len(order),), order)

    def preparation_for(
        self, max_tiles: int | None = None, fit_pixels: tuple[int, int] | None = None
    ) -> Preparation:
        """As composed, within other limits for one picture.

        Raises:
            ValueError: if the model has no tower, or the limits make no sense.
        """
        if self.preparation is None:
            raise ValueError("a picture is given, but this model has no vision tower")
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
    ) -> PreparedImage:
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
        return PreparedImage.of(cut(x_HWC, how, found.plan), found)

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
        return BatchFeature(as_inputs(prepared))

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
        image_processor = TinyModalImageProcessor(
            preparation,
            vision,
            chosen["name"],
            chosen["options"],
            chosen.get("marks", ()),
            chosen.get("merge", "flat"),
            config.keep_class,
        )
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

    def prepare(self, source: Source, number: int = 0, **limits: Any) -> PreparedImage:
        """Read one picture; see :meth:`TinyModalImageProcessor.prepare`."""
        return self.image_processor.prepare(source, number, **limits)

    def placeholder(self, tokens: int) -> str:
        """The text that holds the place of one picture."""
        return self.image_token * tokens

    def __call__(
        self,
        images: Source | Sequence[Source] | None = None,
        text: str | Sequence[str] | None = None,
        return_mm_token_type_ids: bool = False,
        max_tiles: int | None = None,
        fit_pixels: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Texts with ``<image>`` where the pictures go -> what the model's forward takes.

        Args:
            images: pictures of all texts in reading order; lists of lists, one a text, are taken too.
            text: one text or several.
            return_mm_token_type_ids: also return 1 for placeholders and 0 for words.
            max_tiles: at most so many tiles a picture; None: as composed.
            fit_pixels: least and most pixels of a picture after resizing; None: as composed.
            **kwargs: for the tokenizer; ``return_tensors`` is "pt", and several texts are padded on the left.

        Returns:
            ``input_ids``, ``attention_mask`` int64 [B, T] and, with pictures, what :func:`as_inputs` gives.

        Raises:
            ValueError: if the texts do not have as many places as there are pictures.
        """
        pictures = [] if images is None else as_list(images)
        limits = {"max_tiles": max_tiles, "fit_pixels": fit_pixels}
        if text is None:
            return self.image_processor(pictures, **limits) if pictures else BatchFeature({})
        texts = [text] if isinstance(text, str) else list(text)
        per_text = [t.count(self.image_token) for t in texts]
        if sum(per_text) != len(pictures):
            raise ValueError(
                f"{sum(per_text)} places ({self.image_token}) in the text but {len(pictures)} pictures"
            )
        numbers = (n for count in per_text for n in range(count))
        prepared = [self.prepare(image, n, **limits) for image, n in zip(pictures, numbers, strict=True)]
        values = as_inputs(prepared) if prepared else {}
        tokens = iter(p.tokens for p in prepared)
        texts = [self._widen(t, tokens) for t in texts]
        # On the left: what is generated follows the last word of every row.
        left = {"padding": len(texts) > 1, "padding_side": "left"}
        kwargs = {"return_tensors": "pt", **left, **kwargs}
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
        """Tokens and tiles of pictures of (height, width) px; what vLLM plans with."""
        if image_sizes is None:
            return MultiModalData()
        layouts = [self.image_processor.layout((int(h), int(w))) for h, w in image_sizes]
        return MultiModalData(
            num_image_tokens=[found.tokens for found in layouts],
            num_image_patches=[len(found.tile_tokens) for found in layouts],
        )

    @property
    def model_input_names(self) -> list[str]:
        """Keys of what a call returns."""
        return ["input_ids", "attention_mask", "pixel_values", "image_take"]


def as_list(images: Any) -> list[Source]:
    """One picture, several, or several lists of them -> one list in reading order."""
    if not isinstance(images, (list, tuple)):
        return [images]
    return [image for entry in images for image in as_list(entry)]


def as_inputs(pictures: Sequence[PreparedImage]) -> dict[str, Any]:
    """What the model's forward takes for some pictures in reading order.

    Returns:
        ``pixel_values`` float32 [I, 3, H, W], or a list of one such tensor for each size of tile; and, unless
        every picture is one tile of one size without marks, ``image_take`` int64 [K].
    """
    orders = [None if p.order is None else torch.tensor(p.order) for p in pictures]
    stacked, take = lay_out(
        [Picture(p.tiles, p.tile_tokens, order) for p, order in zip(pictures, orders, strict=True)]
    )
    if len(stacked) == 1 and not any(order is not None for order in orders):
        return {"pixel_values": stacked[0]}
    return {"pixel_values": stacked[0] if len(stacked) == 1 else list(stacked), "image_take": take}
