"""Each connector makes as many tokens as it says, of the right patches, by its source's formula."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tinymodal.model.connectors import CONNECTORS, find_connector
from tinymodal.model.geometry import num_tokens
from tinymodal.model.media import Features

E, D = 8, 12

SMALL = {
    "perceiver": {"num_queries": 3, "depth": 2, "num_heads": 2, "head_width": 4},
    "sincos": {"num_queries": 4, "head_width": 6},
    "qformer": {"num_queries": 3, "depth": 3, "width": 8, "num_heads": 2},
    "window_qformer": {"num_queries": 2, "width": 8, "num_heads": 2, "factor": 3},
}
"""Options that make the large connectors quick to test."""
NEEDS_ROWS = ("pixel_shuffle", "avg_pool", "ldp", "ldpv2", "sincos")
FOR_SOUNDS = ("stack_frames", "conv_frames", "pool_frames", "window_qformer")
"""Their features follow one another in time; see test_audio_connectors.py."""


def build(name: str, **options):
    """A small connector with every number in it at random, so that no part hides behind a zero or a one."""
    torch.manual_seed(0)
    widths = (E // 2, E // 2) if name == "interleave" else (D if name == "identity" else E,)
    cls = find_connector(name)
    connector = cls.build(widths, D, **cls.settle(SMALL.get(name, {}) | options))
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return connector.eval()


def noise(grid: tuple[int, ...], items: int = 2, width: int = E) -> Features:
    return Features(
        torch.randn(items, num_tokens(grid), width, generator=torch.Generator().manual_seed(1)), grid
    )


# How many


@st.composite
def cases(draw):
    """A connector, its options, and a grid that suits them."""
    name = draw(st.sampled_from(sorted(CONNECTORS)))
    options = dict(SMALL.get(name, {}))
    if "num_queries" in options:
        options["num_queries"] = draw(st.integers(1, 9))
    if "ratio" in CONNECTORS[name].defaults:
        options["ratio"] = draw(st.integers(1, 4))
    if "side" in CONNECTORS[name].defaults:
        options["side"] = draw(st.integers(0, 3))
    settled = find_connector(name).settle(options)
    multiple = CONNECTORS[name].multiple(**settled)
    least = max(1, settled.get("side", 0))
    sides = 2 if name in NEEDS_ROWS else 1 if name in FOR_SOUNDS else draw(st.integers(1, 2))
    grid = tuple(multiple * draw(st.integers(-(-least // multiple), 6)) for _ in range(sides))
    return name, settled, grid


@settings(deadline=None, max_examples=120)
@given(case=cases(), items=st.integers(1, 3))
def test_a_connector_makes_as_many_tokens_as_it_says(case, items):
    name, options, grid = case
    connector = build(name, **options)
    out = connector(noise(grid, items, D if name == "identity" else E))
    assert out.shape == (items, num_tokens(CONNECTORS[name].shrink(grid, **options)), D)


@pytest.mark.parametrize("name", [name for name in CONNECTORS if name in NEEDS_ROWS])
def test_a_connector_that_needs_rows_refuses_features_without(name):
    """As a tower's are that keeps its class token."""
    said = rf"connector '{name}' needs features in rows and columns, got a grid of \(17,\); take keep_class"
    with pytest.raises(ValueError, match=said):
        CONNECTORS[name].shrink((17,), **CONNECTORS[name].settle({}))
    with pytest.raises(ValueError, match=said):
        build(name)(noise((17,)))


def test_a_grid_that_blocks_do_not_fill_is_refused():
    for name in ("pixel_shuffle", "avg_pool", "ldpv2"):
        with pytest.raises(
            ValueError, match=r"grid divisible by 2, got 27 x 27 patches; ratios that fit: 3, 9, 27"
        ):
            CONNECTORS[name].shrink((27, 27))
    for name in ("avg_pool", "ldpv2"):
        with pytest.raises(ValueError, match=rf"'{name}' with side 12 needs a grid of 12 x 12.*got 27 x 9"):
            CONNECTORS[name].shrink((27, 9), side=12)


# By which formula


