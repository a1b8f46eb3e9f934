"""How much arithmetic a step needs, for the share of a device's peak that it reaches (MFU).

Counted is what the loss and its gradients ask for, whoever computes them and however: products forward once;
backward once for the input, where something before it trains, and once for the weight, where that trains. So
a frozen tower counts forward only, and a frozen language model behind a connector that trains counts twice.
A document counts to its last target, the head where a label is, and so does what follows attention in the
last block and that block's query: nothing else is read. Recomputation is not counted, nor padding, nor logits
that nobody needs, nor a tower where there is nothing for it, nor what is no product: norms and activations.

Causal attention counts the pairs that see each other, half a square. PaLM (arXiv:2204.02311, appendix B) and
torchtitan count the whole square, and know no towers; ``whole_squares`` gives theirs, to compare with. For
documents of 800 tokens and a language model of 3 billion weights the difference is 2 %.

Towers and connectors are run once for each size of tile and each length of window on tensors without numbers,
and what runs is counted: no family needs to be known. The decoder is counted from its weights and its config,
document by document, a speech head from its weights, answer by answer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tinymodal.compose.quantize import num_weights
from tinymodal.core.types import Batch
from tinymodal.model.media import Features
from tinymodal.train.groups import blocks
from tinymodal.train.packed import reach
from tinymodal.train.spread import FIELDS, tiles_of

if TYPE_CHECKING:
    from tinymodal.model.modeling_tinymodal import TinyModalForConditionalGeneration

PAST = {"k_proj", "v_proj", "key_proj", "value_proj", "key", "value"}
"""Layers whose outcome later positions read."""
FUSED = {"qkv_proj", "c_attn", "query_key_value", "Wqkv", "qkv"}
"""Query, key and value in one."""
FULL, SLIDING = "full_attention", "sliding_attention"


class _Block(NamedTuple):
    """A block of the decoder, in multiplications for one position, and what trains in it."""

    products: float
    trained: float
    """Of :attr:`products`, those by weights that train."""
    past: float
    """Of :attr:`products`, those that make keys and values."""
    past_trained: float
    width: int
    """Of all its heads together; 0: it does not attend."""
    window: int | None
    """How many keys a position sees; None: all up to its own."""
    trains: bool
    """Whether it or a block before it has weights that train, embeddings included."""


class StepFlops:
    """Counts the steps of a stage: ``StepFlops(model)(batches)``.

    Make it when adapters are in place and frozen is what is frozen, before the model is spread over
    processes. Nothing of the model is run or kept.
    """

    def __init__(
        self,
        model: TinyModalForConditionalGeneration,
        pruned: bool = True,
        whole_squares: bool = False,
        losses: Sequence[str] = ("text",),
    ) -> None:
        """Look at a model.

        Args:
            model: on any device, quantized or not.
            pruned: count what is needed; False: whole documents and the whole last block, as an engine
                computes that prunes nothing. The head counts where a label is in both.
            whole_squares: count causal attention as PaLM does.
            losses: of the stage: ``speech`` alone asks the language head for nothing.
        """
        self.pruned, self.whole_squares = pruned, whole_squares
        self._writes, self._speaks = tuple(losses) != ("speech",), "speech" in losses
        body: Any = model.model
        self._eyes = {
            kind: _hollow(nn.ModuleList([t, body.connectors[kind]])) for kind, t in body.towers.items()
        }
        self._senses_train = {
            kind
            for parts in (body.towers, body.connectors, body.marks)
            for kind, part in parts.items()
            if any(p.requires_grad for p in part.parameters())
        }
        self._mouth: Any = model.speech_head
        self._blocks, self._around, self._around_trained = _decoder(
            body.language_model, model.config.text_config
        )
        head = model.head_weight()
        self._head, self._head_trains = float(num_weights(head)), head.requires_grad
        self._tiles: dict[tuple[Any, ...], float] = {}

    def __call__(self, batches: Sequence[Batch]) -> float:
        """Floating point operations of forward and backward passes over ``batches``."""
        return sum(self._media(batch) + self._text(batch) + self._speech(batch) for batch in batches)

    def _media(self, batch: Batch) -> float:
        total = 0.0
        for kind, eye in self._eyes.items():
            seen = getattr(batch, FIELDS[kind][1]) is not None
            for same in tiles_of(batch, kind):
                key = (kind, seen, *same.shape[1:])
                if key not in self._tiles:
                    self._tiles[key] = _look(eye, same.shape[1:], seen)
                total += len(same) * self._tiles[key]
        return total

    def _speech(self, batch: Batch) -> float:
        """Blocks of the speech head at tokens and frames, its reader at tokens, its last matrix at frames."""
        head = self._mouth
        if head is None or not self._speaks or batch.speech_codes is None:
            return 0.0
        trains = any(p.requires_grad for p in head.parameters())
        blocks_, reader, last = (_matrices(part) for part in (head.blocks, head.tokens, head.predict))
        total = 0.0
        for num, frames in zip(batch.speech_tokens, batch.speech_frames, strict=True):
            # Every token's places at once, or tokens and columns in turn; either way a voice before them.
            upsample = getattr(head, "upsample", None)
            written = num * upsample if upsample else frames + max(head.books - 1, 1)
            places = 1 + (written if upsample else num + written)
            total += 2 * (blocks_ * places + reader * num + last * written)
            total += 4 * _pairs(places, None, self.whole_squares) * head.width * len(head.blocks)
        return total * (3 if trains else 1)

    def _text(self, batch: Batch) -> float:
        before = any(tiles_of(batch, kind) for kind in self._senses_train & set(FIELDS))
        num_targets = len(batch.target_ids)
        total, squares = 0.0, self.whole_squares
        documents = self._documents(batch)
        positions = sum(far for far, _ in documents)
        last = len(self._blocks) - 1
        for n, block in enumerate(self._blocks):
            back = before or block.trains
            forward, trained, pairs = block.products * positions, block.trained * positions, 0.0
            if n == last and self.pruned:
                rest, rest_trained = block.products - block.past, block.trained - block.past_trained
                forward = block.past * positions + rest * num_targets
                trained = block.past_trained * positions + rest_trained * num_targets
                # Targets are taken to be the last positions: mostly they are, and it is one block of many.
                pairs = sum(c * far - (0 if squares else c * (c - 1) / 2) for far, c in documents)
            else:
                pairs = sum(_pairs(far, block.window, squares) for far, _ in documents)
            total += 2 * (forward * (1 + back) + trained)
            total += 4 * pairs * block.width * (1 + 2 * back)
        below = before or (bool(self._blocks) and self._blocks[-1].trains)
        total += 2 * positions * (self._around * (1 + below) + self._around_trained)
        head = self._head if self._writes else 0.0
        return total + 2 * head * num_targets * (1 + below + self._head_trains)

    def _documents(self, batch: Batch) -> list[tuple[int, int]]:
        """For each document its positions that count, and its targets."""
        if not self.pruned:
            return [(length, 0) for length in batch.lengths or [batch.num_tokens]]
        known = batch.reach or (
            reach(batch) if batch.lengths and batch.input_ids.device.type == "cpu" else ()
        )
        return [each for each in known if each[0]] or [(batch.num_tokens, batch.num_targets)]


def step_flops(model: TinyModalForConditionalGeneration, batches: Sequence[Batch]) -> float:
    """Floating point operations that a step on ``batches`` needs. For many steps make a ``StepFlops``."""
    return StepFlops(model)(batches)


def _matrices(part: nn.Module) -> float:
    """Multiplications for one position."""
    return float(sum(num_weights(p) for p in part.parameters() if p.ndim >= 2))


def _pairs(length: int, window: int | None, whole: bool) -> float:
    """How many pairs of positions see each other."""
    if whole:
        return float(length**2)
    beyond = max(length - window, 0) if window else 0
    return length * (length + 1) / 2 - beyond * (beyond + 1) / 2


# The decoder


def _decoder(language_model: nn.Module, config: Any) -> tuple[list[_Block], float, float]:
    """Its blocks, and the products around them: all, and those by weights that train."""
    parts = blocks(language_model)
    inside = {id(p) for part in parts for p in part.parameters()}
    trains = any(p.requires_grad for p in language_model.parameters() if id(p) not in inside)
    found = []
    for n, part in enumerate(parts):
        products = trained = past = past_trained = 0.0
        for name, count, trained_too in _products(part, config):
            share = _past_share(name, part, config, n)
            products += count
            past += share * count
            if trained_too:
                trained += count
                past_trained += share * count
        trains = trains or any(p.requires_grad for p in part.parameters())
        width, window = _attention(config, n)
        found.append(_Block(products, trained, past, past_trained, width, window, trains))
    around = [
        (count, trained)
        for name, count, trained in _products(language_model, config, skip=inside)
        if "embed" not in name.lower()
    ]
    return found, sum(c for c, _ in around), sum(c for c, trained in around if trained)


def _products(
    part: nn.Module, config: Any, skip: frozenset[int] | set[int] = frozenset()
) -> Iterator[tuple[str, float, bool]]:
    """Every matrix: name, multiplications for one position, whether it trains."""
    experts = _first(config, "num_local_experts", "num_experts", "n_routed_experts")
    chosen = _first(config, "num_experts_per_tok", "num_experts_per_token", "moe_top_k")
    for path, module in part.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for name, p in module.named_parameters(recurse=False):
            if p.ndim < 2 or id(p) in skip:
                continue
            count = float(num_weights(p))
            if p.ndim == 3 and experts and chosen and p.shape[0] == experts:
                count *= chosen / experts
            yield f"{path}.{name}", count, p.requires_grad


def _past_share(name: str, block: nn.Module, config: Any, n: int) -> float:
    """How much of a matrix makes keys and values."""
    words = name.split(".")
    if PAST & set(words):
        return 1.0
    fused = next((word for word in words if word in FUSED), None)
    if fused is None or "lora_A" in words:
        return 0.0
    path = ".".join(words[: words.index(fused) + 1])
    layer: Any = block.get_submodule(path)
    out = _first(layer, "out_features", "nf")
    return 1 - _attention(config, n)[0] / out if out else 0.0


def _attention(config: Any, n: int) -> tuple[int, int | None]:
    """Width of all heads of block ``n`` together (0: it does not attend), and its window."""
    kinds = getattr(config, "layer_types", None)
    kind = kinds[n] if kinds and n < len(kinds) else None
    if kind not in (None, FULL, SLIDING):
        return 0, None
    heads = _first(config, "num_query_heads", "num_attention_heads")
    heads = heads[n] if isinstance(heads, Sequence) else heads
    each = _first(config, "head_dim") or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)
    if kind == FULL or getattr(config, "use_sliding_window", None) is False:
        window = None
    return heads * each, window


def _first(holder: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(holder, name, None))), None)


# Towers and connectors


def _hollow(module: nn.ModuleList) -> nn.ModuleList:
    """A copy whose tensors have shapes and no numbers; trains what the original trains."""
    memo: dict[int, Any] = {}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), p.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
    made = copy.deepcopy(module, memo).eval()
    for part in made.modules():
        # A faster forward does the same, and may not know tensors without numbers; what is computed again
        # counts once.
        part.__dict__.pop("forward", None)
        if getattr(part, "gradient_checkpointing", False):
            part.gradient_checkpointing = False  # type: ignore[assignment]
    return made


def _look(eye: nn.ModuleList, shape: Sequence[int], seen: bool) -> float:
    """Operations for one tile of ``shape``, or for its features where the tower has ``seen`` it."""
    tower, connector = eye
    dtype = next((p.dtype for p in connector.parameters()), torch.float32)
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        values = torch.empty(1, *shape, device="meta", dtype=dtype)
        features = Features(values.flatten(1, -2), tuple(shape[:-1])) if seen else tower(values)
        out: Tensor = connector(features)
        if out.requires_grad:
            out.sum().backward()
    eye.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


# Devices

PEAKS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250, 75),
    ("H200", 989.4, 67),
    ("H100 PCIe", 756, 51),
    ("H100 NVL", 835, 60),
    ("H100", 989.4, 67),
    ("H800", 989.4, 67),
    ("GH200", 989.4, 67),
    ("A100", 312, 19.5),
    ("A800", 312, 19.5),
    ("L40S", 362, 91.6),
    ("L40", 181, 90.5),
    ("L4", 121, 30.3),
    ("A40", 149.7, 37.4),
    ("A10G", 70, 35),
    ("A10", 125, 31.2),
    ("RTX 6000 Ada", 364.2, 91.1),
    ("RTX A6000", 154.8, 38.7),
    ("RTX 5090", 209.5, 104.8),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 4080", 97.5, 48.7),
    ("RTX 3090", 71, 35.6),
    ("V100", 125, 15.7),
    ("T4", 65, 8.1),
    ("MI300X", 1307.4, 163.4),
)
"""Part of a card's name, and 10^12 operations a second in 16 bits (summed in float32, no sparsity) and in
float32 (no TF32), as its maker's data sheet has them. The first that fits holds."""
ONLY_FLOAT16 = ("V100", "T4")
"""They have no bfloat16."""


def peak_flops(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """Operations a second that a device's maker promises for products in ``dtype``; None: nobody knows."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return peak_of(torch.cuda.get_device_name(device), dtype)


def peak_of(name: str, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """As :func:`peak_flops`, of a card by its name."""
    words = name.replace("-", " ").split()
    for card, narrow, wide in PEAKS:
        parts = card.split()
        if any(words[i : i + len(parts)] == parts for i in range(len(words))):
            if dtype == torch.float32:
                return wide * 1e12
            if dtype == torch.float16 or (dtype == torch.bfloat16 and card not in ONLY_FLOAT16):
                return narrow * 1e12
            return None
    return None
