"""Attention one document at a time, and nothing computed that no target depends on.

A packed row is not one long row with a mask but documents end to end. Here each attends to itself alone: on
the CPU one causal call per document, on a GPU one call of a varlen kernel for all of them. No mask of [T, T]
is made. What no target can depend on is not computed: padding, documents in which nothing trains, what
stands behind a document's last target; and in the last block everything after keys and values, and the last
norm, is computed at the targets only.

The language models are transformers' own, unchanged. Where documents end travels to their attention as the
keyword ``documents``, which they hand on, to the attention that is registered here under ``NAME``; a call
without that keyword is ordinary attention. Whether a family really computes the same is not read from a list
but tried on the model at hand, see :func:`packing`.

Measured in CPU seconds of a step, medians, widths a seventh of real ones (``benchmarks/shapes.py``), while
other work ran: a mask of whole rows costs 1.33 times (Qwen2.5-0.5B, mixed lengths) and 1.26 times (Phi-2,
captions). Pruning the last of 24 or 32 blocks saves its 3 %, less than what time can tell.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property, partial
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinymodal.compose.quantize import is_quantized
from tinymodal.core.types import Batch
from tinymodal.train.groups import blocks

# Shapes: B rows, T positions, M positions that are computed, end to end, N targets, L positions of one
# document, n its targets, D width, A heads, G heads of keys, H width of a head.

NAME = "tinymodal_packed"
"""Of our attention among transformers' implementations."""
AGREES, AGREES_ROUNDED = 1e-4, 3e-2
"""Largest difference of last states and of gradients, relative to the largest; the second where products are
rounded to 16 bits or fewer. Documents that see each other differ by 0.05 or more in every family tried."""
KINDS = {"full_attention", "sliding_attention"}
"""Of layers, as configs name them, that are exact here."""


class Told(NamedTuple):
    """What a block says to its attention."""

    dropout: float
    scaling: float | None
    window: int | None
    """Keys that are seen, the query's own position among them; None: all."""
    softcap: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """Where documents lie in one row [1, M], and at which positions the last block is needed."""

    lengths: tuple[int, ...]
    """Positions of each, in sum M."""
    rows: Tensor | None = None
    """int64 [N], ascending: the targets' places among the M. None: the last block is not pruned."""
    counts: tuple[int, ...] = ()
    """Targets of each document, in sum N; empty where only the device knows."""
    known: tuple[Tensor, Tensor] | None = None
    """Keys and values [1, G, M, H] of a block whose queries are the N targets alone."""
    varlen: bool = False
    """Whether a kernel may take them all at once, where there is one."""
    only_keys: bool = False
    """Ask a block for its keys and values and end it there."""
    noted: list[tuple[nn.Module, Told]] | None = None
    """Where given: filled with each module that attends, and how."""
    _sent: dict[torch.device, Tensor] = dataclasses.field(default_factory=dict)

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """For each document which keys its targets see, bool [n, L]; None where there is no target."""
        assert self.rows is not None
        found: list[Tensor | None] = []
        start = 0
        for rows_n, length in zip(self.rows.split(self.counts), self.lengths, strict=True):
            keys_L = torch.arange(length, device=rows_n.device)
            found.append(keys_L <= (rows_n - start)[:, None] if len(rows_n) else None)
            start += length
        return found

    def ends_on(self, device: torch.device) -> Tensor:
        """int32 [documents + 1]: 0 and where each ends, as varlen kernels want it; sent once a batch."""
        if device not in self._sent:
            ends = torch.tensor((0, *self.lengths)).cumsum(0).to(torch.int32)
            self._sent[device] = ends.to(device, non_blocking=True)
        return self._sent[device]


_current: ContextVar[Documents | None] = ContextVar("documents", default=None)
"""For attention whose block does not hand the keyword on, as stablelm's."""


