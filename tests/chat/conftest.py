"""A processor without pictures to decode: encoding is about words, places and counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tinymodal.compose.tiny import tiny_tokenizer


@dataclass
class FakePrepared:
    values: torch.Tensor
    grid: tuple[int, int]
    feature_grid: tuple[int, int]
    tokens: int
    patches: int


@dataclass
class FakeProcessor:
    """Sources are sizes: ``b"3"`` is a picture that takes 3 x 3 tokens."""

    tokenizer: Any = field(default_factory=tiny_tokenizer)
    image_token: str = "<image>"

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    def prepare(self, source: bytes) -> FakePrepared:
        if not source.isdigit():
            raise ValueError(f"{source!r} is not a picture")
        edge = int(source)
        return FakePrepared(torch.zeros(3, 4, 4), (edge, edge), (2 * edge, 2 * edge), edge**2, 4 * edge**2)


@pytest.fixture(scope="session")
def processor() -> FakeProcessor:
    return FakeProcessor()
