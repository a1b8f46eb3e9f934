"""Which draws are whose: the one sequence of draws, dealt to ranks like cards.

With ``world`` ranks, rank r's i-th draw is number i * world + r of the sequence g. At first g counts up from
0. Ranks fill their rows by themselves, so at any moment some are ahead of others, and some samples wait in
rows that are not full: none of this is asked of another rank.

A training that goes on with as many ranks puts each back where it was. With another number, every draw that
was dealt but not trained on, waiting or passed by, becomes the ``backlog``; g is then the backlog first, and
counts on behind the last draw that anyone made. So no sample of an epoch is repeated and none is left out,
however often the number changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

from tinymodal.core.errors import CheckpointError


class Deal(NamedTuple):
    """One rank's draws."""

    rank: int = 0
    world: int = 1
    backlog: tuple[int, ...] = ()
    """Draws that come first."""
    start: int = 0
    """The draw after them, from which g counts up."""
    total: int | None = None
    """Draws there are; None: no end."""

    def number(self, i: int) -> int | None:
        """This rank's ``i``-th draw; None behind its last."""
        return self.of_all(i * self.world + self.rank)

    def numbers(self, i: int) -> Iterator[int]:
        """This rank's draws from its ``i``-th on."""
        for k in count(i):
            n = self.number(k)
            if n is None:
                return
            yield n

    def of_all(self, j: int) -> int | None:
        """g(j), the ``j``-th draw of all ranks together; None behind the last."""
        if j < len(self.backlog):
            return self.backlog[j]
        n = self.start + j - len(self.backlog)
        return None if self.total is not None and n >= self.total else n

    @property
    def done(self) -> int:
        """Draws that were trained on, or found unusable, before this deal."""
        return self.start - len(self.backlog)


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The position of all ranks, from the ``state_dict`` of each loader after the same step.

    Args:
        states: one of each rank, in any order.

    Raises:
        ValueError: they are not one of each rank of one training.
    """
    ranks = sorted((dict(state) for state in states), key=lambda state: int(state["rank"]))
    found = [(state["rank"], state["world"]) for state in ranks]
    if not ranks or found != [(rank, len(ranks)) for rank in range(len(ranks))]:
        raise ValueError(f"states of (rank, world) {found}; expected one of each rank of one world")
    if any((s["backlog"], s["start"]) != (ranks[0]["backlog"], ranks[0]["start"]) for s in ranks):
        raise ValueError("states of ranks that were dealt from different draws; expected those of one step")
    return {"world": len(ranks), "ranks": ranks}


def states_of(state: Mapping[str, Any], world: int) -> list[Mapping[str, Any]]:
    """The states of all ranks in what was saved.

    Raises:
        CheckpointError: it is of one rank of several, and not of as many as ``world``.
    """
    if "ranks" in state:
        return list(state["ranks"])
    if state["world"] not in (1, world):
        raise CheckpointError(
            f"data: this is the position of rank {state['rank']} of {state['world']} alone, and there are "
            f"{world} now; expected the positions of all ranks, joined by merge_states"
        )
    return [state]


def redeal(states: Sequence[Mapping[str, Any]], rank: int, world: int, total: int | None) -> Deal:
    """Deal anew, to another number of ranks, what those of ``states`` (all of them) have not trained on."""
    old = Deal(0, len(states), tuple(states[0]["backlog"]), states[0]["start"], total)
    place = {n: j for j, n in enumerate(old.backlog)}
    # Behind the last draw that any rank made nothing is dealt; before it some have fallen behind.
    top = max(((s["draws"] - 1) * old.world + s["rank"] + 1 for s in states if s["draws"]), default=0)
    left = set(range(top, len(old.backlog)))
    for state in states:
        left.update(range(state["draws"] * old.world + state["rank"], top, old.world))
        for row in (*state["open"], *state["ready"]):
            left.update(place[n] if n in place else n - old.start + len(old.backlog) for n in row)
    backlog = tuple(n for j in sorted(left) if (n := old.of_all(j)) is not None)
    return Deal(rank, world, backlog, old.start + max(top - len(old.backlog), 0), total)
