"""Each connector makes as many tokens as it says, of the right patches, and says what it takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinymodal.model.connectors import CONNECTORS, PixelShuffle, find_connector
from tinymodal.model.geometry import num_tokens
from tinymodal.model.media import Features

E, D = 8, 12

CASES = st.one_of(
    st.tuples(st.just("linear"), st.just({})),
    st.tuples(st.just("mlp"), st.fixed_dictionaries({"depth": st.integers(1, 3)})),
    st.tuples(
        st.just("pixel_shuffle"),
        st.fixed_dictionaries({"ratio": st.integers(1, 4), "activation": st.sampled_from(["gelu", "silu"])}),
    ),
)


@settings(deadline=None, max_examples=40)
@given(case=CASES, rows=st.integers(1, 6), columns=st.integers(1, 6), items=st.integers(1, 3))
def test_a_connector_makes_as_many_tokens_as_it_says(case, rows, columns, items):
    name, options = case
    ratio = options.get("ratio", 1)
    grid = (rows * ratio, columns * ratio)
    connector = CONNECTORS[name](E, D, **options)
    out = connector(Features(torch.randn(items, num_tokens(grid), E), grid))
    assert out.shape == (items, num_tokens(connector.shrink(grid, **options)), D)


def test_identity_changes_nothing_and_needs_equal_widths():
    x = torch.randn(2, 6, E)
    assert torch.equal(CONNECTORS["identity"](E, E)(Features(x, (2, 3))), x)
    with pytest.raises(ValueError, match="got 8 and 12; use 'linear' or 'mlp'"):
        CONNECTORS["identity"](E, D)


def test_pixel_shuffle_gives_each_token_its_own_block_of_patches():
    """The token at row 1, column 2 of a 2 x 3 grid sees rows 2-3, columns 4-5 of the 4 x 6 grid."""
    connector = PixelShuffle(E, D, ratio=2)
    x = torch.randn(1, 24, E)
    before = connector(Features(x, (4, 6)))
    changed = x.clone()
    changed[0, 2 * 6 + 4] += 1.0
    moved = (connector(Features(changed, (4, 6))) - before).abs().amax(-1)[0].nonzero().flatten()
    assert moved.tolist() == [1 * 3 + 2]


def test_an_unknown_option_is_answered_with_those_there_are_and_the_nearest():
    with pytest.raises(
        ValueError, match=r"'dept' of connector 'mlp'.*depth, activation; did you mean 'depth'"
    ):
        find_connector("mlp").settle({"dept": 3})
    with pytest.raises(ValueError, match="it takes none"):
        find_connector("linear").settle({"depth": 3})


@pytest.mark.parametrize("value", ["2", 2.0, True, None])
def test_an_option_of_another_type_is_refused(value):
    with pytest.raises(ValueError, match="option 'ratio' of connector 'pixel_shuffle' must be int"):
        find_connector("pixel_shuffle").settle({"ratio": value})


def test_an_unknown_connector_or_activation_names_those_there_are():
    with pytest.raises(ValueError, match=r"known: identity, linear, mlp, pixel_shuffle; did you mean 'mlp'"):
        find_connector("mlp2")
    with pytest.raises(ValueError, match="unknown activation 'swish'; known: gelu"):
        CONNECTORS["mlp"](E, D, activation="swish")


def test_features_that_do_not_fill_their_grid_are_refused():
    with pytest.raises(
        ValueError, match=r"features of a \(2, 3\) grid must be \[items, 6, width\], got \(1, 7, 4\)"
    ):
        Features(torch.zeros(1, 7, 4), (2, 3))