def close(ours, theirs):
    """Within what fp32 rounds differently for sums in another order."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_identity_changes_nothing_and_needs_equal_widths():
    x = torch.randn(2, 6, E)
    assert torch.equal(CONNECTORS["identity"](E, E)(Features(x, (2, 3))), x)
    with pytest.raises(ValueError, match="got 8 and 12; use 'linear' or 'mlp'"):
        CONNECTORS["identity"](E, D)


def test_linear_is_a_matrix_and_a_bias():
    connector, features = build("linear"), noise((2, 3))
    w, b = connector.proj.weight, connector.proj.bias
    close(connector(features), torch.einsum("nse,de->nsd", features.values, w) + b)


@pytest.mark.parametrize("name", ["mlp", "mlp2x_gelu"])
def test_mlp_of_depth_2_equals_the_projector_of_hf_llava(name):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=E, num_attention_heads=2),
        text_config=LlamaConfig(hidden_size=D, num_attention_heads=2),
    )
    theirs, ours, features = LlavaMultiModalProjector(config), build(name), noise((2, 3))
    theirs.load_state_dict(
        {
            f"linear_{1 + int(key[5]) // 2}.{key[7:]}": value  # proj.0.weight, proj.2.weight
            for key, value in ours.state_dict().items()
        }
    )
    close(ours(features), theirs(features.values))


def test_mlp_has_an_exact_gelu_between_its_layers_and_none_behind():
    connector, x = build("mlp3x_gelu"), noise((2, 3))
    out = x.values
    for index in (0, 2, 4):
        layer = connector.proj[index]
        out = out if index == 0 else 0.5 * out * (1 + torch.erf(out / 2**0.5))
        out = out @ layer.weight.T + layer.bias
    close(connector(x), out)


def test_pixel_shuffle_lays_a_block_of_patches_end_to_end_row_by_row():
    connector, features = build("pixel_shuffle", ratio=2, depth=1), noise((4, 6))
    picture = features.values.view(2, 4, 6, E)
    tokens = [
        torch.cat([picture[:, 2 * i + a, 2 * j + b] for a in (0, 1) for b in (0, 1)], dim=-1)
        for i in range(2)
        for j in range(3)
    ]
    x = torch.stack(tokens, dim=1)
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    x = x * connector.norm.weight + connector.norm.bias
    close(connector(features), x @ connector.proj[0].weight.T + connector.proj[0].bias)


@pytest.mark.parametrize(
    ("options", "rows", "columns"),
    [
        ({"ratio": 2}, [(0, 2), (2, 4)], [(0, 2), (2, 4), (4, 6)]),
        ({"side": 3}, [(0, 2), (1, 3), (2, 4)], [(0, 2), (2, 4), (4, 6)]),
    ],
)
def test_avg_pool_takes_means_and_then_projects(options, rows, columns):
    connector, features = build("avg_pool", depth=1, **options), noise((4, 6))
    picture = features.values.view(2, 4, 6, E)
    means = torch.stack([picture[:, a:b, c:d].mean((1, 2)) for a, b in rows for c, d in columns], dim=1)
    close(connector(features), means @ connector.proj[0].weight.T + connector.proj[0].bias)


def mlp_by_hand(x, one, two):
    x = x @ one.weight.T + one.bias
    return (0.5 * x * (1 + torch.erf(x / 2**0.5))) @ two.weight.T + two.bias


def depthwise_by_hand(picture, weight, stride):
    """3 x 3 convolution of each channel, zeros around, [N, h, w, D]: a sum of nine shifted pictures."""
    h, w = picture.shape[1:3]
    padded = F.pad(picture, (0, 0, 1, 1, 1, 1))
    return sum(padded[:, a : a + h, b : b + w] * weight[:, 0, a, b] for a in range(3) for b in range(3))[
        :, ::stride, ::stride
    ]


def norm_by_hand(x, norm):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    return x * norm.weight + norm.bias


@pytest.mark.parametrize("grid", [(4, 6), (5, 3)])
def test_ldp_is_an_mlp_and_two_mobilenet_blocks(grid):
    connector, features = build("ldp"), noise(grid)
    x = mlp_by_hand(features.values, connector.mlp[1], connector.mlp[3]).view(2, *grid, D)
    for index, stride in ((1, 1), (2, 2)):
        (conv, norm, _), excite, (pointwise, last) = connector.mb_block[index].block
        y = norm_by_hand(depthwise_by_hand(x, conv.weight, stride), norm)
        y = y * (y + 3).clamp(0, 6) / 6
        s = (y.mean((1, 2)) @ excite.fc1.weight[:, :, 0, 0].T + excite.fc1.bias).clamp(min=0)
        s = ((s @ excite.fc2.weight[:, :, 0, 0].T + excite.fc2.bias) + 3).clamp(0, 6) / 6
        y = norm_by_hand((y * s[:, None, None]) @ pointwise.weight[:, :, 0, 0].T, last)
        x = x + y if stride == 1 else y
    close(connector(features), x.flatten(1, 2))


def test_ldp_has_the_names_of_mobilevlm():
    """So that a checkpoint's ``mm_projector.model.*`` needs only its prefix cut; shapes at MobileVLM-1.7B."""
    with torch.device("meta"):
        state = CONNECTORS["ldp"](1024, 2048).state_dict()
    block = {
        "block.0.0.weight": (2048, 1, 3, 3),
        "block.0.1.weight": (2048,),
        "block.0.1.bias": (2048,),
        "block.1.fc1.weight": (512, 2048, 1, 1),
        "block.1.fc1.bias": (512,),
        "block.1.fc2.weight": (2048, 512, 1, 1),
        "block.1.fc2.bias": (2048,),
        "block.2.0.weight": (2048, 2048, 1, 1),
        "block.2.1.weight": (2048,),
        "block.2.1.bias": (2048,),
    }
    expected = {
        "mlp.1.weight": (2048, 1024),
        "mlp.1.bias": (2048,),
        "mlp.3.weight": (2048, 2048),
        "mlp.3.bias": (2048,),
    }
    expected |= {f"mb_block.{n}.{key}": shape for n in (1, 2) for key, shape in block.items()}
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