class Found(Exception):
    """Keys and values, thrown out of a block that need not run any further."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values


# What is computed at all


def reach(batch: Batch) -> tuple[tuple[int, int], ...]:
    """For each document its positions up to the last target, and how many targets it has; both may be 0.

    For batches on the CPU: elsewhere it would wait for the device.
    """
    lengths_D = torch.tensor(batch.lengths)
    ends_D = lengths_D.cumsum(0)
    document_N = torch.searchsorted(ends_D, batch.target_index, right=True)
    counts_D = torch.bincount(document_N, minlength=len(ends_D))
    last_D = torch.zeros_like(ends_D).scatter_reduce_(0, document_N, batch.target_index + 1, "amax")
    far_D = (last_D - ends_D + lengths_D).clamp(min=0)
    return tuple(zip(far_D.tolist(), counts_D.tolist(), strict=True))


def needed(batch: Batch, prune: bool = True) -> tuple[Documents, Tensor | None]:
    """The documents of what must be computed, and which of the B*T positions that is.

    Args:
        batch: with ``lengths``.
        prune: whether the last block is to be computed at targets only.

    Returns:
        Documents, and int64 [M] on the batch's device; None if it is all of them.
    """
    device = batch.input_ids.device
    known = batch.reach or (reach(batch) if device.type == "cpu" else ())
    if not known:
        return Documents(batch.lengths, batch.target_index if prune else None), None
    if not any(far for far, _ in known):
        # Nothing trains; one position stands for all, so that the model runs and gives no targets.
        return Documents((1,)), torch.zeros(1, dtype=torch.int64, device=device)
    kept = tuple(far for far, _ in known if far)
    counts = tuple(count for far, count in known if far)
    if kept == batch.lengths:
        return Documents(kept, batch.target_index if prune else None, counts), None
    spans, start = [], 0
    for length, (far, _) in zip(batch.lengths, known, strict=True):
        spans.append(torch.arange(start, start + far))
        start += length
    take_M = torch.cat(spans).to(device, non_blocking=True)
    return Documents(kept, places(take_M, batch.target_index, start) if prune else None, counts), take_M


def places(take_M: Tensor, index_N: Tensor, num: int) -> Tensor:
    """Where positions ``index_N`` of ``num`` lie among ``take_M``, int64 [N]."""
    place = torch.zeros(num, dtype=torch.int64, device=take_M.device)
    place[take_M] = torch.arange(len(take_M), device=take_M.device)
    return place[index_N]


# Attention


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    documents: Documents | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; with ``documents``, each by itself.

    Args:
        module: the family's attention.
        query: [1, A, M, H]; [1, A, N, H] in a pruned block.
        key: [1, G, M, H], G a divisor of A; not read in a pruned block.
        value: as ``key``.
        attention_mask: not read where ``documents`` are given.
        dropout: of weights.
        scaling: of products; None: ``H ** -0.5``.
        sliding_window: how many keys are seen, the query's own position among them; None: all.
        softcap: products are pressed between minus and plus this.
        documents: None: what the mask says, as ``sdpa`` would do it.
        **others: what else a family hands on.

    Returns:
        [1, M, A, H], or N for M.
    """
    documents = documents or current()
    if documents is None:
        if softcap is not None:
            return _capped(query, key, value, attention_mask, dropout, scaling, softcap).transpose(1, 2), None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return out
    if documents.noted is not None:
        documents.noted.append((module, Told(dropout, scaling, sliding_window, softcap)))
    if documents.only_keys:
        raise Found(key, value)
    if documents.known is not None:
        key, value = documents.known
    told = Told(dropout, scaling, sliding_window, softcap)
    varlen = documents.varlen and _fits_varlen(query, told)
    call = partial(_by_varlen if varlen else _one_by_one, told)
    if documents.known is None or (documents.counts and not varlen):
        return call(query, key, value, documents), None
    # Targets lie anywhere in their documents: at their places, among queries that nobody reads.
    assert documents.rows is not None
    whole = query.new_zeros(1, query.shape[1], key.shape[2], query.shape[3])
    whole = whole.index_copy(2, documents.rows, query)
    out_1MAH = call(whole, key, value, dataclasses.replace(documents, known=None))
    return out_1MAH.index_select(1, documents.rows), None


