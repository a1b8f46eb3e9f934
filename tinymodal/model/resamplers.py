"""Connectors that ask: learned queries attend to a tower's features, and each query becomes one token.

The number of tokens is the number of queries, whatever the picture's size.
"""

# Shapes: N items, S features, Q queries, E tower width, D language width, W width inside, H heads, C = W / H.

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .joint import Connector, Option, rows_and_columns
from .media import Features

BERT_EPS = 1e-12
"""Epsilon of every norm inside BERT."""


class Perceiver(Connector):
    """Flamingo's perceiver resampler (arXiv:2204.14198) as TinyLLaVA has it.

    ``depth`` times: latents attend to features and latents together, then pass a feed-forward; pre-norm. It
    runs at the language model's width, which makes it large; ``width`` lets it run narrower, with one matrix
    at the end. Source and names of the weights: tinyllava/model/connector/resampler.py of TinyLLaVA_Factory.
    """

    name = "perceiver"
    defaults: ClassVar[dict[str, Option]] = {
        "num_queries": 128,
        "depth": 3,
        "num_heads": 8,
        "head_width": 64,
        "width": 0,
    }
    may_be_zero: ClassVar[frozenset[str]] = frozenset({"width"})

    def __init__(
        self,
        in_width: int,
        out_width: int,
        num_queries: int = 128,
        depth: int = 3,
        num_heads: int = 8,
        head_width: int = 64,
        width: int = 0,
    ) -> None:
        super().__init__()
        inside = width or out_width
        self.latents = nn.Parameter(torch.randn(num_queries, inside))
        self.linear = nn.Linear(in_width, inside)
        self.layers = nn.ModuleList(PerceiverLayer(inside, num_heads, head_width) for _ in range(depth))
        self.norm = nn.LayerNorm(inside)
        self.proj = nn.Linear(inside, out_width) if width else nn.Identity()

    @classmethod
    def shrink(  # type: ignore[override]
        cls, grid: tuple[int, ...], num_queries: int = 128, **others: Option
    ) -> tuple[int, ...]:
        return (num_queries,)

    def forward(self, features: Features) -> Tensor:
        x_NSW = self.linear(features.values)
        latents_NQW = self.latents.expand(len(x_NSW), -1, -1)
        for layer in self.layers:
            latents_NQW = layer(x_NSW, latents_NQW)
        return self.proj(self.norm(latents_NQW))


class PerceiverLayer(nn.ModuleList):
    """Attention and feed-forward, each added to the latents; numbered 0 and 1 as in the source."""

    def __init__(self, width: int, num_heads: int, head_width: int) -> None:
        feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )
        super().__init__([LatentAttention(width, num_heads, head_width), feed_forward])

    def forward(self, x_NSW: Tensor, latents_NQW: Tensor) -> Tensor:
        latents_NQW = latents_NQW + self[0](x_NSW, latents_NQW)
        return latents_NQW + self[1](latents_NQW)


class LatentAttention(nn.Module):
    """Latents ask features and latents; no biases, both normalised first."""

    def __init__(self, width: int, num_heads: int, head_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, num_heads * head_width, bias=False)
        self.to_kv = nn.Linear(width, 2 * num_heads * head_width, bias=False)
        self.to_out = nn.Linear(num_heads * head_width, width, bias=False)

    def forward(self, x_NSW: Tensor, latents_NQW: Tensor) -> Tensor:
        latents_NQW = self.norm_latents(latents_NQW)
        seen_NRW = torch.cat((self.norm_media(x_NSW), latents_NQW), dim=1)
        k, v = self.to_kv(seen_NRW).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(latents_NQW), k, v, self.num_heads))