def test_ldp_v2_pools_to_144_tokens_and_adds_a_depthwise_convolution():
    features = noise((24, 24), items=1)
    halved, fixed = build("ldpv2"), build("ldpv2", side=12)
    x = mlp_by_hand(features.values, halved.proj[0], halved.proj[2]).view(1, 12, 2, 12, 2, D).mean((2, 4))
    x = x + depthwise_by_hand(x, halved.peg.weight, 1) + halved.peg.bias
    close(halved(features), x.flatten(1, 2))
    close(fixed(features), halved(features))


def test_interleave_takes_even_tokens_of_the_first_tower_and_odd_ones_of_the_second():
    connector, features = build("interleave"), noise((2, 3))
    out = connector(features)
    first, second = features.values[..., : E // 2], features.values[..., E // 2 :]
    close(out[:, 0::2], mlp_by_hand(first, connector.proj[0][0], connector.proj[0][2]))
    close(out[:, 1::2], mlp_by_hand(second, connector.proj[1][0], connector.proj[1][2]))
    assert CONNECTORS["interleave"].shrink((16, 16)) == (16, 32)
    with pytest.raises(ValueError, match="needs the features of 2 towers, got 1; give it two towers or use"):
        CONNECTORS["interleave"].build((E,), D)


# What is in it


@pytest.mark.parametrize("name", [name for name in CONNECTORS if name != "identity"])
def test_every_parameter_of_a_connector_learns(name):
    connector = build(name)
    out = connector(noise((16,) if name in FOR_SOUNDS else (4, 4)))
    (out * torch.randn_like(out)).sum().backward()
    for key, parameter in connector.named_parameters():
        assert parameter.grad is not None, key
        size = parameter.grad.abs().max()
        if key.endswith(".key.bias"):  # adds one number to all of a query's scores, which softmax takes away
            assert size < 1e-5, key
        else:
            assert size > 1e-4, key


PARAMETERS = {
    ("identity",): 0,
    ("linear",): 2_951_680,
    ("mlp",): 9_507_840,
    ("mlp2x_gelu",): 9_507_840,
    ("mlp3x_gelu",): 16_064_000,
    ("interleave",): 19_015_680,
    ("perceiver", ("num_queries", 32)): 176_099_840,
    # TinyLLaVA's, of which the specification says about 105 million.
    ("qformer", ("norm", False), ("affine", False)): 104_770_048,
}


@pytest.mark.parametrize("case", PARAMETERS, ids=lambda case: case[0])
def test_a_connector_has_as_many_parameters_as_the_specification_says(case):
    """From 1,152 (SigLIP so400m) to 2,560 (Phi-2)."""
    assert num_parameters(case[0], dict(case[1:])) == PARAMETERS[case]


def num_parameters(name: str, options: dict, in_width: int = 1152, out_width: int = 2560) -> int:
    widths = {"interleave": (in_width, in_width), "identity": (out_width,)}.get(name, (in_width,))
    cls = find_connector(name)
    with torch.device("meta"):
        connector = cls.build(widths, out_width, **cls.settle(options))
    return sum(p.numel() for p in connector.parameters())


def test_mobilevlm_projectors_are_as_large_as_their_layers_add_up_to():
    """MobileVLM-1.7B: from 1,024 to 2,048."""
    mlp = (1024 + 1) * 2048 + (2048 + 1) * 2048
    excite = (2048 + 1) * 512 + (512 + 1) * 2048
    block = 9 * 2048 + 2 * 2048 + excite + 2048 * 2048 + 2 * 2048
    assert num_parameters("ldp", {}, 1024, 2048) == mlp + 2 * block
    assert num_parameters("ldpv2", {}, 1024, 2048) == mlp + (9 + 1) * 2048


def test_the_page_on_connectors_tells_their_options_and_sizes():
    page = (Path(__file__).parents[2] / "docs/connectors.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("| `")
    ]
    table = {row[0].strip("`"): row for row in rows if row[0].strip("`") in CONNECTORS and len(row) == 5}
    assert list(table) == list(CONNECTORS)
    for name, (_, options, _, size, _) in table.items():
        written = dict(re.findall(r"`(\w+)` (\S+?)[,;]?(?: |$)", options))
        defaults = CONNECTORS[name].defaults
        assert written == {key: str(value).lower() for key, value in defaults.items()}, name
        assert int(size.replace(",", "")) == num_parameters(name, {}), name


# What it takes


def test_an_unknown_option_is_answered_with_those_there_are_and_the_nearest():
    with pytest.raises(
        ValueError, match=r"'dept' of connector 'mlp'.*depth, activation; did you mean 'depth'"
    ):
        find_connector("mlp").settle({"dept": 3})
    for name in ("linear", "mlp2x_gelu"):
        with pytest.raises(ValueError, match=f"connector '{name}': it takes none"):
            find_connector(name).settle({"depth": 3})


@pytest.mark.parametrize("value", ["2", 2.0, True, None])
def test_an_option_of_another_type_is_refused(value):
    with pytest.raises(ValueError, match="option 'ratio' of connector 'pixel_shuffle' must be int"):
        find_connector("pixel_shuffle").settle({"ratio": value})


@pytest.mark.parametrize(
    ("name", "option", "value", "said"),
    [
        ("pixel_shuffle", "ratio", 0, "must be 1 or more, got 0"),
        ("avg_pool", "side", -1, "must be 0 or more, got -1"),
        ("qformer", "dropout", 1.0, "must be a fraction, 0 or more and below 1, got 1.0"),
        ("qformer", "dropout", float("nan"), "must be a fraction"),
        ("qformer", "dropout", True, "must be float, got True"),
        ("qformer", "affine", 1, "must be bool, got 1"),
        ("mlp", "activation", "gleu", "one of gelu, relu, silu, tanh, got 'gleu'; did you mean 'gelu'"),
        (
            "sincos",
            "key_positions",
            "interpolate",
            "direct, interpolated, got 'interpolate'; did you mean 'interpolated'",
        ),
    ],
)
def test_a_value_that_an_option_cannot_have_is_refused(name, option, value, said):
    with pytest.raises(ValueError, match=f"option '{option}' of connector '{name}' .*{said}"):
        find_connector(name).settle({option: value})


def test_a_whole_number_may_stand_for_a_fraction():
    settled = find_connector("qformer").settle({"dropout": 0})
    assert type(settled["dropout"]) is float
    assert settled == find_connector("qformer").defaults


def test_an_unknown_connector_or_activation_names_those_there_are():
    with pytest.raises(ValueError, match=r"known: identity, linear, mlp, .*mlpNx_gelu; did you mean 'mlp'"):
        find_connector("mlp2")
    with pytest.raises(ValueError, match=r"'mof_mlp'.*here it is 'interleave'"):
        find_connector("mof_mlp")
    with pytest.raises(ValueError, match=r"'perceiver' .TinyLLaVA's. or 'sincos' .OmniLMM's and MiniCPM-V's"):
        find_connector("resampler")
    with pytest.raises(ValueError, match="unknown activation 'swish'; known: gelu"):
        CONNECTORS["mlp"](E, D, activation="swish")


def test_a_numbered_mlp_is_an_mlp_of_that_depth():
    connector = find_connector("mlp4x_gelu").build((E,), D)
    assert [type(layer).__name__ for layer in connector.proj] == ["Linear", "GELU"] * 3 + ["Linear"]
    assert find_connector("mlp4x_gelu").shrink((3, 5)) == (3, 5)
    x = noise((2, 3))
    assert torch.equal(pickle.loads(pickle.dumps(connector))(x), connector(x))
    with pytest.raises(ValueError, match="mlp0x_gelu has no layer"):
        find_connector("mlp0x_gelu")


def test_features_that_do_not_fill_their_grid_are_refused():
    with pytest.raises(
        ValueError, match=r"features of a \(2, 3\) grid must be \[items, 6, width\], got \(1, 7, 4\)"
    ):
        Features(torch.zeros(1, 7, 4), (2, 3))