def _one_by_one(told: Told, query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    lengths = documents.lengths
    # split, not slices: the gradient of each slice would be a whole tensor of zeros.
    keys, values = key.split(lengths, 2), value.split(lengths, 2)
    masks: Sequence[Tensor | None] = [None] * len(lengths)
    counts = lengths
    if documents.known is not None:
        masks, counts = documents.masks, documents.counts
    parts = zip(query.split(counts, 2), keys, values, masks, strict=True)
    outs = [_one(told, q, k, v, mask).transpose(1, 2) for q, k, v, mask in parts if q.shape[2]]
    if not outs:
        # No target. Keys and values stay in the graph, so that what made them has a gradient of zero and
        # not none: other processes have targets, and sharded gradients are added up by block.
        return query.transpose(1, 2) + 0 * (key.sum() + value.sum())
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def _one(told: Told, q_1ALH: Tensor, k_1GLH: Tensor, v_1GLH: Tensor, mask: Tensor | None) -> Tensor:
    """One document. ``mask``: [n, L] where the queries are not all of its positions, else None."""
    length = k_1GLH.shape[2]
    if told.window is not None and told.window < length:
        if mask is None:
            places_L = torch.arange(length, device=k_1GLH.device)
            mask = places_L <= places_L[:, None]
        last_n1 = mask.sum(1, keepdim=True)  # keys up to the query's own
        mask = mask & (torch.arange(length, device=mask.device) >= last_n1 - told.window)
    if told.softcap is not None:
        return _capped(q_1ALH, k_1GLH, v_1GLH, mask, told.dropout, told.scaling, told.softcap)
    return F.scaled_dot_product_attention(
        q_1ALH,
        k_1GLH,
        v_1GLH,
        attn_mask=mask,
        dropout_p=told.dropout,
        is_causal=mask is None and length > 1,
        scale=told.scaling,
        # As fast as keys repeated, on the CPU too, and nothing is repeated.
        enable_gqa=q_1ALH.shape[1] != k_1GLH.shape[1],
    )


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> Tensor:
    """Attention whose products are soft-capped, which ``sdpa`` cannot; mask bool or to be added."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    products = torch.tanh(query @ key.transpose(2, 3) * (scale / softcap)) * softcap
    if mask is None:
        places = torch.arange(key.shape[2], device=key.device)
        mask = places <= places[key.shape[2] - query.shape[2] :, None]
    if mask.dtype == torch.bool:
        products = products.masked_fill(~mask, torch.finfo(products.dtype).min)
    else:
        products = products + mask
    weights = products.softmax(-1, dtype=torch.float32).to(value.dtype)
    return F.dropout(weights, dropout) @ value


def _fits_varlen(query: Tensor, told: Told) -> bool:
    """Whether ``torch.nn.attention.varlen`` can: it is for 16 bits."""
    narrow = torch.is_autocast_enabled("cuda") or query.dtype in (torch.float16, torch.bfloat16)
    plain = not told.dropout and told.softcap is None and query.shape[-1] <= 256
    return query.device.type == "cuda" and narrow and plain


def _by_varlen(told: Told, query: Tensor, key: Tensor, value: Tensor, documents: Documents) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    dtype = value.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    q_MAH, k_MGH, v_MGH = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    ends, longest = documents.ends_on(query.device), max(documents.lengths)
    out_MAH: Any = varlen_attn(
        q_MAH,
        k_MGH,
        v_MGH,
        ends,
        ends,
        longest,
        longest,
        scale=told.scaling,
        window_size=(-1 if told.window is None else told.window - 1, 0),
        enable_gqa=q_MAH.shape[1] != k_MGH.shape[1],
    )
    return out_MAH[None]


# Blocks


def _telling(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The forward of a block that does not hand ``documents`` on."""
    documents: Documents | None = kwargs.get("documents")
    if documents is None:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return _checkpointed(self, partial(_tell, self, documents, args, kwargs), hidden_states)


def current() -> Documents | None:
    """The documents of the block that is running, where it does not hand them on."""
    return _current.get()


def _tell(
    block: Any, documents: Documents, args: tuple[Any, ...], kwargs: dict[str, Any], x_1MD: Tensor
) -> Any:
    before = _current.set(documents)
    try:
        return type(block).forward(block, x_1MD, *args, **{**kwargs, "documents": documents})
    finally:
        _current.reset(before)


def _pruned(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The forward of a last block: keys and values of all positions, everything else at the targets."""
    documents: Documents | None = kwargs.get("documents")
    if documents is None or documents.rows is None:
        return _telling(self, hidden_states, *args, **kwargs)
    return _checkpointed(self, partial(_keys_then_rest, self, documents, args, kwargs), hidden_states)


def _checkpointed(block: Any, run: Any, x_1MD: Tensor) -> Any:
    """``run(x_1MD)``, as the block is told to: computed again in the backward pass, or kept."""
    if not (getattr(block, "gradient_checkpointing", False) and block.training):
        return run(x_1MD)

    def quiet(x: Tensor) -> Any:
        # Not once more inside: the block's own forward would.
        was = block.__dict__.pop("gradient_checkpointing", None)
        block.gradient_checkpointing = False
        try:
            return run(x)
        finally:
            del block.gradient_checkpointing
            if was is not None:
                block.gradient_checkpointing = was

    return block._gradient_checkpointing_func(quiet, x_1MD)


def _keys_then_rest(
    block: Any, documents: Documents, args: tuple[Any, ...], kwargs: dict[str, Any], x_1MD: Tensor
) -> Any:
    rows = documents.rows
    assert rows is not None
    try:
        with _without_queries(block):
            _tell(block, dataclasses.replace(documents, only_keys=True), args, kwargs, x_1MD)
    except Found as found:
        known = found.keys, found.values
    at_rows = {name: _at(rows, name, value, x_1MD.shape[1]) for name, value in kwargs.items()}
    return _tell(
        block, dataclasses.replace(documents, known=known), args, at_rows, x_1MD.index_select(1, rows)
    )


def _at(rows: Tensor, name: str, value: Any, length: int) -> Any:
    """What the block is told of its positions, for some of them."""
    if name == "position_embeddings":
        return tuple(part.index_select(1, rows) for part in value)
    if name == "position_ids" and isinstance(value, Tensor) and value.shape[-1] == length:
        return value.index_select(-1, rows)
    return value


@contextmanager
def _without_queries(block: nn.Module) -> Iterator[None]:
    """Inside, a separate matrix of queries is not multiplied by; who asks for keys reads no query."""
    changed = []
    for part in block.modules():
        layer = part._modules.get("q_proj")
        if layer is not None and hasattr(layer, "out_features"):
            changed.append((layer, layer.__dict__.get("forward")))
            layer.forward = MethodType(_no_queries, layer)
    try:
        yield
    finally:
        for layer, was in changed:
            if was is None:
                del layer.forward
            else:
                layer.forward = was


def _no_queries(self: Any, x: Tensor) -> Tensor:
    return x.new_zeros(()).expand(*x.shape[:-1], self.out_features)


# Switching it on


@dataclasses.dataclass
class Packing:
    """What is switched on for a language model, and why not more."""

    language_model: Any
    by_document: bool
    pruned: bool
    why: str
    """What keeps it from the whole; empty if nothing."""
    was: str = "sdpa"
    noted: list[tuple[nn.Module, Told]] = dataclasses.field(default_factory=list)
    """The modules that attend, first to last."""
    trial: Trial | None = None
    varlen: bool = False
    """Whether a kernel for all documents at once was found and agrees."""

    def needed(self, batch: Batch) -> tuple[Documents, Tensor | None]:
        """As :func:`needed`, with what is switched on."""
        documents, take_M = needed(batch, self.pruned)
        return dataclasses.replace(documents, varlen=self.varlen), take_M

    def undo(self) -> None:
        """As it was before. May be called twice."""
        if self.by_document:
            self.language_model.config._attn_implementation = self.was
        for block in blocks(self.language_model):
            block.__dict__.pop("forward", None)
        self.by_document = self.pruned = False


def packing(language_model: Any) -> Packing:
    """Switch on for ``language_model`` what gives the states it gives without; :meth:`Packing.undo` ends it.

    Two documents of a few words are run through the whole model both ways, without dropout and without moving
    any random state. What differs by more than rounding stays off.
    """
    was = str(language_model.config._attn_implementation)
    off = Packing(language_model, False, False, _refusal(language_model), was)
    if off.why:
        return off
    _register()
    with _quietly(language_model):
        trial = _trial(language_model)
        on = Packing(language_model, True, False, "", was, trial=trial)
        language_model.config._attn_implementation = NAME
        for relay in (False, True):
            if relay:
                for block in blocks(language_model):
                    block.forward = MethodType(_telling, block)  # type: ignore[assignment]
            on.noted = []
            why = _compare(
                language_model, trial, dataclasses.replace(trial.documents, rows=None, noted=on.noted)
            )
            if not why:
                break
        # Each block attends once forward; the trial's backward pass runs nothing again.
        why = why or _windows(language_model, [told.window for _, told in on.noted])
        if why:
            on.undo()
            return dataclasses.replace(off, why=why)
        last = blocks(language_model)[-1]
        before = last.__dict__.get("forward")
        last.forward = MethodType(_pruned, last)  # type: ignore[assignment]
        on.why = _compare(language_model, trial, trial.documents)
        if on.why:
            del last.forward
            if before is not None:
                last.forward = before
            on.why = f"the last block is computed whole: {on.why}"
        on.pruned = not on.why
        on.varlen = _varlen_agrees(language_model, trial)
    return on


def agrees(packing: Packing) -> bool:
    """Whether the model, as it is now, still gives the states and the gradient of the trial."""
    trial, model = packing.trial, packing.language_model
    assert trial is not None
    with _quietly(model):
        if _compare(model, trial, dataclasses.replace(trial.documents, rows=None)):
            return False
        return not packing.pruned or not _compare(model, trial, trial.documents)


def run(language_model: Any, x_1MD: Tensor, position_ids: Tensor, documents: Documents) -> Tensor:
    """Last states of documents, with :func:`packing` on: [1, M, D], or [1, N, D] where the end is pruned."""
    # A mask of four dimensions is taken by transformers as one that is made already: no other is made.
    made = x_1MD.new_empty(1, 1, 1, 0)
    out: Tensor = language_model(
        inputs_embeds=x_1MD,
        position_ids=position_ids,
        attention_mask=made,
        use_cache=False,
        documents=documents,
    ).last_hidden_state
    return out


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _refusal(language_model: Any) -> str:
    """What in class and config forbids it; empty if nothing."""
    config = language_model.config
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention is {config._attn_implementation}"
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        return "its attention is not causal"
    odd = set(getattr(config, "layer_types", None) or ()) - KINDS
    if odd:
        return f"it has layers of {', '.join(sorted(odd))}"
    if len(blocks(language_model)) < 1:
        return "it has no blocks"
    return ""


def _varlen_agrees(language_model: Any, trial: Trial) -> bool:
    """Whether the kernel for all documents at once is there, and gives what one after the other gives."""
    if trial.x_1MD.device.type != "cuda":
        return False
    found = []
    try:
        for varlen in (False, True):
            documents = dataclasses.replace(trial.documents, rows=None, varlen=varlen)
            with torch.enable_grad(), torch.autocast("cuda", torch.bfloat16):
                states = run(language_model, trial.x_1MD, trial.position_ids, documents)
            found.append((states.detach().float(), _slope(states, trial.x_1MD).float()))
    except Exception:  # of any kind: another torch, another GPU, a size that it does not take
        return False
    return all(
        bool((one - two).abs().max() <= AGREES_ROUNDED * one.abs().max())
        for one, two in zip(*found, strict=True)
    )


def _windows(language_model: Any, found: list[int | None]) -> str:
    """Whether each block told its sliding window: the trial is too short to see one."""
    config = language_model.config
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", None) is False:
        window = None
    kinds = getattr(config, "layer_types", None)
    num = len(blocks(language_model))
    if kinds:
        expected = [window if kind == "sliding_attention" else None for kind in kinds]
    else:
        expected = [window] * num
    if len(found) != num:
        return f"{len(found)} of its {num} blocks attend through transformers' interface"
    return "" if found == expected else "a block does not say how far it sees"


@contextmanager
def _quietly(model: nn.Module) -> Iterator[None]:
    """Without dropout; every module's mode is as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """Two documents, and what the family's own way makes of them."""

    x_1MD: Tensor
    position_ids: Tensor
    documents: Documents
    states_1MD: Tensor
    slope_1MD: Tensor
    """Gradient of the targets' states, added up with weights, in ``x_1MD``."""


def _trial(language_model: Any) -> Trial:
    """Documents of 5 and 4 words, with targets in the middle and at the end."""
    words = language_model.get_input_embeddings()
    device = next(language_model.parameters()).device
    ids = torch.arange(9, device=device) * 7919 % words.num_embeddings
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]], device=device)
    documents = Documents((5, 4), torch.tensor([1, 3, 4, 7], device=device), (3, 1))
    x_1MD = words(ids[None]).detach().requires_grad_()
    with torch.enable_grad():
        states = language_model(
            inputs_embeds=x_1MD, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        assert documents.rows is not None
        slope = _slope(states.index_select(1, documents.rows), x_1MD)
    return Trial(x_1MD, position_ids, documents, states.detach(), slope)


def _slope(states_1ND: Tensor, x_1MD: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, states_1ND.numel(), device=states_1ND.device).view_as(states_1ND)
    return torch.autograd.grad((states_1ND.float() * weights).sum(), x_1MD)[0]


def _compare(language_model: Any, trial: Trial, documents: Documents) -> str:
    """How documents come out otherwise than in the trial; empty if they do not."""
    family, rows = type(language_model).__name__, trial.documents.rows
    assert rows is not None
    expected = trial.states_1MD if documents.rows is None else trial.states_1MD.index_select(1, rows)
    try:
        with torch.enable_grad():
            found = run(language_model, trial.x_1MD, trial.position_ids, documents)
            if found.shape != expected.shape:
                return f"{family} does not hand documents on"
            at_rows = found if documents.rows is not None else found.index_select(1, rows)
            slope = _slope(at_rows, trial.x_1MD)
    except Exception as error:  # of any kind, from model code
        first = str(error).strip().splitlines() or [""]
        return f"{family} does not hand documents on ({type(error).__name__}: {first[0]})"
    if found.is_meta:
        return ""  # without numbers the shapes are all that can agree
    rounds = trial.x_1MD.dtype != torch.float32 or any(map(is_quantized, language_model.modules()))
    for name, ours, theirs in (("states", found.detach(), expected), ("gradients", slope, trial.slope_1MD)):
        apart = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
        if not apart <= (AGREES_ROUNDED if rounds else AGREES):
            return f"{name} of {family} differ by {apart:.0e} of the largest"
    return ""
