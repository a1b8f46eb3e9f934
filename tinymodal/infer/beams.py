"""Beam search: several beginnings of one reply are followed at once, and the likeliest whole one is given.

As ``generate(num_beams=..., early_stopping=False)`` of transformers does it, by test: penalties count on
log-probabilities, twice as many continuations as beams are looked at, and the search ends when the best
beginning cannot overtake the worst of the replies found. The beams are the rows of one group, so other
requests are decoded between its steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tinymodal.infer.answer import Answer
from tinymodal.infer.decoding import Group, Step
from tinymodal.infer.logprobs import TokenLogprob
from tinymodal.infer.sampling import Choice, restrict

# Shapes: K beams, V vocabulary, D width.


@dataclass(slots=True)
class Beam:
    """A reply, or the beginning of one."""

    ids: list[int] = field(default_factory=list)
    score: float = 0.0
    """Its log-probability; of a whole reply, over its length to the power ``length_penalty``."""
    over: Literal["stop", "length"] | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Beams(Group):
    """The beams of one answer. It gets its tokens when the search is over."""

    found: list[Beam]
    """Whole replies, the best first; at most as many as there are beams."""
    running: list[Beam]

    def _take(self, states_KD: Tensor) -> Step:
        (answer,) = self.answers
        how, device = answer.sampling, states_KD.device
        if not hasattr(self, "running"):
            self.found, self.running = [], [Beam()]
            # What stands in the cache from now on is what beams tried, not what was said.
            self.names = [None]
        logits_KV = self.language.model.head(states_KD[:, None])[:, -1].float()
        scores_KV = logits_KV.log_softmax(-1)
        stops, never = self.language.stop_ids, list(self.language.places.values())
        choices = [Choice(how, answer.encoded.ids, beam.ids) for beam in self.running]
        restrict(scores_KV, choices, never, sorted(stops))
        scores_KV += torch.tensor([beam.score for beam in self.running], device=device)[:, None]
        most = min(how.num_beams * max(2, 1 + len(stops)), scores_KV.numel())
        best = scores_KV.flatten().topk(most)
        tried: list[tuple[int, Beam]] = []
        for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            parent, token = divmod(place, scores_KV.shape[1])
            tried.append((parent, self._continued(answer, parent, token, score, logits_KV, never)))
        for _, beam in tried[: how.num_beams]:
            if beam.over is not None and beam.score > -torch.inf:
                # Only those that would have gone on may end.
                beam.score /= len(beam.ids) ** how.length_penalty
                self.found.append(beam)
        self.found = sorted(self.found, key=lambda beam: -beam.score)[: how.num_beams]
        going = [(parent, beam) for parent, beam in tried if beam.over is None][: how.num_beams]
        if not going or not self._may_improve(going[0][1], answer):
            reply = self.found[0]
            answer.settle(reply.ids, reply.over or "length", reply.logprobs)
        else:
            self.running = [beam for _, beam in going]
            self.cache.reorder_cache(torch.tensor([parent for parent, _ in going], device=device))
            self.lengths = [self.lengths[parent] for parent, _ in going]
        tokens_K = torch.tensor([beam.ids[-1] for beam in self.running if beam.ids], device=device)
        self.step = Step([answer], tokens_K, states_KD)
        return self.step

    def _continued(
        self, answer: Answer, parent: int, token: int, score: float, logits_KV: Tensor, never: list[int]
    ) -> Beam:
        before = self.running[parent]
        beam = Beam([*before.ids, token], score)
        met = bool(answer.stops) and answer.writer.text(beam.ids, answer.stops)[1]
        if met or token in self.language.stop_ids:
            beam.over = "stop"
        elif len(beam.ids) >= answer.most:
            beam.over = "length"
        if answer.sampling.num_logprobs is not None:
            raw_V = logits_KV[parent].clone()
            raw_V[never] = -torch.inf
            told = answer.writer.logprob(raw_V, token, answer.sampling.num_logprobs)
            beam.logprobs = [*before.logprobs, told]
        return beam

    def _may_improve(self, best: Beam, answer: Answer) -> bool:
        """Whether a beginning may still become better than the worst of the replies that were found."""
        if len(self.found) < answer.sampling.num_beams:
            return True
        return best.score / len(best.ids) ** answer.sampling.length_penalty > self.found[-1].score
