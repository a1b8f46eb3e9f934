"""Connectors for sounds make as many tokens as they say, each of the positions that belong to it."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.model.test_connectors import FOR_SOUNDS, D, E, build, close, noise
from tinymodal.model import geometry
from tinymodal.model.audio_connectors import primes
from tinymodal.model.connectors import CONNECTORS, find_connector
from tinymodal.model.media import Features


@settings(deadline=None, max_examples=120)
@given(
    name=st.sampled_from(FOR_SOUNDS),
    length=st.integers(1, 60),
    factor=st.integers(1, 13),
    queries=st.integers(1, 3),
    items=st.integers(1, 3),
)
@torch.no_grad()
def test_there_is_a_token_for_every_factor_positions_and_one_for_the_rest(
    name, length, factor, queries, items
):
    queries = queries if name == "window_qformer" else 1
    options = {"factor": factor} | ({"num_queries": queries} if name == "window_qformer" else {})
    settled = find_connector(name).settle(options)
    out = build(name, **options)(noise((length,), items))
    assert out.shape == (items, ceil(length / factor) * queries, D)
    assert CONNECTORS[name].shrink((length,), **settled) == (out.shape[1],)


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(FOR_SOUNDS), length=st.integers(1, 30), factor=st.integers(1, 6))
@torch.no_grad()
def test_a_sound_does_not_depend_on_the_others(name, length, factor):
    connector, features = build(name, factor=factor), noise((length,), 3)
    together = connector(features)
    for i in range(3):
        close(connector(Features(features.values[i : i + 1], features.grid))[0], together[i])


@pytest.mark.parametrize("name", ["stack_frames", "pool_frames", "window_qformer"])
@torch.no_grad()
def test_a_token_depends_on_its_own_positions_alone(name):
    connector, features = build(name, factor=3), noise((10,), 1)
    each = connector(features).shape[1] // 4
    before = connector(features).clone()
    for place in range(10):
        changed = features.values.clone()
        changed[:, place] += torch.randn(E)
        moved = (connector(Features(changed, (10,))) - before).abs().amax(-1)[0] > 1e-5
        assert moved.nonzero().flatten().tolist() == [place // 3 * each + i for i in range(each)]


@torch.no_grad()
def test_a_convolution_reads_its_neighbours_and_no_further():
    """Two of stride 2 and width 3 are centred on every fourth position and reach 3 to each side."""
    connector, features = build("conv_frames", factor=4), noise((32,), 1)
    before = connector(features)
    for place in range(8, 17):
        changed = features.values.clone()
        changed[:, place] += torch.randn(E)
        moved = (connector(Features(changed, (32,))) - before).abs().amax(-1)[0] > 1e-6
        near = [token for token in range(8) if abs(place - 4 * token) <= 3]
        assert moved.nonzero().flatten().tolist() == near


# By which formula


@torch.no_grad()
def test_stacked_positions_lie_side_by_side_and_the_last_is_repeated():
    connector, features = build("stack_frames", factor=4), noise((10,))
    x = features.values
    groups = [x[:, 0:4], x[:, 4:8], torch.stack([x[:, 8], x[:, 9], x[:, 9], x[:, 9]], 1)]
    stacked = torch.stack([group.flatten(1) for group in groups], 1)
    w, b = connector.norm.weight, connector.norm.bias
    one, _, two = connector.proj
    normed = F.layer_norm(stacked, (4 * E,), w, b)
    close(connector(features), two(F.gelu(one(normed))))


@torch.no_grad()
def test_pooled_positions_are_their_mean_and_the_last_one_of_what_is_left():
    connector, features = build("pool_frames", factor=4), noise((10,))
    x = features.values
    means = torch.stack([x[:, 0:4].mean(1), x[:, 4:8].mean(1), x[:, 8:10].mean(1)], 1)
    close(connector(features), connector.proj(means))


@torch.no_grad()
def test_a_factor_of_one_joins_nothing():
    x = noise((7,))
    for name in ("stack_frames", "pool_frames", "conv_frames"):
        connector = build(name, factor=1)
        normed = x.values if name == "pool_frames" else connector.norm(x.values)
        close(connector(x), connector.proj(normed))


@torch.no_grad()
def test_a_window_is_asked_as_a_qformer_asks_it_alone():
    connector, features = build("window_qformer", factor=4, num_queries=2), noise((10,))
    plain = build("qformer", num_queries=2, depth=2, width=8, num_heads=2, cross_every=1)
    plain.load_state_dict(connector.state_dict())
    pieces = [plain(Features(piece, (piece.shape[1],))) for piece in features.values.split(4, dim=1)]
    close(connector(features), torch.cat(pieces, dim=1))


def test_salmonns_windows_are_a_third_of_a_second_of_whisper():
    """17 of 50 positions a second: 88 of them in 30 s, where SALMONN leaves the last 4 positions out."""
    assert CONNECTORS["window_qformer"].shrink((1500,)) == (89,)
    connector = find_connector("window_qformer").build((8,), D)
    assert len(connector.layer) == 2
    assert all(layer.crossattention is not None for layer in connector.layer)


@pytest.mark.parametrize("name", FOR_SOUNDS)
def test_pictures_are_refused_by_what_would_mix_their_rows(name):
    with pytest.raises(
        ValueError, match=rf"connector '{name}' is for sounds.*got a grid of \(4, 4\); for pic"
    ):
        CONNECTORS[name].shrink((4, 4))
    with pytest.raises(ValueError, match="is for sounds"):
        build(name)(noise((4, 4)))


@pytest.mark.parametrize("name", ["linear", "mlp", "identity", "qformer", "perceiver"])
@torch.no_grad()
def test_connectors_that_need_no_rows_read_sounds(name):
    out = build(name)(noise((7,), width=D if name == "identity" else E))
    settled = find_connector(name).settle(
        {"num_queries": 3} if "num_queries" in CONNECTORS[name].defaults else {}
    )
    assert out.shape[1] == CONNECTORS[name].shrink((7,), **settled)[0]


@given(length=st.integers(1, 10_000), factor=st.integers(1, 100))
def test_stacks_hold_every_position_and_none_is_empty(length, factor):
    groups = geometry.stack(length, factor)
    assert (groups - 1) * factor < length <= groups * factor


def test_nothing_cannot_be_stacked():
    for length, factor in ((0, 2), (3, 0), (-1, 1)):
        with pytest.raises(
            ValueError, match=f"1 position or more and a factor of 1 or more, got {length}, {factor}"
        ):
            geometry.stack(length, factor)


@given(number=st.integers(1, 5000))
def test_prime_factors_multiply_to_the_number(number):
    found = primes(number)
    product = 1
    for prime in found:
        assert all(prime % divisor for divisor in range(2, prime))
        product *= prime
    assert product == number
    assert found == sorted(found)
