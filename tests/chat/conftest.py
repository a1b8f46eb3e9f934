"""A processor without pictures to decode: encoding is about words, places and counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tinymodal.compose.tiny import tiny_tokenizer


@dataclass
class FakePrepared:
    tiles: tuple[torch.Tensor, ...]
    grid: tuple[int, int]
    feature_grids: tuple[tuple[int, int], ...]
    tokens: int
    patches: int
    tile_tokens: tuple[int, ...]
    order: tuple[int, ...] | None = None
    seconds: float | None = None
    seen: bool = False
    key: str = ""


@dataclass
class FakeProcessor:
    """Sources are sizes: ``b"3"`` is a picture that takes 3 x 3 tokens."""

    tokenizer: Any = field(default_factory=tiny_tokenizer)
    image_token: str = "<image>"
    audio_token: str = "<audio>"
    audio_token_id: int | None = None

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    def prepare(self, source: bytes, number: int = 0, **limits: Any) -> FakePrepared:
        if not source.isdigit():
            raise ValueError(f"{source!r} is not a picture")
        edge = int(source)
        tile, tokens = torch.zeros(3, 4, 4), edge**2
        return FakePrepared((tile,), (edge, edge), ((2 * edge, 2 * edge),), tokens, 4 * tokens, (tokens,))

    def prepare_sound(self, source: bytes, **stretch: Any) -> Any:
        raise ValueError(f"{source!r} is given, but this model has no audio tower")


@pytest.fixture(scope="session")
def processor() -> FakeProcessor:
    return FakeProcessor()
