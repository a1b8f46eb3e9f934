"""Learned queries, by the formulas of their sources and with the names of their weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.model.test_connectors import D, E, build, close, noise, norm_by_hand
from tinymodal.model.connectors import CONNECTORS
from tinymodal.model.media import Features
from tinymodal.model.resamplers import QFormer, SinCos, sincos_table, stretch


def softmax_by_hand(scores):
    scores = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    return scores / scores.sum(-1, keepdim=True)


# Perceiver


@pytest.mark.parametrize("width", [0, 20])
def test_perceiver_is_flamingos(width):
    """Two layers of two heads, four channels each; einsum over heads, as its source writes it."""
    connector, features = build("perceiver", width=width), noise((3, 5))
    x = features.values @ connector.linear.weight.T + connector.linear.bias
    latents = connector.latents.expand(2, -1, -1)
    for attention, feed_forward in connector.layers:
        asked = norm_by_hand(latents, attention.norm_latents)
        seen = torch.cat((norm_by_hand(x, attention.norm_media), asked), dim=1)
        q = (asked @ attention.to_q.weight.T).view(2, 3, 2, 4) * 4**-0.5
        k, v = ((seen @ half.T).view(2, 18, 2, 4) for half in attention.to_kv.weight.chunk(2))
        weights = softmax_by_hand(torch.einsum("nqhc,nshc->nhqs", q, k))
        out = torch.einsum("nhqs,nshc->nqhc", weights, v).flatten(2)
        latents = latents + out @ attention.to_out.weight.T
        norm, up, _, down = feed_forward
        hidden = norm_by_hand(latents, norm) @ up.weight.T
        latents = latents + (0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))) @ down.weight.T
    out = norm_by_hand(latents, connector.norm)
    if width:
        out = out @ connector.proj.weight.T + connector.proj.bias
    close(connector(features), out)


def test_perceiver_has_the_names_of_tinyllava():
    layer = [
        *(f"0.{part}.weight" for part in ("norm_media", "norm_latents", "to_q", "to_kv", "to_out")),
        *("0.norm_media.bias", "0.norm_latents.bias", "1.0.weight", "1.0.bias", "1.1.weight", "1.3.weight"),
    ]
    with torch.device("meta"):
        state = CONNECTORS["perceiver"](E, D, num_queries=32).state_dict()
    assert set(state) == {
        *("latents", "linear.weight", "linear.bias", "norm.weight", "norm.bias"),
        *(f"layers.{index}.{key}" for index in range(3) for key in layer),
    }
    assert state["latents"].shape == (32, D)


# Sine and cosine


def table_by_numpy(rows: int, columns: int, width: int) -> np.ndarray:
    """One channel after the other, in the float32 of the source."""
    table = np.zeros((rows, columns, width), dtype=np.float32)
    quarter = width // 4
    for half in (0, 1):
        for i in range(quarter):
            frequency = np.float32(1) / np.float32(10000) ** np.float32(i / quarter)
            for row in range(rows):
                for column in range(columns):
                    angle = np.float32((column, row)[half]) * frequency
                    table[row, column, 2 * half * quarter + i] = np.sin(angle)
                    table[row, column, (2 * half + 1) * quarter + i] = np.cos(angle)
    return table.reshape(rows * columns, width)


def test_positions_tell_the_column_first_and_then_the_row():
    row_1_column_2 = sincos_table((4, 4), 8)[1 * 4 + 2]
    angles = torch.tensor([2.0, 0.02])
    expected = torch.cat((angles.sin(), angles.cos(), (angles / 2).sin(), (angles / 2).cos()))
    torch.testing.assert_close(row_1_column_2, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (70, 2)])
def test_positions_equal_the_sources_table_on_any_grid(grid):
    # 6e-8 with torch 2.13 and numpy: sine and cosine of two libraries round differently.
    torch.testing.assert_close(
        sincos_table(grid, 32), torch.from_numpy(table_by_numpy(*grid, 32)), rtol=0, atol=1e-6
    )


FORMS = {
    "omnilmm": {"key_positions": "interpolated", "query_positions": True},
    "minicpm-v 2.0": {"key_positions": "direct", "query_positions": True},
    "minicpm-v 2.5": {"key_positions": "direct", "query_positions": False},
    "learned": {"key_positions": "interpolated", "query_positions": True, "learned_positions": True},
}


@pytest.mark.parametrize("grid", [(2, 2), (3, 3), (3, 5)])
@pytest.mark.parametrize("form", FORMS)
def test_sincos_attends_with_positions_on_keys_and_not_on_values(form, grid):
    connector, features, options = build("sincos", **FORMS[form]), noise(grid), FORMS[form]
    own = torch.from_numpy(table_by_numpy(2, 2, D))
    if "learned_positions" in options:
        own = connector.pos_embed
    if options["key_positions"] == "direct":
        table = torch.from_numpy(table_by_numpy(*grid, D))
    else:
        square = own.view(2, 2, D).permute(2, 0, 1)[None]
        table = F.interpolate(square, grid, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
        table = table.reshape(-1, D)

    def norm(x, part):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        return x * part.weight + part.bias

    x = norm(features.values @ connector.kv_proj.weight.T, connector.ln_kv)
    q = norm(connector.query, connector.ln_q) + (own if options["query_positions"] else 0)
    attn = connector.attn
    (wq, wk, wv), (bq, bk, bv) = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
    q = (q @ wq.T + bq).view(4, 2, 6)
    k = ((x + table) @ wk.T + bk).unflatten(-1, (2, 6))
    v = (x @ wv.T + bv).unflatten(-1, (2, 6))
    weights = softmax_by_hand(torch.einsum("qhc,nshc->nhqs", q, k) / 6**0.5)
    out = torch.einsum("nhqs,nshc->nqhc", weights, v).flatten(2) @ attn.out_proj.weight.T + attn.out_proj.bias
    close(connector(features), norm(out, connector.ln_post) @ connector.proj)


def test_positions_stretch_as_in_omnilmm_and_stay_as_they_are_on_their_own_grid():
    table = sincos_table((8, 8), 16)
    assert stretch(table, (8, 8)) is table
    picture = table.reshape(1, 8, 8, 16).permute(0, 3, 1, 2)
    wide = F.interpolate(picture, size=(16, 16), mode="bicubic", align_corners=False)
    torch.testing.assert_close(
        stretch(table, (16, 16)), wide.permute(0, 2, 3, 1).flatten(0, 2), rtol=0, atol=0
    )


def test_sincos_sees_where_a_feature_lies_and_perceiver_does_not():
    x = torch.randn(1, 12, E)
    for name, sees in (("sincos", True), ("perceiver", False), ("qformer", False)):
        connector = build(name)
        moved = connector(Features(x, (2, 6))) - connector(Features(x, (3, 4)))
        assert bool(moved.abs().max() > 1e-3) == sees, name


def test_sincos_has_the_names_of_omnilmm():
    """Its ``pos_embed`` is computed, unless a checkpoint has trained it."""
    names = {
        *("query", "proj", "kv_proj.weight", "attn.in_proj_weight", "attn.in_proj_bias"),
        *("attn.out_proj.weight", "attn.out_proj.bias"),
        *(f"ln_{part}.{kind}" for part in ("q", "kv", "post") for kind in ("weight", "bias")),
    }
    assert set(build("sincos").state_dict()) == names
    assert set(build("sincos", **FORMS["learned"]).state_dict()) == {*names, "pos_embed"}
    assert set(SinCos(D, D, head_width=6).state_dict()) == names - {"kv_proj.weight"}


def test_a_trained_table_begins_as_the_computed_one():
    torch.manual_seed(0)
    learned, x = SinCos(E, D, 4, head_width=6, **FORMS["learned"]), noise((3, 5))
    computed = SinCos(E, D, 4, head_width=6, **FORMS["omnilmm"])
    computed.load_state_dict(learned.state_dict(), strict=False)
    assert torch.equal(learned(x), computed(x))


def test_queries_that_fill_no_square_are_refused_where_they_have_places():
    said = r"num_queries = 60 does not fill; take 49 \(what OmniLMM makes of it without a word\) or 64"
    for options in ({"query_positions": True}, {"key_positions": "interpolated"}):
        with pytest.raises(ValueError, match=said):
            SinCos.shrink((4, 4), num_queries=60, **options)
        with pytest.raises(ValueError, match=said):
            SinCos(E, D, num_queries=60, **options)
    assert SinCos.shrink((4, 4), num_queries=96) == (96,)  # MiniCPM-Llama3-V 2.5


def test_a_sincos_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="divisible by 4 and by its 7 heads of about 128, got 960"):
        SinCos(E, 960)
    with pytest.raises(ValueError, match=r"divisible by 4 .* got 14"):
        SinCos(E, 14)
    with pytest.raises(ValueError, match="learned_positions only for queries that have places"):
        SinCos.shrink((4, 4), learned_positions=True)


def test_sincos_begins_as_its_source_does():
    torch.manual_seed(0)
    connector = SinCos(96, 128, num_queries=64)
    for weight in (connector.query, connector.kv_proj.weight, connector.attn.out_proj.weight):
        assert 0.018 < weight.std() < 0.022
    assert connector.attn.in_proj_weight.abs().max() <= (6 / (4 * 128)) ** 0.5  # xavier, 3 * 128 from 128
    assert connector.proj.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert connector.attn.out_proj.bias.abs().max() == connector.attn.in_proj_bias.abs().max() == 0


# Q-Former


def hf_qformer(width=16, depth=5, heads=4, seen=E, every=2):
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    config = Blip2QFormerConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        encoder_hidden_size=seen,
        cross_attention_frequency=every,
    )
    torch.manual_seed(0)
    model = Blip2QFormerModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def from_hf(theirs, ours: QFormer) -> QFormer:
    """Our connector with their weights: nothing but prefixes to cut."""
    state = {key.removeprefix("encoder."): value for key, value in theirs.state_dict().items()}
    own = {"query_tokens", "norm.weight", "norm.bias"} | {key for key in ours.state_dict() if "proj." in key}
    missing = ours.load_state_dict(state, strict=False)
    assert set(missing.missing_keys) == own & set(ours.state_dict())
    assert missing.unexpected_keys == []
    return ours.eval()


@pytest.mark.parametrize("every", [1, 2, 3])
def test_qformer_equals_blip2s(every):
    theirs = hf_qformer(every=every)
    options = {"num_queries": 7, "depth": 5, "width": 16, "num_heads": 4, "cross_every": every}
    ours, features = from_hf(theirs, QFormer(E, D, **options)), noise((3, 5))
    seen = norm_by_hand(features.values, ours.norm)
    with torch.no_grad():
        out = theirs(ours.query_tokens.expand(2, -1, -1), encoder_hidden_states=seen).last_hidden_state
        # 7.5e-7 with transformers 5.23.
        close(ours(features), out @ ours.proj[0].weight.T + ours.proj[0].bias)


def test_tinyllavas_qformer_has_a_first_norm_without_weights_and_none_on_features():
    theirs = hf_qformer()
    with torch.no_grad():
        theirs.layernorm.weight.fill_(1.0)
        theirs.layernorm.bias.zero_()
    state = {k.removeprefix("encoder."): v for k, v in theirs.state_dict().items() if "layernorm" not in k}
    ours = QFormer(E, D, 7, depth=5, width=16, num_heads=4, norm=False, affine=False).eval()
    missing = ours.load_state_dict(state, strict=False).missing_keys
    assert set(missing) == {"query_tokens", "proj.0.weight", "proj.0.bias"}
    features = noise((3, 5))
    with torch.no_grad():
        out = theirs(
            ours.query_tokens.expand(2, -1, -1), encoder_hidden_states=features.values
        ).last_hidden_state
        close(ours(features), ours.proj(out))


def test_tinygpt_v_projects_twice():
    """768 -> 4096 -> d with nothing between; the sizes of its ``llama_proj`` and ``llama_proj2``."""
    with torch.device("meta"):
        state = QFormer(1408, 2560, middle=4096).state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items() if key.startswith("proj.")}
    assert shapes == {
        "proj.0.weight": (4096, 768),
        "proj.0.bias": (4096,),
        "proj.1.weight": (2560, 4096),
        "proj.1.bias": (2560,),
    }
    connector, features = build("qformer", middle=5), noise((2, 2))
    straight = build("qformer")
    straight.load_state_dict(
        connector.state_dict()
        | {
            "proj.0.weight": connector.proj[1].weight @ connector.proj[0].weight,
            "proj.0.bias": connector.proj[1].weight @ connector.proj[0].bias + connector.proj[1].bias,
        },
        strict=False,
    )
    close(connector(features), straight(features))


def test_qformer_looks_at_the_picture_in_every_second_block_and_has_no_text():
    with torch.device("meta"):
        connector = QFormer(1408, 4096)
    assert [layer.crossattention is not None for layer in connector.layer] == [True, False] * 6
    assert connector.query_tokens.shape == (1, 32, 768)
    assert not any("embeddings" in key or ".output.dense" in key[8:20] for key in connector.state_dict())


def test_dropout_is_off_unless_asked_for_and_outside_training():
    features = noise((3, 3))
    steady, unsteady = build("qformer"), build("qformer", dropout=0.5)
    torch.testing.assert_close(steady(features), unsteady(features))
    torch.testing.assert_close(steady.train()(features), steady(features), rtol=0, atol=0)
    assert not torch.allclose(unsteady.train()(features), unsteady(features))


def test_qformer_begins_as_bert_does():
    torch.manual_seed(0)
    connector = QFormer(E, D, 64, depth=2, width=96)
    for weight in (connector.query_tokens, connector.layer[0].attention.attention.query.weight):
        assert 0.018 < weight.std() < 0.022
    assert connector.layer[1].output_query.dense.bias.abs().max() == 0


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="got width 768 and num_heads 10"):
        QFormer(E, D, num_heads=10)
