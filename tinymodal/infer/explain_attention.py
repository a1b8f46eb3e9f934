"""What a model attends to while it answers: the decoder's attention, and that of learned queries.

Attention kernels keep no weights; the plain form, which transformers calls ``eager``, gives them back.
Setting it on the model would change what everybody else computes who uses the model at that moment, so the
one forward runs on a :func:`twin`: the same tensors under modules and configs of its own. Nothing has to be
restored.

Only the rows of the answer are made, a token at a time over the cache of the prompt. All rows of a prompt
with 2,500 tokens would be 25 GB for 32 layers of 32 heads; these are 2,500 numbers a layer and token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from tinymodal.core.errors import CheckpointError
from tinymodal.core.types import Encoded
from tinymodal.data.collate import gather
from tinymodal.model.media import Features
from tinymodal.model.modeling_tinymodal import MediaInput
from tinymodal.model.resamplers import Heads, LatentAttention, Perceiver, QFormer, SinCos

# Shapes: T positions of the prompt, t those before a word, L layers with attention, V vocabulary, N tiles,
# S positions of a tower, Q queries, A heads, W width.

Module = TypeVar("Module", bound=nn.Module)


class Step(NamedTuple):
    """One token of the answer, and what was there when it was chosen."""

    token: int
    logprobs_V: Tensor
    """float32 [V], on the CPU; of a placeholder -inf, as when answering."""
    attention_Lt: Tensor
    """float32 [L, t] of the position that predicts it, mean over the heads, on the CPU; rows sum to 1."""


def answer_steps(
    engine: Any, encoded: Encoded, ids: Sequence[int] | None = None, max_new_tokens: int = 64
) -> list[Step]:
    """Decode greedily, or along given tokens, and note what is attended to.

    Args:
        engine: who answers.
        encoded: the prompt.
        ids: the answer's tokens; None: the likeliest, up to and with the stop, as ``Engine.reply`` gives.
        max_new_tokens: at most so many.

    Raises:
        CheckpointError: the language model has no attention, or does not give it back.
    """
    model = engine.model.model
    eager = twin(model.language_model).eval()
    # Not through set_attn_implementation, which a family may refuse that has this form alone.
    for module in eager.modules():
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            config._attn_implementation = "eager"
    room = max_new_tokens if engine.room is None else min(max_new_tokens, engine.room - len(encoded))
    steps: list[Step] = []
    with torch.inference_mode():
        x_1TD = embedded(engine, [encoded])
        cache = None
        if x_1TD.shape[1] > 1:
            cache = model.language_model(inputs_embeds=x_1TD[:, :-1], use_cache=True).past_key_values
        for number in range(room if ids is None else len(ids)):
            out = eager(
                inputs_embeds=x_1TD[:, -1:], past_key_values=cache, use_cache=True, output_attentions=True
            )
            cache = out.past_key_values
            logits_V = engine.model.head(out.last_hidden_state)[0, -1].float()
            logprobs_V = without_places(engine, logits_V).log_softmax(-1).cpu()
            token = int(logprobs_V.argmax()) if ids is None else ids[number]
            steps.append(Step(token, logprobs_V, _rows(out.attentions, len(encoded) + number)))
            if ids is None and _is_over(engine, [step.token for step in steps]):
                break
            here = torch.tensor([[token]], device=x_1TD.device)
            x_1TD = model.get_input_embeddings()(here)
    return steps


def _rows(attentions: Sequence[Tensor | None] | None, length: int) -> Tensor:
    """The last row of each layer, mean over its heads, float32 [L, t]."""
    rows = []
    for attention in attentions or ():
        if attention is None or attention.dim() != 4:
            continue
        row_t = attention[0, :, -1].float().mean(0).cpu()
        if len(row_t) > length:
            row_t = row_t[len(row_t) - length :]
        # A sliding window's cache holds the last positions only.
        rows.append(torch.cat([row_t.new_zeros(length - len(row_t)), row_t]))
    if not rows:
        raise CheckpointError(
            "explain: this language model gives no attention back (it has none, or hides it), so what it "
            "attends to cannot be told; every other verb works with it"
        )
    return torch.stack(rows)


def _is_over(engine: Any, ids: Sequence[int]) -> bool:
    if ids[-1] in engine.stop_ids:
        return True
    text = engine.tokenizer.decode(list(ids), skip_special_tokens=True) if engine.stop_words else ""
    return any(word in text for word in engine.stop_words)


def without_places(engine: Any, logits: Tensor) -> Tensor:
    """Logits [..., V] as the engine chooses by them: a placeholder is no word."""
    logits = logits.clone()
    for _, place in engine.places.values():
        logits[..., place] = -torch.inf
    return logits


def embedded(engine: Any, rows: Sequence[Encoded]) -> Tensor:
    """Prompts of one length as the decoder reads them, media in place: [B, T, D]."""
    model = engine.model.model
    device = next(model.parameters()).device
    ids_BT = torch.stack([row.ids for row in rows]).to(device)
    media: dict[str, MediaInput] = {}
    for kind in engine.places:
        items = [(item, row.sample_id) for row in rows for item in row.media if item.kind == kind]
        if items:
            tiles, take_K = gather(items)
            values = tuple(same_size.to(device, engine.model.dtype) for same_size in tiles)
            media[kind] = model.media_input(kind, values, take_K.to(device), None, ids_BT)
    return model.embed(ids_BT, media)


def twin(module: Module) -> Module:
    """The same tensors under modules and configs of their own.

    Costs no memory but the objects, whatever the layers are (quantised ones as well). What is set on the
    twin's modules or configs does not reach the original.
    """
    return _twin(module, {})


def _twin(module: Any, made: dict[int, Any]) -> Any:
    if id(module) in made:
        return made[id(module)]
    # Not copy.copy: some modules refuse it.
    new = made[id(module)] = object.__new__(type(module))
    new.__dict__.update(vars(module))
    for name, value in vars(module).items():
        if isinstance(value, PreTrainedConfig):
            if id(value) not in made:
                made[id(value)] = copy.deepcopy(value)
            new.__dict__[name] = made[id(value)]
        elif name == "_modules" or name.endswith("_hooks"):
            new.__dict__[name] = copy.copy(value)
    for name, child in module._modules.items():
        new._modules[name] = None if child is None else _twin(child, made)
    return new


# ---- learned queries


def asked_by_queries(engine: Any, kind: str, encoded: Encoded) -> list[list[Tensor]] | None:
    """At which of the tower's positions the connector's queries looked.

    Args:
        engine: who answers.
        kind: of the media.
        encoded: the prompt.

    Returns:
        float32 [Q, S] for each tile of each medium of the kind, rows sum to 1; None where the connector has
        no queries, or its attention is not known here.
    """
    model = engine.model.model
    if kind not in model.connectors or type(model.connectors[kind]) not in QUERIES:
        return None
    connector = model.connectors[kind]
    look = QUERIES[type(connector)]
    device = next(model.parameters()).device
    dtype = next(model.towers[kind].parameters()).dtype
    with torch.inference_mode():
        return [
            [
                look(connector, model.towers[kind](tile[None].to(device, dtype)))[0].float().cpu()
                for tile in item.tiles
            ]
            for item in encoded.media
            if item.kind == kind
        ]


def _of_perceiver(connector: Perceiver, features: Features) -> Tensor:
    """[N, Q, S]: latents look at the features and at one another, ``depth`` times."""
    x_NSW = connector.linear(features.values)
    latents_NQW = connector.latents.expand(len(x_NSW), -1, -1)
    seen_NQS = x_NSW.new_zeros(len(x_NSW), latents_NQW.shape[1], x_NSW.shape[1])
    layers: Any = connector.layers
    for layer in layers:
        attention: LatentAttention = layer[0]
        normed_NQW = attention.norm_latents(latents_NQW)
        both = torch.cat((attention.norm_media(x_NSW), normed_NQW), dim=1)
        keys = attention.to_kv(both).chunk(2, dim=-1)[0]
        weights = _weights(attention.to_q(normed_NQW), keys, attention.num_heads)
        direct, among = weights.split((x_NSW.shape[1], latents_NQW.shape[1]), dim=2)
        seen_NQS = (seen_NQS + direct + among @ seen_NQS) / 2
        latents_NQW = layer(x_NSW, latents_NQW)
    return _normalised(seen_NQS)


def _of_qformer(connector: QFormer, features: Features) -> Tensor:
    """[N, Q, S]: queries look at one another in every block, at the features in some."""
    x_NSE = connector.norm(features.values)
    q_NQW = connector.layernorm(connector.query_tokens).expand(len(x_NSE), -1, -1)
    seen_NQS = x_NSE.new_zeros(len(x_NSE), q_NQW.shape[1], x_NSE.shape[1])
    layers: Any = connector.layer
    for layer in layers:
        own: Heads = layer.attention.attention
        among = _weights(own.query(q_NQW), own.key(q_NQW), own.num_heads)
        seen_NQS = (seen_NQS + among @ seen_NQS) / 2
        if layer.crossattention is not None:
            cross: Heads = layer.crossattention.attention
            asking = layer.attention(q_NQW, q_NQW)
            direct = _weights(cross.query(asking), cross.key(x_NSE), cross.num_heads)
            seen_NQS = (seen_NQS + direct) / 2
        q_NQW = layer(q_NQW, x_NSE)
    return _normalised(seen_NQS)


class _Recorder(nn.Module):
    """torch's attention, with its weights kept."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.weights = torch.zeros(0)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **others: Any) -> tuple[Tensor, None]:
        out, self.weights = self.attention(query, key, value, need_weights=True)
        return out, None


def _of_sincos(connector: SinCos, features: Features) -> Tensor:
    """[N, Q, S]: one cross attention, its own weights."""
    own = twin(connector)
    recorder = _Recorder(connector.attn)
    own._modules["attn"] = recorder
    own(features)
    return recorder.weights


def _weights(q_NQW: Tensor, k_NSW: Tensor, num_heads: int) -> Tensor:
    """softmax(q k / sqrt(C)), mean over the heads: [N, Q, S]."""
    q, k = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q_NQW, k_NSW))
    return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1).mean(1)


def _normalised(seen: Tensor) -> Tensor:
    return seen / seen.sum(-1, keepdim=True).clamp(min=1e-12)


QUERIES: dict[type[nn.Module], Any] = {
    Perceiver: _of_perceiver,
    QFormer: _of_qformer,
    SinCos: _of_sincos,
}
"""How each resampler's attention is found. Of several layers it is followed from the first to the last, half
of each step staying where it is, which is what the residual connection does: attention rollout (Abnar and
Zuidema 2020, arXiv:2005.00928)."""
