"""Replies that are decoded together: begun, continued by a token at a time, joined by others, left.

A group reads the prompts of its rows in one pass. What a store knows of a prompt's beginning is not read
again, and of pictures and sounds not what was perceived before; the rest goes through its tower together,
whichever row it belongs to. Rows end at the right edge and are numbered from their own first token, so what a
row says does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinymodal.core.types import Encoded, MediaItem
from tinymodal.data.collate import gather
from tinymodal.infer import caches
from tinymodal.infer.answer import Answer
from tinymodal.infer.kept import BLOCK, Kept, Names, digest_of

# Shapes: B rows, T positions of the longest prompt, N of the longest part that is read now, D width,
# V vocabulary, K embeddings of one medium, F numbers that all layers keep of one token.


WASTE = 128
"""Positions of padding that are worth a pass of their own: a small model reads as many in that time."""


class Step(NamedTuple):
    """The next token of every row of a group; of a row that is alone it may be several in turn."""

    answers: list[Answer]
    tokens_B: Tensor
    """int64"""
    states_BD: Tensor
    """The last states that predicted them."""


class Language:
    """A composed model as decoding needs it, and how its caches can be treated.

    Args:
        model: composed; in eval mode while it decodes.
        places: id of the placeholder of each kind of media it knows.
        stop_ids: tokens that end a reply.
        pad_id: any token but a placeholder.
    """

    def __init__(self, model: Any, places: Mapping[str, int], stop_ids: frozenset[int], pad_id: int) -> None:
        self.model, self.places, self.stop_ids, self.pad_id = model, dict(places), stop_ids, pad_id
        self.config = model.model.language_model.config
        self.kind = caches.kind_of(self.config)
        self.shapes: list[tuple[int, int, int]] | None = None
        """Of the layers' caches, once one was filled."""
        self.num_perceived = 0
        """Pictures and sounds that went through a tower."""
        self.num_read = 0
        """Tokens of prompts that went through the language model."""

    @property
    def joins(self) -> bool:
        """Whether rows may join a group that has begun, and beginnings of prompts be kept."""
        return self.kind.joins

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def perceive(self, media: Sequence[MediaItem], kept: Kept | None) -> list[Tensor]:
        """The embeddings of each medium in the order of its placeholders, [K, D] each."""
        known: dict[bytes, Tensor] = {}
        new: dict[str, dict[bytes, MediaItem]] = {}
        names = [digest_of(item) if kept is not None else b"%d" % n for n, item in enumerate(media)]
        for name, item in zip(names, media, strict=True):
            found = kept.embeddings(item) if kept is not None else None
            if found is None:
                new.setdefault(item.kind, {})[name] = item
            else:
                known[name] = found
        for kind, items in new.items():
            self.num_perceived += len(items)
            tiles, take_K = gather([(item, "") for item in items.values()])
            values = tuple(x.to(self.device, self.model.dtype) for x in tiles)
            core = self.model.model
            bank_RD = core.bank(kind, core.perceive(kind, values))
            each = bank_RD.index_select(0, take_K.to(self.device))
            for name, seen_KD in zip(items, each.split([i.tokens for i in items.values()]), strict=True):
                known[name] = seen_KD
                if kept is not None:
                    # A copy: a piece of the batch's would keep all of it alive.
                    kept.keep_embeddings(items[name], seen_KD.clone())
        return [known[name] for name in names]

    def placed(self, row: Encoded, before: int) -> list[Placed]:
        """The media of a row that have places from its position ``before`` on."""
        found = []
        for kind, place in self.places.items():
            at = (row.ids == place).nonzero()[:, 0]
            for item in (item for item in row.media if item.kind == kind):
                own, at = at[: item.tokens], at[item.tokens :]
                if len(own := own[own >= before]):
                    found.append(Placed(item, own))
        return found

    def embed(
        self,
        rows: Sequence[Encoded],
        before: Sequence[int],
        media: Sequence[Sequence[Placed]],
        seen: Mapping[int, Tensor],
    ) -> Tensor:
        """Rows from their position ``before`` on, padded on the left, media in place: [B, N, D].

        Args:
            rows: prompts.
            before: positions of each that are known.
            media: of each row.
            seen: embeddings of the media, by the identity of their items.
        """
        longest = max(len(row) - b for row, b in zip(rows, before, strict=True))
        ids_BN = torch.full((len(rows), longest), self.pad_id)
        embeddings, puts = [], []
        for i, (row, b) in enumerate(zip(rows, before, strict=True)):
            shift = longest - len(row)
            ids_BN[i, shift + b :] = row.ids[b:]
            for item, at in media[i]:
                # Of a medium that a kept block ends in, the last embeddings only.
                embeddings.append(seen[id(item)][item.tokens - len(at) :])
                puts.append(i * longest + shift + at)
        x_BND: Tensor = self.model.get_input_embeddings()(ids_BN.to(self.device))
        if puts:
            m_KD, put_K = torch.cat(embeddings).to(x_BND.dtype), torch.cat(puts).to(x_BND.device)
            x_BND = x_BND.flatten(0, 1).index_copy(0, put_K, m_KD).view_as(x_BND)
        return x_BND


