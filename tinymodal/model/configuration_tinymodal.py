"""What is in the weights: which parts, how they are joined. Nothing about how they were trained."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from .connectors import find_connector
from .encoders import tower_config
from .geometry import MERGES, mark_rows
from .language import language_config as language_config

AUTO_MAP = {
    "AutoConfig": "configuration_tinymodal.TinyModalConfig",
    "AutoModel": "modeling_tinymodal.TinyModalModel",
    "AutoModelForImageTextToText": "modeling_tinymodal.TinyModalForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_tinymodal.TinyModalForConditionalGeneration",
    "AutoImageProcessor": "processing_tinymodal.TinyModalImageProcessor",
    "AutoProcessor": "processing_tinymodal.TinyModalProcessor",
}
"""Where transformers finds the classes of a saved folder; written into its ``config.json``."""


class TinyModalConfig(PreTrainedConfig):
    """A language model, a tower if it sees, and the connector between them.

    Args:
        text_config: the language model's own config, or its values with ``model_type``.
        vision_config: the tower's own config, with all its blocks also behind the feature layer; or None: no
            pictures.
        connectors: ``{"image": {"name": "mlp", "options": {"depth": 2}, "marks": [], "merge": "flat"}}``;
            kept with every option spelt out. ``marks`` are the learned embeddings around and between tokens,
            ``merge`` how tiles are put together again (``geometry.arrange``).
        feature_layer: which hidden state of the tower is used, counted as in LLaVA; a list: their features
            side by side.
        keep_class: keep the class token (and registers) of a tower that has one, before the patches.
        image_token_id: token that holds the place of one image embedding.
        chat_template: name of the template it was trained with; ``tokenizer`` for the tokenizer's own.
        **kwargs: what every transformers config takes; ``tie_word_embeddings`` is as the language model's.

    Raises:
        ValueError: a part nobody knows, a connector without a tower, or an option a connector does not have.
    """

    model_type = "tinymodal"
    _auto_class = "AutoConfig"
    # Attention choice and data type travel to these.
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        connectors: dict[str, Any] | None = None,
        feature_layer: int | list[int] = -2,
        keep_class: bool = False,
        image_token_id: int | None = None,
        chat_template: str = "chatml",
        **kwargs: Any,
    ) -> None:
        self.text_config = language_config(text_config)
        self.vision_config: Any = None if vision_config is None else tower_config(vision_config)
        self.connectors = settled_connectors(connectors, sees=vision_config is not None)
        self.feature_layer = feature_layer if isinstance(feature_layer, int) else list(feature_layer)
        self.keep_class = keep_class
        self.image_token_id: Any = image_token_id
        self.chat_template = chat_template
        kwargs["tie_word_embeddings"] = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)


def settled_connectors(given: dict[str, Any] | None, sees: bool) -> dict[str, Any]:
    """The connectors by medium, each with all its options; an mlp where none is named."""
    if not sees:
        if given:
            raise ValueError(
                f"connectors {sorted(given)} but no tower; give vision_config or leave connectors out"
            )
        return {}
    given = given or {"image": {"name": "mlp"}}
    if set(given) != {"image"}:
        raise ValueError(f"connectors are named by medium, here 'image'; got {sorted(given)}")
    said = {"name": "mlp", "options": {}, "marks": [], "merge": "flat", **given["image"]}
    if unknown := sorted(set(said) - {"name", "options", "marks", "merge"}):
        raise ValueError(f"a connector has name, options, marks and merge; got {unknown} besides")
    said["options"] = find_connector(said["name"]).settle(said["options"])
    said["marks"] = list(said["marks"])
    mark_rows(said["marks"])
    if said["merge"] not in MERGES:
        raise ValueError(f"unknown merge {said['merge']!r}; known: {', '.join(MERGES)}")
    return {"image": said}
