"""What is in the weights: which parts, how they are joined. Nothing about how they were trained."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from .audio_towers import audio_tower_config
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
    "AutoFeatureExtractor": "audio_processing.TinyModalAudioProcessor",
    "AutoProcessor": "processing_tinymodal.TinyModalProcessor",
}
"""Where transformers finds the classes of a saved folder; written into its ``config.json``."""


CONNECTORS = {"image": "mlp", "audio": "stack_frames"}
"""The connector of each kind of media where none is named."""


class TinyModalConfig(PreTrainedConfig):
    """A language model, a tower and a connector for each kind of media, and a speech head if it speaks.

    Args:
        text_config: the language model's own config, or its values with ``model_type``.
        vision_config: the tower's own config, with all its blocks also behind the feature layer; or None: no
            pictures.
        connectors: ``{"image": {"name": "mlp", "options": {"depth": 2}, "marks": [], "merge": "flat"},
            "audio": {"name": "stack_frames", "options": {}}}``; kept with every option spelt out. ``marks``
            are the learned embeddings around and between tokens of a picture, ``merge`` how its tiles are put
            together again (``geometry.arrange``).
        feature_layer: which hidden state of the tower is used, counted as in LLaVA; a list: their features
            side by side.
        keep_class: keep the class token (and registers) of a tower that has one, before the patches.
        image_token_id: token that holds the place of one image embedding.
        chat_template: name of the template it was trained with; ``tokenizer`` for the tokenizer's own.
        audio_config: as ``vision_config``, of the tower that hears; None: no sounds.
        audio_feature_layer: which of its hidden states is used, the same way; ``weighted``: a learned mean of
            all.
        audio_token_id: token that holds the place of one embedding of a sound.
        speech: what ``talker.build_speech_head`` takes, and under ``codec`` what makes its frames a sound;
            None: it does not speak.
        **kwargs: what every transformers config takes; ``tie_word_embeddings`` is as the language model's.

    Raises:
        ValueError: a part nobody knows, a connector without a tower, or an option a connector does not have.
    """

    model_type = "tinymodal"
    _auto_class = "AutoConfig"
    # Attention choice and data type travel to these.
    sub_configs: ClassVar[dict[str, Any]] = {
        "text_config": AutoConfig,
        "vision_config": AutoConfig,
        "audio_config": AutoConfig,
    }

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        connectors: dict[str, Any] | None = None,
        feature_layer: int | list[int] = -2,
        keep_class: bool = False,
        image_token_id: int | None = None,
        chat_template: str = "chatml",
        audio_config: PreTrainedConfig | dict[str, Any] | None = None,
        audio_feature_layer: int | list[int] | str = -1,
        audio_token_id: int | None = None,
        speech: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.text_config = language_config(text_config)
        self.vision_config: Any = None if vision_config is None else tower_config(vision_config)
        self.audio_config: Any = None if audio_config is None else audio_tower_config(audio_config)
        self.connectors = settled_connectors(connectors, vision_config is not None, audio_config is not None)
        self.feature_layer = feature_layer if isinstance(feature_layer, int) else list(feature_layer)
        self.keep_class = keep_class
        self.audio_feature_layer: Any = audio_feature_layer
        if not isinstance(audio_feature_layer, int | str):
            self.audio_feature_layer = list(audio_feature_layer)
        self.image_token_id: Any = image_token_id
        self.audio_token_id: Any = audio_token_id
        self.speech = None if speech is None else dict(speech)
        self.chat_template = chat_template
        kwargs["tie_word_embeddings"] = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    def place_of(self, kind: str) -> Any:
        """The token that holds the place of one embedding of a picture (``image``) or a sound (``audio``)."""
        return {"image": self.image_token_id, "audio": self.audio_token_id}[kind]


def settled_connectors(
    given: dict[str, Any] | None, sees: bool, hears: bool = False
) -> dict[str, dict[str, Any]]:
    """The connectors by medium, each with all its options; where none is named, that of :data:`CONNECTORS`.

    Raises:
        ValueError: a connector without a tower, that nobody knows, or with an option it does not have.
    """
    given = given or {}
    kinds = [kind for kind, has in (("image", sees), ("audio", hears)) if has]
    if given and not kinds:
        raise ValueError(
            f"connectors {sorted(given)} but no tower; give vision_config (for 'image'), audio_config (for "
            f"'audio'), or leave connectors out"
        )
    if set(given) - set(kinds):
        raise ValueError(
            f"connectors are named by medium, here {' and '.join(map(repr, kinds))}; got {sorted(given)}"
        )
    return {kind: _settled(kind, given.get(kind, {})) for kind in kinds}


def _settled(kind: str, given: dict[str, Any]) -> dict[str, Any]:
    laid: dict[str, Any] = {"marks": [], "merge": "flat"} if kind == "image" else {}
    said = {"name": CONNECTORS[kind], "options": {}, **laid, **given}
    if unknown := sorted(set(said) - {"name", "options", *laid}):
        known = ", ".join(["name", "options", *laid])
        raise ValueError(f"a connector of kind {kind!r} has {known}; got {unknown} besides")
    said["options"] = find_connector(said["name"]).settle(said["options"])
    if laid:
        said["marks"] = list(said["marks"])
        mark_rows(said["marks"])
        if said["merge"] not in MERGES:
            raise ValueError(f"unknown merge {said['merge']!r}; known: {', '.join(MERGES)}")
    return said
