"""What is in the weights: which parts, how they are joined. Nothing about how they were trained."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .connectors import find_connector
from .encoders import tower_config

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

    Raises:
        ValueError: for a part nobody knows, a connector without a tower, or an option a connector does not
            have.
    """

    model_type = "tinymodal"
    _auto_class = "AutoConfig"
    # Attention choice and data type travel to these.
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig, "vision_config": AutoConfig}

    text_config: Any = None
    """The language model's own config, or its values with ``model_type``."""
    vision_config: Any = None
    """The tower's own config (all its blocks, also those behind the feature layer), or None: no pictures."""
    connectors: Any = None
    """``{"image": {"name": "mlp", "options": {"depth": 2}}}``; stored with every option spelled out."""
    feature_layer: int = -2
    """Which hidden state of the tower is used, counted as in LLaVA."""
    image_token_id: int | None = None
    """Token that holds the place of one image embedding."""
    chat_template: str = "chatml"
    """Name of the template the model was trained with; ``tokenizer`` for the tokenizer's own."""
    tie_word_embeddings: bool = False
    """As the language model has it; given values are not looked at."""

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = language_config(self.text_config)
        if self.vision_config is not None:
            self.vision_config = tower_config(self.vision_config)
        self.connectors = settled_connectors(self.connectors, sees=self.vision_config is not None)
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))


def language_config(config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig:
    """A language model's config object; llama's default where none is given, as transformers wants it.

    Raises:
        ValueError: if transformers does not know the ``model_type``, or the model is more than a language
            model.
    """
    if config is None:
        return CONFIG_MAPPING["llama"]()
    if isinstance(config, dict):
        values = dict(config)
        model_type = values.pop("model_type", None)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"transformers knows no language model of model_type {model_type!r}")
        config = CONFIG_MAPPING[model_type](**values)
    return config


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
    name = given["image"].get("name", "mlp")
    return {
        "image": {"name": name, "options": find_connector(name).settle(given["image"].get("options", {}))}
    }
