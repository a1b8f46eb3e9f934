"""What must be known about a causal language model to put it behind our embeddings.

Any of transformers' will do, and a few that it has no class for (:data:`OWN_LANGUAGES`). The decoder is used
as it is. Its head is more than a matrix in some families (phi adds a bias, gemma2 caps the logits, granite
divides them), and each family writes that in its own ``forward``. Instead of a list of families, the family's
own class computes the head here: a copy of it without weights, whose decoder gives back what it is given.
"""

# Shapes: B rows, T positions, D language width, V vocabulary.

from __future__ import annotations

import copy
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from .minicpm import MiniCPMConfig, MiniCPMForCausalLM, MiniCPMModel
from .openelm import OpenELMConfig, OpenELMForCausalLM, OpenELMModel
from .tinygptv_phi import TinyGPTVPhiConfig, TinyGPTVPhiForCausalLM, TinyGPTVPhiModel


class OwnLanguage(NamedTuple):
    """The classes of a family that transformers does not have."""

    config: type[PreTrainedConfig]
    decoder: type[PreTrainedModel]
    causal: type[PreTrainedModel]


OWN_LANGUAGES = {
    "openelm": OwnLanguage(OpenELMConfig, OpenELMModel, OpenELMForCausalLM),
    "minicpm": OwnLanguage(MiniCPMConfig, MiniCPMModel, MiniCPMForCausalLM),
    "tinygptv_phi": OwnLanguage(TinyGPTVPhiConfig, TinyGPTVPhiModel, TinyGPTVPhiForCausalLM),
}
"""By the ``model_type`` in their ``config.json``. Should transformers learn one of them, ours is still taken:
what a checkpoint computes must not depend on the version."""


def language_config(config: PreTrainedConfig | dict[str, Any] | None) -> PreTrainedConfig:
    """A language model's config object; llama's default where none is given, as transformers wants it.

    Raises:
        ValueError: if the ``model_type`` is unknown, or the model is more than a language model.
    """
    if config is None:
        return CONFIG_MAPPING["llama"]()
    if isinstance(config, dict):
        values = dict(config)
        model_type = values.pop("model_type", None)
        if model_type in OWN_LANGUAGES:
            config = OWN_LANGUAGES[model_type].config(**values)
        elif model_type in CONFIG_MAPPING:
            config = CONFIG_MAPPING[model_type](**values)
        else:
            known = ", ".join(OWN_LANGUAGES)
            raise ValueError(
                f"transformers knows no language model of model_type {model_type!r}, nor is it one of the "
                f"own ones ({known})"
            )
    part = getattr(config, "text_config", None)
    if part is not None:
        raise ValueError(
            f"{config.model_type!r} is more than a language model; take the config of its language part, "
            f"{part.model_type!r}"
        )
    return config


class States(BaseModelOutputWithPast):
    """A decoder's output with the last hidden state alone; what a family asks for besides is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class Decoded(nn.Module):
    """Stands where a decoder was and returns its input as the last hidden state."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        # Some heads look up a number or the config at their decoder.
        for name, value in vars(decoder).items():
            if isinstance(value, (int, float, str, PreTrainedConfig)) and not name.startswith("_"):
                setattr(self, name, value)

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
        return States(last_hidden_state=inputs_embeds)

    @property
    def decoder(self) -> Decoded:
        """Some families call the decoder inside their base model."""
        return self