class SinCos(Connector):
    """One cross attention with fixed 2-D sine and cosine positions: OmniLMM's and MiniCPM-V's resampler.

    Keys get the position of their feature, values do not. The three forms that were published:

    ========================  ==================  ====================
    system                    ``key_positions``   ``query_positions``
    ========================  ==================  ====================
    OmniLMM-12B               ``interpolated``    true
    MiniCPM-V 2.0             ``direct``          true
    MiniCPM-V 2.5, 2.6, o     ``direct``          false
    ========================  ==================  ====================

    ``interpolated`` stretches the table of the sqrt(Q) x sqrt(Q) queries over the features' grid, bicubic;
    ``direct`` counts the grid's own rows and columns. ``learned_positions`` is for a checkpoint whose table
    was trained by accident: OmniLMM keeps it as a parameter, which ``resampler.requires_grad_(True)`` frees.

    Source and names of the weights: omnilmm/model/resampler.py of OpenBMB/MiniCPM-V; resampler.py in the
    folders of MiniCPM-V-2 and later.
    """

    name = "sincos"
    defaults: ClassVar[dict[str, Option]] = {
        "num_queries": 64,
        "key_positions": "direct",
        "query_positions": False,
        "learned_positions": False,
        "head_width": 128,
    }
    choices: ClassVar[dict[str, Sequence[str]]] = {"key_positions": ("direct", "interpolated")}

    def __init__(
        self,
        in_width: int,
        out_width: int,
        num_queries: int = 64,
        key_positions: str = "direct",
        query_positions: bool = False,
        learned_positions: bool = False,
        head_width: int = 128,
    ) -> None:
        super().__init__()
        require_positions(num_queries, key_positions, query_positions, learned_positions)
        num_heads = max(1, out_width // head_width)
        if out_width % num_heads or out_width % 4:
            raise ValueError(
                f"connector 'sincos' needs a language model's width divisible by 4 and by its {num_heads} "
                f"heads of about {head_width}, got {out_width}; change head_width"
            )
        self.interpolates, self.places_queries = key_positions == "interpolated", query_positions
        self.num_queries, self.width = num_queries, out_width
        self.query = nn.Parameter(torch.empty(num_queries, out_width))
        self.kv_proj: nn.Module = nn.Identity()
        if in_width != out_width:
            self.kv_proj = nn.Linear(in_width, out_width, bias=False)
            nn.init.trunc_normal_(self.kv_proj.weight, std=0.02)
        self.attn = nn.MultiheadAttention(out_width, num_heads, batch_first=True)
        self.ln_q = nn.LayerNorm(out_width, eps=1e-6)
        self.ln_kv = nn.LayerNorm(out_width, eps=1e-6)
        self.ln_post = nn.LayerNorm(out_width, eps=1e-6)
        self.proj = nn.Parameter(out_width**-0.5 * torch.randn(out_width, out_width))
        self.pos_embed: nn.Parameter | None = None
        if learned_positions:
            side = isqrt(num_queries)
            self.pos_embed = nn.Parameter(sincos_table((side, side), out_width).to(self.query.dtype))
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.trunc_normal_(self.attn.out_proj.weight, std=0.02)

    @classmethod
    def shrink(  # type: ignore[override]
        cls,
        grid: tuple[int, ...],
        num_queries: int = 64,
        key_positions: str = "direct",
        query_positions: bool = False,
        learned_positions: bool = False,
        **others: Option,
    ) -> tuple[int, ...]:
        rows_and_columns(grid, cls.name)
        require_positions(num_queries, key_positions, query_positions, learned_positions)
        return (num_queries,)

    def forward(self, features: Features) -> Tensor:
        x_NSD = self.ln_kv(self.kv_proj(features.values))
        grid = rows_and_columns(features.grid, self.name)
        q_QD = self.ln_q(self.query)
        if self.places_queries:
            q_QD = q_QD + self.query_table(x_NSD.device).to(q_QD.dtype)
        if self.interpolates:
            table_SD = stretch(self.query_table(x_NSD.device), grid)
        else:
            table_SD = sincos_table(grid, self.width, x_NSD.device)
        keys_NSD = x_NSD + table_SD.to(x_NSD.dtype)
        out_NQD = self.attn(q_QD.expand(len(x_NSD), -1, -1), keys_NSD, x_NSD, need_weights=False)[0]
        return self.ln_post(out_NQD) @ self.proj

    def query_table(self, device: torch.device) -> Tensor:
        """Positions of the queries, which lie in a square: [Q, D]."""
        if self.pos_embed is not None:
            return self.pos_embed
        side = isqrt(self.num_queries)
        return sincos_table((side, side), self.width, device)


def require_positions(
    num_queries: int, key_positions: str, query_positions: bool, learned_positions: bool
) -> None:
    """Raise ValueError if queries that have places do not fill a square, or a learned table has no use."""
    placed = query_positions or key_positions == "interpolated"
    side = isqrt(num_queries)
    if placed and side**2 != num_queries:
        raise ValueError(
            f"connector 'sincos' places its queries in a square, which num_queries = {num_queries} does not "
            f"fill; take {side**2} (what OmniLMM makes of it without a word) or {(side + 1) ** 2}"
        )
    if learned_positions and not placed:
        raise ValueError(
            "connector 'sincos' has learned_positions only for queries that have places; set query_positions "
            "or key_positions = 'interpolated'"
        )


def sincos_table(grid: tuple[int, int], width: int, device: torch.device | None = None) -> Tensor:
    """Fixed positions of a grid in reading order, float32 [h*w, width].

    The first half of the channels tells the column, the second the row; in each half first the sines, then
    the cosines of position * 10000^(-i / (width / 4)), i < width / 4. Quick, so nothing is cached.

    Source: ``get_2d_sincos_pos_embed`` of facebookresearch/mae (util/pos_embed.py), which both systems took.
    """
    float32 = {"dtype": torch.float32, "device": device}
    frequencies = 1.0 / 10000 ** (torch.arange(width // 4, **float32) / (width / 4))  # type: ignore[arg-type]
    rows, columns = (torch.arange(side, **float32) for side in grid)  # type: ignore[arg-type]
    place_hw2 = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
    angle_hw2i = place_hw2[..., None] * frequencies
    return torch.cat((angle_hw2i.sin(), angle_hw2i.cos()), dim=-1).flatten(0, 1).flatten(1)


def stretch(table_QD: Tensor, grid: tuple[int, int]) -> Tensor:
    """A square table of positions over another grid, [h*w, D] in float32; itself where the grid is its own.

    Source: ``get_abs_pos`` in omnilmm/model/resampler.py; for a grid that is no square, its successor in
    MiniCPM-V-2, where OmniLMM's own would take the root of h*w and fail.
    """
    side = isqrt(len(table_QD))
    if grid == (side, side):
        return table_QD
    square_1Dss = table_QD.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    wide_1Dhw = F.interpolate(square_1Dss, size=grid, mode="bicubic", align_corners=False)
    return wide_1Dhw.flatten(2)[0].T


class QFormer(Connector):
    """BLIP-2's querying transformer (arXiv:2301.12597), queries only, and a projection.

    BERT's blocks, post-norm: the queries attend to one another, in every ``cross_every``-th block (the first
    among them) to the features, and pass their own feed-forward. What BLIP-2 and InstructBLIP keep for text
    (word embeddings, a second feed-forward) is not here, so InstructBLIP's instruction is not read.

    ==================  =======================================================
    system              options that differ from the defaults
    ==================  =======================================================
    BLIP-2              none
    MiniGPT-4           none: ``llama_proj`` is ``proj.0``
    TinyGPT-V           ``middle = 4096``: ``llama_proj``, ``llama_proj2`` are ``proj.0``, ``proj.1``
    TinyLLaVA           ``norm = false``, ``affine = false``, ``num_queries = 128``
    ==================  =======================================================

    Names of the weights are those of transformers' ``Blip2ForConditionalGeneration`` without ``qformer.`` and
    ``qformer.encoder.``; ``norm`` is its ``vision_model.post_layernorm``, the ``ln_vision`` of LAVIS, which
    features need that a tower gives before its last norm (epsilon 1e-5 as in LAVIS; transformers' is 1e-6).
    """

    name = "qformer"
    defaults: ClassVar[dict[str, Option]] = {
        "num_queries": 32,
        "depth": 12,
        "width": 768,
        "num_heads": 12,
        "cross_every": 2,
        "middle": 0,
        "norm": True,
        "affine": True,
        "dropout": 0.0,
    }
    may_be_zero: ClassVar[frozenset[str]] = frozenset({"middle"})

    def __init__(
        self,
        in_width: int,
        out_width: int,
        num_queries: int = 32,
        depth: int = 12,
        width: int = 768,
        num_heads: int = 12,
        cross_every: int = 2,
        middle: int = 0,
        norm: bool = True,
        affine: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(
                f"connector 'qformer' needs a width that its heads divide, got width {width} and num_heads "
                f"{num_heads}"
            )
        self.norm = nn.LayerNorm(in_width) if norm else nn.Identity()
        self.query_tokens = nn.Parameter(torch.empty(1, num_queries, width))
        self.layernorm = nn.LayerNorm(width, eps=BERT_EPS, elementwise_affine=affine)
        self.dropout = nn.Dropout(dropout)
        self.layer = nn.ModuleList(
            QFormerLayer(width, in_width if index % cross_every == 0 else None, num_heads, dropout)
            for index in range(depth)
        )
        sizes = (width, middle, out_width) if middle else (width, out_width)
        self.proj = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))
        # As BERT begins; the projections begin as any linear layer.
        nn.init.normal_(self.query_tokens, std=0.02)
        for part in self.layer.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)

    @classmethod
    def shrink(  # type: ignore[override]
        cls, grid: tuple[int, ...], num_queries: int = 32, **others: Option
    ) -> tuple[int, ...]:
        return (num_queries,)

    def forward(self, features: Features) -> Tensor:
        x_NSE = self.norm(features.values)
        q_NQW = self.dropout(self.layernorm(self.query_tokens)).expand(len(x_NSE), -1, -1)
        for layer in self.layer:
            q_NQW = layer(q_NQW, x_NSE)
        return self.proj(q_NQW)


class QFormerLayer(nn.Module):
    """Self attention, cross attention where there is one, feed-forward of the queries."""

    def __init__(self, width: int, seen_width: int | None, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = BertAttention(width, width, num_heads, dropout)
        self.crossattention: BertAttention | None = None
        if seen_width is not None:
            self.crossattention = BertAttention(width, seen_width, num_heads, dropout)
        self.intermediate_query = nn.Sequential(
            OrderedDict(dense=nn.Linear(width, 4 * width), activation=nn.GELU())
        )
        self.output_query = AddAndNorm(4 * width, width, dropout)

    def forward(self, q_NQW: Tensor, x_NSE: Tensor) -> Tensor:
        q_NQW = self.attention(q_NQW, q_NQW)
        if self.crossattention is not None:
            q_NQW = self.crossattention(q_NQW, x_NSE)
        return self.output_query(self.intermediate_query(q_NQW), q_NQW)


class BertAttention(nn.Module):
    """``x`` asks ``seen``; the answer is added to ``x`` and normalised."""

    def __init__(self, width: int, seen_width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = Heads(width, seen_width, num_heads, dropout)
        self.output = AddAndNorm(width, width, dropout)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        return self.output(self.attention(x, seen), x)


class Heads(nn.Module):
    """Query, key and value, each with a bias."""

    def __init__(self, width: int, seen_width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(seen_width, width)
        self.value = nn.Linear(seen_width, width)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return attend(self.query(x), self.key(seen), self.value(seen), self.num_heads, dropout)


class AddAndNorm(nn.Module):
    """A linear layer, what was before added, LayerNorm."""

    def __init__(self, in_width: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(in_width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=BERT_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + before)


def attend(q_NQW: Tensor, k_NSW: Tensor, v_NSW: Tensor, num_heads: int, dropout: float = 0.0) -> Tensor:
    """softmax(q k / sqrt(C)) v, head by head: [N, Q, W]."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q_NQW, k_NSW, v_NSW))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(2)