class Placed(NamedTuple):
    """A medium and its places in a row."""

    item: MediaItem
    at: Tensor
    """int64 [K]; where the first of its places are known already, the others."""


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Which rows are read together: those of similar length, where padding would cost more than a pass."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    longest = lengths[order[-1]]
    # Cut behind the n shortest, their padding is up to the longest of them.
    saved = [n * (longest - lengths[order[n - 1]]) for n in range(1, len(order))]
    if not saved or max(saved) < max(WASTE, longest * len(order) // 4):
        return [sorted(order)]
    at = saved.index(max(saved)) + 1
    parts = [order[:at], order[at:]]
    return [[part[i] for i in own] for part in parts for own in alike([lengths[i] for i in part])]


Choose = Callable[[Tensor, Sequence[Answer]], Tensor]
"""Logits [B, V] and whose they are -> the next tokens, int64 [B]."""


class Group:
    """Rows that are decoded together. Made by :meth:`open`; what is over leaves with :meth:`regroup`."""

    def __init__(self, language: Language, choose: Choose, kept: Kept | None) -> None:
        self.language, self.choose, self.kept = language, choose, kept
        self.answers: list[Answer] = []
        self.names: list[Names | None] = []
        self.cache: Any = None
        self.columns = 0
        """Of the cache; a row's own are the last ``lengths[i]``."""
        self.lengths: list[int] = []
        self.step: Step
        """The last one: its tokens are chosen and not read yet."""

    @classmethod
    @torch.inference_mode()
    def open(
        cls, language: Language, answers: Sequence[Answer], choose: Choose, kept: Kept | None = None
    ) -> Group:
        """Read the prompts of some rows, and choose the first token of each.

        Args:
            language: the model.
            answers: the rows.
            choose: how tokens are chosen.
            kept: where beginnings of prompts and embeddings are found and kept; None: nowhere.
        """
        kept = kept if kept is not None and kept.limit else None
        group = cls(language, choose, kept)
        group.answers = list(answers)
        blocks: list[list[Tensor]] = [[] for _ in answers]
        group.names = [None for _ in answers]
        if kept is not None and language.joins:
            group.names = [Names(answer.encoded, language.places) for answer in answers]
            for i, (answer, names) in enumerate(zip(answers, group.names, strict=True)):
                assert names is not None
                # The last token is always read: its state predicts the first word.
                blocks[i] = kept.find(names.found[: (len(answer.encoded) - 1) // BLOCK])
        if language.kind.slides and len(answers) > 1 and any(blocks):
            # A window counts columns, so no gap may lie between a beginning and the rest of a row.
            each = [cls.open(language, [answer], choose, kept) for answer in answers]
            return cls._joined(each, [[0] for _ in each])
        rows, before = [answer.encoded for answer in answers], [BLOCK * len(found) for found in blocks]
        new = [len(row) - b for row, b in zip(rows, before, strict=True)]
        media = [language.placed(row, b) for row, b in zip(rows, before, strict=True)]
        items = [item for row in media for item, _ in row]
        seen = {id(item): x for item, x in zip(items, language.perceive(items, kept), strict=True)}
        parts = alike(new) if language.joins else [list(range(len(rows)))]
        groups = []
        for part in parts:
            own = group if len(parts) == 1 else cls(language, choose, kept)
            own.names = [group.names[i] for i in part]
            own.answers = [answers[i] for i in part]
            own._read([blocks[i] for i in part], [media[i] for i in part], seen)
            groups.append(own)
        return group if len(parts) == 1 else cls._joined(groups, [range(len(part)) for part in parts])

    def _read(
        self,
        blocks: Sequence[Sequence[Tensor]],
        media: Sequence[Sequence[Placed]],
        seen: Mapping[int, Tensor],
    ) -> None:
        """Read the prompts: what is known of each, its media, and their embeddings; choose first tokens."""
        language, rows = self.language, [answer.encoded for answer in self.answers]
        before = [BLOCK * len(found) for found in blocks]
        new = [len(row) - b for row, b in zip(rows, before, strict=True)]
        for answer, b in zip(self.answers, before, strict=True):
            answer.num_kept = b
        language.num_read += sum(new)
        x_BND = language.embed(rows, before, media, seen)
        prefix, longest = max(before), max(new)
        if prefix:
            assert language.shapes is not None
            like = next(found[0] for found in blocks if found)
            known = [torch.cat(list(found)) if found else like[:0] for found in blocks]
            cache = caches.filled(known, language.shapes)
        else:
            cache = caches.empty(language.config, language.kind)
        mask_BT = torch.zeros(len(rows), prefix + longest, dtype=torch.int64)
        place_BN = torch.zeros(len(rows), longest, dtype=torch.int64)
        for i, (b, n) in enumerate(zip(before, new, strict=True)):
            mask_BT[i, prefix - b : prefix] = 1
            mask_BT[i, prefix + longest - n :] = 1
            place_BN[i, longest - n :] = torch.arange(b, b + n)
        states_BD = self._forward(cache, mask_BT, place_BN, inputs_embeds=x_BND)[:, -1]
        self.lengths = [len(row) for row in rows]
        self.columns = prefix + longest
        if prefix:
            self.columns = caches.close_gaps(self.cache, prefix, before, new)
        if language.joins and language.shapes is None:
            language.shapes = caches.shapes(self.cache)
        for i in range(len(rows)):
            self._keep(i)
        self._take(states_BD)

    @torch.inference_mode()
    def advance(self) -> Step:
        """Read the last tokens and choose the next. No row may be over."""
        if guess := self._guess():
            return self._check(guess)
        self.columns += 1
        lengths_B1 = torch.tensor(self.lengths)[:, None]
        mask_BT = (torch.arange(self.columns) >= self.columns - 1 - lengths_B1).long()
        tokens_B1 = self.step.tokens_B[-len(self.lengths) :, None]
        states_BD = self._forward(self.cache, mask_BT, lengths_B1, input_ids=tokens_B1)[:, -1]
        self.lengths = [length + 1 for length in self.lengths]
        return self._take(states_BD)

    def _forward(self, cache: Any, mask_BT: Tensor, place_BN: Tensor, **given: Tensor) -> Tensor:
        device = self.language.device
        out = self.language.model.model(
            attention_mask=mask_BT.to(device),
            position_ids=place_BN.to(device),
            past_key_values=cache,
            use_cache=True,
            **given,
        )
        self.cache = out.past_key_values
        states_BND: Tensor = out.last_hidden_state
        return states_BND

    def _guess(self) -> list[int]:
        """What may come next of a row that is alone: what followed its last two tokens before."""
        if len(self.answers) > 1 or self.answers[0].sampling.num_beams > 1 or not self.language.joins:
            return []
        (answer,) = self.answers
        most = min(answer.sampling.lookup, answer.most - len(answer.ids) - 1)
        if most < 1:
            return []
        read = [*answer.encoded.ids.tolist(), *answer.ids]
        for at in range(len(read) - 3, -1, -1):
            if read[at : at + 2] == read[-2:]:
                found = read[at + 2 : at + 2 + most]
                places = [n for n, token in enumerate(found) if token in self.language.places.values()]
                return found[: places[0]] if places else found
        return []

    def _check(self, guess: list[int]) -> Step:
        """Read the last token and guesses of the next ones; keep as many as are chosen indeed."""
        (answer,), (length,) = self.answers, self.lengths
        device = self.step.tokens_B.device
        new_1N = torch.tensor([[answer.ids[-1], *guess]], device=device)
        mask_1T = torch.ones(1, self.columns + new_1N.shape[1], dtype=torch.int64)
        mask_1T[:, : self.columns - length] = 0
        place_1N = torch.arange(length, length + new_1N.shape[1])[None]
        states_ND = self._forward(self.cache, mask_1T, place_1N, input_ids=new_1N)[0]
        steps = []
        for state_1D, guessed in zip(states_ND.split(1), [*guess, None], strict=True):
            steps.append(self._take(state_1D))
            if answer.over is not None or answer.ids[-1] != guessed:
                break
        self.lengths, self.columns = [length + len(steps)], self.columns + len(steps)
        caches.crop(self.cache, self.columns)
        tokens, states = ([getattr(step, name) for step in steps] for name in ("tokens_B", "states_BD"))
        self.step = Step([answer] * len(steps), torch.cat(tokens), torch.cat(states))
        return self.step

    def _take(self, states_BD: Tensor) -> Step:
        logits_BV = self.language.model.head(states_BD[:, None])[:, -1].float()
        never = list(self.language.places.values())
        raw = {}
        for i, answer in enumerate(self.answers):
            if answer.sampling.num_logprobs is not None:
                raw[i] = logits_BV[i].clone()
                raw[i][never] = -torch.inf
        try:
            tokens_B = self.choose(logits_BV, self.answers)
        except RuntimeError:
            tokens_B = self._chosen_apart(states_BD)
        for i, (answer, token) in enumerate(zip(self.answers, tokens_B.tolist(), strict=True)):
            told = None
            if i in raw:
                told = answer.writer.logprob(raw[i], token, answer.sampling.num_logprobs or 0)
            answer.take(token, told)
        self.step = Step(list(self.answers), tokens_B, states_BD)
        return self.step

    def _chosen_apart(self, states_BD: Tensor) -> Tensor:
        """The next tokens, each row's by itself: one whose logits are no numbers fails alone."""
        tokens = []
        for i, answer in enumerate(self.answers):
            logits_1V = self.language.model.head(states_BD[i : i + 1, None])[:, -1].float()
            try:
                tokens.append(int(self.choose(logits_1V, [answer])[0]))
            except RuntimeError as error:
                tokens.append(self.language.pad_id)
                answer.error, answer.over = error, "length"
        return torch.tensor(tokens, device=states_BD.device)

    def _keep(self, row: int) -> None:
        """Keep what was read of a row."""
        names = self.names[row]
        if names is not None and self.kept is not None:
            shift = self.columns - self.lengths[row]
            self.kept.keep(
                names.found, lambda first, last: caches.cut(self.cache, row, shift + first, shift + last)
            )

    @classmethod
    @torch.inference_mode()
    def regroup(cls, groups: Sequence[Group]) -> Group:
        """One group of the rows of several that are not over; it may be empty.

        Of rows that leave, what was read is kept. Only groups of a model that ``joins`` can be several.
        """
        stays = [[i for i, answer in enumerate(g.answers) if answer.over is None] for g in groups]
        for group, rows in zip(groups, stays, strict=True):
            for i in set(range(len(group.answers))).difference(rows):
                if (names := group.names[i]) is not None:
                    names.grow(group.answers[i].ids[:-1])
                    group._keep(i)
        if len(groups) == 1 and len(stays[0]) == len(groups[0].answers):
            return groups[0]
        return cls._joined(groups, stays)

    @classmethod
    def _joined(cls, groups: Sequence[Group], stays: Sequence[Sequence[int]]) -> Group:
        """One group of these rows of several."""
        language, both = groups[0].language, list(zip(groups, stays, strict=True))
        made = cls(language, groups[0].choose, groups[0].kept)
        made.answers = [group.answers[i] for group, rows in both for i in rows]
        if not made.answers:
            return made
        made.names = [group.names[i] for group, rows in both for i in rows]
        made.lengths = [group.lengths[i] for group, rows in both for i in rows]
        device = groups[0].step.tokens_B.device
        index = [torch.tensor(rows, dtype=torch.int64, device=device) for rows in stays]
        tokens = [group.step.tokens_B[own] for group, own in zip(groups, index, strict=True)]
        states = [group.step.states_BD[own] for group, own in zip(groups, index, strict=True)]
        made.step = Step(list(made.answers), torch.cat(tokens), torch.cat(states))
        if language.joins:
            made.cache = caches.join([(group.cache, rows) for group, rows in both if rows], made.lengths)
            made.columns = max(made.lengths)
        else:
            # The one selection that every kind of cache layer knows, linear attention included.
            groups[0].cache.reorder_cache(index[0])
            made.cache, made.columns = groups[0].cache, groups[0].columns
        return made