class LanguageHead:
    """How a family makes logits of the decoder's states.

    Raises:
        ValueError: if the family's head has weights besides one matrix and a bias, or no head is found.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        family = causal_class(config)
        with torch.device("meta"):
            self.family = family._from_config(copy.deepcopy(config), dtype=torch.float32)
        if self.family.base_model is self.family:
            raise ValueError(f"language model {config.model_type!r}: {family.__name__} has no decoder inside")
        matrix = self.family.get_output_embeddings()
        setattr(self.family, self.family.base_model_prefix, Decoded(self.family.base_model))
        if not isinstance(matrix, nn.Linear):
            found = type(matrix).__name__
            raise ValueError(f"language model {config.model_type!r}: expected a linear head, got {found}")
        path = next(name for name, module in self.family.named_modules() if module is matrix)
        self._place, _, self._name = path.rpartition(".")
        own = {id(p) for p in matrix.parameters()}
        rest = [name for name, p in self.family.named_parameters() if id(p) not in own]
        rest += [name for name, _ in self.family.named_buffers()]
        if rest:
            raise ValueError(
                f"language model {config.model_type!r}: its head has weights besides one matrix "
                f"({', '.join(rest)}); "
                f"such a head is not supported"
            )
        self.family.eval()
        self.in_width, self.vocabulary, self.has_bias = (
            matrix.in_features,
            matrix.out_features,
            matrix.bias is not None,
        )
        self.is_plain = self._probe()

    def _probe(self) -> bool:
        """Whether the family's logits are the matrix' product and nothing else, found on eight made rows."""
        # On the CPU in float32 also where a model is being loaded: on no device, in a type of its own.
        matrix = nn.Linear(self.in_width, 8, self.has_bias, device="meta", dtype=torch.float32)
        matrix = matrix.to_empty(device="cpu")
        with torch.no_grad():
            # Sines, not random numbers: asking must not move anyone's random state. Large enough to feel a
            # cap.
            for i, p in enumerate(matrix.parameters()):
                p.copy_(torch.arange(p.numel(), dtype=p.dtype, device="cpu").add(i).mul(1.7).sin().view_as(p))
            states = torch.arange(4 * self.in_width, dtype=torch.float32, device="cpu").cos().mul(8)
            states = states.view(1, 4, self.in_width)
            return torch.allclose(self(states, matrix), matrix(states), rtol=1e-5, atol=1e-5)

    def __call__(self, states: Tensor, matrix: nn.Linear) -> Tensor:
        """Logits as the family computes them: [B, T, D] -> [B, T, V]."""
        setattr(self.family.get_submodule(self._place), self._name, matrix)
        return self.family(inputs_embeds=states, use_cache=False).logits


def causal_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The family's causal language model.

    Raises:
        ValueError: if there is none for this config.
    """
    if config.model_type in OWN_LANGUAGES:
        return OWN_LANGUAGES[config.model_type].causal
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise ValueError(f"transformers has no causal language model for model_type {config.model_type!r}")
    family: Any = mapping[type(config)]
    return family


def build_decoder(config: PreTrainedConfig) -> PreTrainedModel:
    """The decoder without its head, with random weights.

    Raises:
        ValueError: if it cannot be driven by embeddings alone.
    """
    if getattr(config, "hidden_size_per_layer_input", 0):
        raise ValueError(
            f"language model {config.model_type!r} looks up token ids in every layer, so that a picture's "
            f"embeddings cannot stand in for tokens; choose another"
        )
    # The data type of the whole model, not the one this part was once saved in.
    dtype = torch.get_default_dtype()
    if config.model_type in OWN_LANGUAGES:
        decoder = OWN_LANGUAGES[config.model_type].decoder._from_config(config, dtype=dtype)
    else:
        decoder = AutoModel.from_config(config, dtype=dtype)
    # Many families never train the pad token's embedding. Where pad is also the end of text, the word after
    # every answer but the last would stay untrained.
    decoder.get_input_embeddings().padding_idx = None
    taken = inspect.signature(decoder.forward).parameters
    for name in ("inputs_embeds", "past_key_values"):
        if name not in taken:
            raise ValueError(
                f"language model {config.model_type!r}: its decoder takes no {name}; choose one of attention"
            )
    return decoder


IGNORES_BORDERS = ("biogpt", "falcon", "opt")
"""Families that take ``position_ids`` but do not show them to the mask."""


def packs_exactly(config: PreTrainedConfig) -> bool:
    """Whether restarting ``position_ids`` keep the documents of a row apart.

    They do where all mixing of positions is attention whose mask transformers makes of them. Convolutions,
    linear attention and recurrent states run over the border (measured: 1e-3 in the logits of lfm2, 0.09 in
    qwen3_5, above 1 in mamba), and so does attention that knows positions by other means (bloom, mpt: 0.16).
    """
    try:
        family = causal_class(config)
    except ValueError:
        return False
    layer_types = set(getattr(config, "layer_types", None) or ())
    return (
        "position_ids" in inspect.signature(family.forward).parameters
        and not getattr(family, "_is_stateful", False)
        and layer_types <= {"full_attention", "sliding_attention", "chunked_attention"}
        and config.model_type not in IGNORES_BORDERS
    )
