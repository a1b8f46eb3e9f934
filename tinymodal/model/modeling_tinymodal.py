"""The model: media become embeddings, take their places among the words, and a language model goes on.

``TinyModalModel`` ends at the last hidden state; ``TinyModalForConditionalGeneration`` adds the head and
``generate``. Both are ordinary transformers models: what they are made of is in ``TinyModalConfig``, and a
saved folder carries this file and its neighbours, so that it loads where our package is not installed.
"""

# Shapes: B rows, T positions, I tiles of a kind (a sound's are its windows), S tokens a tile, K placeholders,
# M marks, R embeddings in all, D language width, V vocabulary.

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .audio_towers import audio_encoder_of
from .configuration_tinymodal import AUTO_MAP, TinyModalConfig
from .connectors import find_connector
from .encoders import encoder_of
from .geometry import num_marks, num_tokens
from .language import LanguageHead, build_decoder
from .layout import VALUES
from .media import Features, MediaEncoder

MEDIA = {kind: (values, f"{kind}_take", f"{kind}_put") for kind, values in VALUES.items()}
"""Kind -> what the forward pass calls prepared media, and the places their embeddings come from and go to."""

MISSING = {
    "image": "this model has no image tower, so it does not see; [model.vision] in a recipe gives it one",
    "audio": "this model has no audio tower, so it does not hear; [model.audio] in a recipe gives it one",
}


class MediaInput(NamedTuple):
    """The media of one kind in a batch, and where their embeddings go."""

    values: Tensor | Sequence[Tensor]
    """Prepared media, e.g. float [I, 3, H, W] or [I, bands, frames]; where tiles differ in size, one tensor
    for each size."""
    take: Tensor
    """int64 [K]: which of the R embeddings are used: those of the tiles in order, then the marks."""
    put: Tensor
    """int64 [K]: at which of the B*T positions."""


class TinyModalPreTrainedModel(PreTrainedModel):
    """What both classes share with every transformers model: loading, saving, attention choice."""

    config_class = TinyModalConfig
    config: TinyModalConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "audio", "text"]  # noqa: RUF012 - transformers' own class attribute, as the next
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        # Called for what a checkpoint does not hold; decoder and backbones bring their own. Modules that were
        # built with numbers in them are marked in _keep_initial_weights and never come here.
        if module is getattr(self, "lm_head", None):
            std = getattr(self.config.text_config, "initializer_range", 0.02)
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    def set_attn_implementation(  # type: ignore[override]
        self, attn_implementation: str | dict[str, str], **kwargs: Any
    ) -> None:
        """Change the attention of all parts, or of those whose configs (``text_config`` ...) are named."""
        by_name = attn_implementation if isinstance(attn_implementation, dict) else None
        towers = {"image": self.config.vision_config, "audio": self.config.audio_config}
        names = {"image": "vision_config", "audio": "audio_config"}
        chosen = {
            kind: by_name.get(names[kind]) if by_name is not None else attn_implementation for kind in towers
        }
        for kind, config in towers.items():
            if config is not None and chosen[kind] is not None:
                # The tower runs on a copy, cut to its feature layer; transformers looks for the original.
                config._attn_implementation_internal = chosen[kind]
        super().set_attn_implementation(attn_implementation, **kwargs)
        if by_name is None:
            return
        for part in self.modules():
            if isinstance(part, MediaEncoder) and isinstance(part.module, PreTrainedModel):
                asked = chosen[part.kind]
                if asked is not None:
                    part.module.set_attn_implementation(asked, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write weights, config and the code that reads them; see ``PreTrainedModel.save_pretrained``."""
        # transformers enters only the class that is saved; vLLM asks for AutoModel, processors for theirs.
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)


class TinyModalModel(TinyModalPreTrainedModel):
    """Towers, connectors and the decoder of a language model; ends at the last hidden state."""

    _auto_class: Any = "AutoModel"
    # A folder of the whole model has them; they belong to what comes after the last hidden state.
    _keys_to_ignore_on_load_unexpected = [r"^speech_head\."]  # noqa: RUF012

    def __init__(self, config: TinyModalConfig, language: PreTrainedModel | None = None) -> None:
        """Make the model; ``language`` is a causal language model whose decoder is taken."""
        super().__init__(config)
        decoder: Any = build_decoder(config.text_config) if language is None else language.base_model
        self.language_model = decoder
        if language is not None:
            _keep_initial_weights(self.language_model)
        self.towers, self.connectors, self.marks = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        width = self.language_model.get_input_embeddings().embedding_dim
        for kind, chosen in config.connectors.items():
            tower = _build_tower(config, kind)
            self.towers[kind] = tower
            connector = find_connector(chosen["name"])
            self.connectors[kind] = connector.build(tower.widths, width, **chosen["options"])
            if chosen.get("marks"):
                self.marks[kind] = Marks(num_marks(chosen["marks"]), width)
        for part in (self.towers, self.connectors, self.marks):
            _keep_initial_weights(part)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def perceive(self, kind: str, values: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Prepared media of one kind -> embeddings [I, S, D], one tensor for each size of tile.

        Raises:
            ValueError: if the model has no tower for the kind.
        """
        if kind not in self.towers:
            raise ValueError(f"{kind} given, but {MISSING[kind]}")
        tower = self.towers[kind]
        # Words are computed in the model's data type, pixels and waves arrive in float32.
        dtype = next(tower.parameters()).dtype
        same_size = (values,) if isinstance(values, Tensor) else values
        return tuple(self.connectors[kind](tower(tiles.to(dtype))) for tiles in same_size)

    def connect(self, kind: str, features: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the tower computed before -> embeddings [I, S, D], one tensor for each shape of features.

        Args:
            kind: of the media.
            features: the tower's own, float [I, *grid, E]; where tiles differ in size, one such tensor for
                each size.

        Raises:
            ValueError: if the model has no connector for the kind.
        """
        if kind not in self.connectors:
            raise ValueError(f"{kind} features given, but this model has no {kind} connector")
        connector = self.connectors[kind]
        # A cache may keep them in less than the model computes in.
        dtype = next(self.towers[kind].parameters()).dtype
        same_size = (features,) if isinstance(features, Tensor) else features
        return tuple(connector(Features(x.to(dtype).flatten(1, -2), tuple(x.shape[1:-1]))) for x in same_size)

    def bank(self, kind: str, seen: Sequence[Tensor]) -> Tensor:
        """What placeholders choose from, [R, D]: all embeddings laid end to end, then the learned marks."""
        rows = [m_ISD.flatten(0, 1) for m_ISD in seen]
        if kind in self.marks:
            marks: Any = self.marks[kind]
            rows.append(marks.weight.to(rows[0].dtype))
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def get_image_features(self, pixel_values: Tensor | Sequence[Tensor], **kwargs: Any) -> Any:
        """Embeddings of prepared tiles, [I, S, D] or one such for each size; others ask by this name."""
        seen = self.perceive("image", pixel_values)
        return seen[0] if len(seen) == 1 else seen

    def get_audio_features(self, audio_values: Tensor | Sequence[Tensor], **kwargs: Any) -> Any:
        """Embeddings of prepared windows of sound, [I, S, D] or one such for each length."""
        heard = self.perceive("audio", audio_values)
        return heard[0] if len(heard) == 1 else heard

    def embed(self, input_ids_BT: Tensor, media: Mapping[str, MediaInput]) -> Tensor:
        """Token embeddings [B, T, D] with each placeholder replaced by its medium, in reading order."""
        x_BTD = self.get_input_embeddings()(input_ids_BT)
        for kind, (values, take, put) in media.items():
            x_BTD = self.place(x_BTD, self.bank(kind, self.perceive(kind, values)), take, put)
        return x_BTD

    @staticmethod
    def place(x_BTD: Tensor, bank_RD: Tensor, take: Tensor, put: Tensor) -> Tensor:
        """``x_BTD`` with the rows ``take`` of :meth:`bank` at the positions ``put``."""
        m_KD = bank_RD.index_select(0, take).to(x_BTD.dtype)
        return x_BTD.flatten(0, 1).index_copy(0, put, m_KD).view_as(x_BTD)

    def tokens_of(self, kind: str, size: tuple[int, ...]) -> int:
        """Embeddings that one prepared tile gives. Pure integers.

        Args:
            kind: of the medium.
            size: of the tile: (H, W) px, or (frames,) or (samples,) of a window of sound.
        """
        chosen, config = self.config.connectors[kind], self.config
        if kind == "image":
            vision = config.vision_config
            grid = encoder_of(vision).grid(vision, size, keep_class=config.keep_class)
        else:
            grid = audio_encoder_of(config.audio_config).grid(config.audio_config, size)
        return num_tokens(find_connector(chosen["name"]).shrink(grid, **chosen["options"]))

    def media_input(
        self,
        kind: str,
        values: Tensor | Sequence[Tensor],
        take: Tensor | None,
        put: Tensor | None,
        input_ids_BT: Tensor,
    ) -> MediaInput:
        """``values`` with their places, found among the tokens where they are not given.

        Raises:
            ValueError: if there are not as many placeholders as embeddings.
        """
        if take is not None and put is not None:
            return MediaInput(values, take, put)
        if take is None and put is not None:
            raise ValueError(f"{kind}_put needs {kind}_take, which says what goes to these places")
        if kind not in self.towers:
            raise ValueError(f"{kind} given, but {MISSING[kind]}")
        put = input_ids_BT.flatten().eq(self.config.place_of(kind)).nonzero().squeeze(1)
        if take is None:
            take = self._whole_tiles(kind, values, len(put)).to(put.device)
        if len(put) != len(take):
            raise ValueError(
                f"{len(put)} placeholders (token {self.config.place_of(kind)}) but {kind}_take names "
                f"{len(take)} embeddings; the processor writes as many as are needed"
            )
        return MediaInput(values, take, put)

    def _whole_tiles(self, kind: str, values: Tensor | Sequence[Tensor], places: int) -> Tensor:
        """Every embedding of every tile in order, int64 [K]: for media of one tile without marks."""
        if kind in self.marks or not isinstance(values, Tensor):
            raise ValueError(
                f"this model writes {kind}s as tiles and marks, whose order the processor gives; "
                f"pass {kind}_take on with {MEDIA[kind][0]}"
            )
        each = self.tokens_of(kind, tuple(values.shape[2:]))
        if places != len(values) * each:
            raise ValueError(
                f"{places} placeholders (token {self.config.place_of(kind)}) but {len(values)} {kind}s of "
                f"{each} embeddings, {len(values) * each} in all; the processor writes as many as are needed"
            )
        return torch.arange(places)

    def require_no_placeholder(self, input_ids_BT: Tensor, kinds: Iterable[str] = tuple(MEDIA)) -> None:
        """Raise ValueError if a place for a medium of ``kinds`` would be filled with a meaningless word."""
        for kind in kinds:
            place = self.config.place_of(kind)
            places = int(input_ids_BT.eq(place).sum()) if kind in self.towers and place is not None else 0
            if places:
                raise ValueError(f"{places} placeholders (token {place}) but no {MEDIA[kind][0]}")

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        image_take: Tensor | None = None,
        image_put: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        audio_values: Tensor | Sequence[Tensor] | None = None,
        audio_take: Tensor | None = None,
        audio_put: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the media and the decoder.

        Args:
            input_ids: int64 [B, T]; each picture holds its places with ``config.image_token_id``, each sound
                with ``config.audio_token_id``.
            pixel_values: float [I, 3, H, W], prepared, in reading order over the rows; where tiles differ in
                size, one such tensor for each size.
            image_take: int64 [K], see :class:`MediaInput`; may be left out where every picture is one tile
                and the model has no marks.
            image_put: int64 [K], the positions in the flattened B*T; found from ``input_ids`` if not given.
            position_ids: int64 [B, T]. Restarting at 0 they separate the documents of a packed row, if there
                is neither ``attention_mask`` nor cache.
            attention_mask: 0 at padding, as transformers has it; None where there is none or rows are packed.
            past_key_values: the cache of the positions before.
            inputs_embeds: float [B, T, D] instead of ``input_ids``, media already in place.
            use_cache: whether to keep a cache; by default only if one is given.
            audio_values: float [I, bands, frames] or [I, 1, samples], prepared windows of sound, in reading
                order over the rows; where windows differ in length, one such tensor for each length.
            audio_take: as ``image_take``; may be left out where every sound is one window, all of one length.
            audio_put: as ``image_put``.
            **kwargs: for the decoder, e.g. ``output_hidden_states``.

        Raises:
            ValueError: if placeholders and media embeddings do not match.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        given = {
            "image": (pixel_values, image_take, image_put),
            "audio": (audio_values, audio_take, audio_put),
        }
        if input_ids is not None:
            media = {
                kind: self.media_input(kind, values, take, put, input_ids)
                for kind, (values, take, put) in given.items()
                if values is not None
            }
            absent = [kind for kind in given if kind not in media]
            if absent and not self.training and _is_start(past_key_values):
                self.require_no_placeholder(input_ids, absent)
            inputs_embeds = self.embed(input_ids, media)
        elif found := [MEDIA[kind][0] for kind, (values, _, _) in given.items() if values is not None]:
            raise ValueError(
                f"{found[0]} need input_ids to find their places; inputs_embeds hold media already"
            )
        if use_cache is None:
            # transformers makes a cache unasked, and with a cache it does not look at document borders.
            use_cache = past_key_values is not None
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )


class TinyModalForConditionalGeneration(TinyModalPreTrainedModel, GenerationMixin):
    """The model with the head of its language model: logits, loss and ``generate``."""

    _auto_class: Any = "AutoModelForImageTextToText"

    def __init__(self, config: TinyModalConfig, language: PreTrainedModel | None = None) -> None:
        """Make the model.

        Args:
            config: what it is made of.
            language: a causal language model of ``config.text_config`` to go on with, its decoder and its
                head as they are (no copy); None: a new one.
        """
        super().__init__(config)
        self.model = TinyModalModel(config, language)
        # Not a module: it has no weights of its own.
        self._head = LanguageHead(config.text_config)
        if language is None:
            self.lm_head = nn.Linear(self._head.in_width, self._head.vocabulary, bias=self._head.has_bias)
        else:
            self.lm_head = language.get_output_embeddings()
            _keep_initial_weights(self.lm_head)
        self.speech_head: nn.Module | None = None
        if config.speech is not None:
            from .talker import build_speech_head

            # A model draws the same numbers with a mouth and without.
            with torch.random.fork_rng(devices=[]):
                words: Any = self.get_input_embeddings()
                self.speech_head = build_speech_head(config.speech, words.embedding_dim)
            _keep_initial_weights(self.speech_head)
        self._tied_weights_keys = {"lm_head.weight": f"model.{_name_of_embedding(self.model)}"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def get_image_features(self, pixel_values: Tensor | Sequence[Tensor], **kwargs: Any) -> Any:
        """As :meth:`TinyModalModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_audio_features(self, audio_values: Tensor | Sequence[Tensor], **kwargs: Any) -> Any:
        """As :meth:`TinyModalModel.get_audio_features`."""
        return self.model.get_audio_features(audio_values, **kwargs)

    @property
    def head_is_plain(self) -> bool:
        """Whether logits are ``states @ head_weight().T + head_bias()`` and nothing else."""
        return self._head.is_plain

    def head_weight(self) -> Tensor:
        """The matrix of the head, [V, D]."""
        return self.lm_head.weight

    def head_bias(self) -> Tensor | None:
        """The bias of the head, [V], or None."""
        return self.lm_head.bias

    def head(self, states: Tensor) -> Tensor:
        """Logits of states, as the language model's own class computes them: [..., D] -> [..., V]."""
        if self._head.is_plain:
            return self.lm_head(states)
        logits = self._head(states.reshape(1, -1, states.shape[-1]), self.lm_head)
        return logits.view(*states.shape[:-1], -1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        image_take: Tensor | None = None,
        image_put: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        audio_values: Tensor | Sequence[Tensor] | None = None,
        audio_take: Tensor | None = None,
        audio_put: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """As :meth:`TinyModalModel.forward`, and then the head.

        Args:
            input_ids: see :meth:`TinyModalModel.forward`, as all that is not named here.
            pixel_values: see there.
            image_take: see there.
            image_put: see there.
            position_ids: see there.
            attention_mask: see there.
            past_key_values: see there.
            inputs_embeds: see there.
            use_cache: see there.
            labels: int64 [B, T], unshifted, -100 where nothing trains. The loss is the mean over the targets,
                as in every transformers model; training here has its own, see ``train/loss.py``.
            logits_to_keep: last positions to compute logits for (0: all), or their indices.
            audio_values: see there.
            audio_take: see there.
            audio_put: see there.
            **kwargs: for the decoder and the loss, e.g. ``output_hidden_states``, ``num_items_in_batch``.
        """
        loss_kwargs = {k: kwargs.pop(k) for k in ("num_items_in_batch", "ignore_index") if k in kwargs}
        out = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_take=image_take,
            image_put=image_put,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            audio_values=audio_values,
            audio_take=audio_take,
            audio_put=audio_put,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(out[0][:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], **loss_kwargs
            )
        if kwargs.get("return_dict") is False:
            return (logits, *out[1:]) if loss is None else (loss, logits, *out[1:])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.get("past_key_values"),
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Any,
        past_key_values: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """One step's inputs: pictures and sounds only while their placeholders are among the tokens."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        seen = not is_first_iteration and kwargs.get("use_cache", True)
        for name in (name for names in MEDIA.values() for name in names):
            placed = seen or inputs.get("inputs_embeds") is not None
            inputs[name] = None if placed else kwargs.get(name)
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Any = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Repeat each row for beams and samples, but not its media: all copies look at the same pictures.

        transformers would repeat every tensor along its first dimension, which is not rows for media.
        """
        media: dict[str, Any] = {}
        for kind, (values, take, put) in MEDIA.items():
            own = {name: model_kwargs.pop(name, None) for name in (values, take, put)}
            if expand_size > 1 and own[values] is not None and input_ids is not None:
                per_row = input_ids.eq(self.config.place_of(kind)).sum(1).tolist()
                if own[take] is None:
                    own[take] = self.model._whole_tiles(kind, own[values], sum(per_row))
                rows = own[take].to(input_ids.device).split(per_row)
                own[take] = torch.cat([row for row in rows for _ in range(expand_size)])
                own[put] = None  # found again among the repeated rows
            media |= own
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        return input_ids, model_kwargs | {k: v for k, v in media.items() if v is not None}


class Marks(nn.Module):
    """Learned embeddings that stand before, behind and between the tokens of a picture."""

    def __init__(self, num: int, width: int) -> None:
        super().__init__()
        # As LLaVA-NeXT begins its image_newline: about the length of an embedding of unit variance / sqrt(D).
        self.weight = nn.Parameter(torch.randn(num, width) / width**0.5)


def load_exactly(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a module whose names they bear.

    Raises:
        ValueError: naming the first few that are missing, not expected, or of another shape.
    """
    own = module.state_dict()
    missing = sorted(set(own) - set(weights))
    unknown = sorted(set(weights) - set(own))
    shapes = [
        f"{name}: {tuple(weights[name].shape)} for {tuple(own[name].shape)}"
        for name in sorted(set(own) & set(weights))
        if weights[name].shape != own[name].shape
    ]
    if missing or unknown or shapes:
        raise ValueError(
            f"weights do not fit: {len(missing)} missing {missing[:3]}, {len(unknown)} not expected "
            f"{unknown[:3]}, {len(shapes)} of another shape {shapes[:3]}"
        )
    module.load_state_dict(weights)


def _build_tower(config: TinyModalConfig, kind: str) -> MediaEncoder:
    """The tower of one kind, as the config has it."""
    if kind == "image":
        vision = config.vision_config
        return encoder_of(vision).build(vision, config.feature_layer, keep_class=config.keep_class)
    audio = config.audio_config
    return audio_encoder_of(audio).build(audio, config.audio_feature_layer)


def _keep_initial_weights(module: nn.Module) -> None:
    """Tell transformers that a part was built with the numbers it is to begin with."""
    if any(p.is_meta for p in module.parameters()):
        return  # built to be filled from a file
    for part in module.modules():
        part._is_hf_initialized = True  # type: ignore[assignment]


def _name_of_embedding(model: PreTrainedModel) -> str:
    """Name of the token embedding's weight inside ``model``: families call it differently."""
    weight = model.get_input_embeddings().weight
    return next(name for name, p in model.named_parameters() if p is weight)


def _is_start(past_key_values: Any) -> bool:
    """Whether nothing was read yet."""
    return past_key_values is None or past_key_values.get_seq_length() == 0
