"""The model: what is true of every training and every reply."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from tinymodal.model.configuration_tinymodal import TinyModalConfig
from tinymodal.model.modeling_tinymodal import TinyModalForConditionalGeneration, TinyModalModel

IMAGE, VOCABULARY, GRID = 5, 96, 3
TOKENS = GRID * GRID
"""Of one picture: 24 px, patches of 4 px, folded 2 x 2."""

TEXT = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 4,
}
TOWER = {"model_type": "tinymodal_tower", "image_size": 24, "channels": [8, 32], "residual_convs": [0, 1]}


def build(
    text: dict | None = None, vision: dict | None = VISION, seed: int = 0
) -> TinyModalForConditionalGeneration:
    """A random model whose pictures matter: logits move by more than 0.1 when one is swapped."""
    torch.manual_seed(seed)
    config = TinyModalConfig(
        text_config={**TEXT, **(text or {})},
        vision_config=vision,
        connectors={"image": {"name": "pixel_shuffle"}} if vision else None,
        image_token_id=IMAGE,
    )
    model = TinyModalForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture(scope="module")
def model() -> TinyModalForConditionalGeneration:
    return build()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def words(n: int, seed: int = 0) -> list[int]:
    return torch.randint(6, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


PLACE = [IMAGE] * TOKENS
ONE = words(3, 1) + PLACE + words(4, 2)
TWO = PLACE + words(2, 3) + PLACE + words(5, 4)
NONE = words(8, 5)


def row(*documents: list[int]) -> Tensor:
    return torch.tensor([[token for document in documents for token in document]])


def logits(model: TinyModalForConditionalGeneration, ids: Tensor, **inputs: object) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


# ---- media find their places


def test_each_placeholder_holds_its_own_embedding_in_reading_order(model, pictures):
    ids = row(TWO)
    with torch.no_grad():
        media = model.model.media_input("image", pictures[:2], None, None, ids)
        embedded = model.model.embed(ids, {"image": media})
        expected = model.get_input_embeddings()(ids).clone()
        expected[ids == IMAGE] = model.model.get_image_features(pictures[:2]).flatten(0, 1)
    assert torch.equal(embedded, expected)


def test_swapping_two_pictures_swaps_what_is_said_about_them(model, pictures):
    """Two rows of the same words about two pictures."""
    ids = row(ONE).repeat(2, 1)
    straight, swapped = (logits(model, ids, pixel_values=pictures[[a, b]]) for a, b in ((0, 1), (1, 0)))
    torch.testing.assert_close(straight.flip(0), swapped, rtol=0, atol=1e-5)
    assert (straight - swapped).abs().max() > 0.1


def test_given_places_equal_found_ones(model, pictures):
    ids = row(TWO)
    put = (ids.flatten() == IMAGE).nonzero().squeeze(1)
    given = logits(model, ids, pixel_values=pictures[:2], image_take=torch.arange(len(put)), image_put=put)
    assert torch.equal(given, logits(model, ids, pixel_values=pictures[:2]))


def test_pictures_that_are_never_taken_change_nothing(model, pictures):
    """A batch may carry a dummy so that every rank runs its tower."""
    ids = row(ONE)
    put = (ids.flatten() == IMAGE).nonzero().squeeze(1)
    take = torch.arange(TOKENS)
    with_dummy = logits(model, ids, pixel_values=pictures[:2], image_take=take, image_put=put)
    torch.testing.assert_close(with_dummy, logits(model, ids, pixel_values=pictures[:1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_pictures_than_places_is_refused(model, pictures, count):
    with pytest.raises(ValueError, match=rf"18 placeholders \(token 5\) but {count} images of 9 embeddings"):
        logits(model, row(TWO), pixel_values=pictures[:count])


def test_places_without_pictures_and_pictures_without_places_are_refused(model, pictures):
    with pytest.raises(ValueError, match=r"9 placeholders .* but no pixel_values"):
        logits(model, row(ONE))
    with pytest.raises(ValueError, match="0 placeholders"):
        logits(model, row(NONE), pixel_values=pictures[:1])
    with pytest.raises(ValueError, match="this model has no image tower"):
        logits(build(vision=None), row(ONE), pixel_values=pictures[:1])


def test_inputs_that_contradict_each_other_are_refused(model, pictures):
    ids = row(ONE)
    with pytest.raises(ValueError, match="one of the two"):
        model(input_ids=ids, inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="pixel_values need input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32), pixel_values=pictures[:1])
    with pytest.raises(ValueError, match="image_put needs image_take"):
        model(input_ids=ids, pixel_values=pictures[:1], image_put=torch.arange(9))
    with pytest.raises(ValueError, match=r"9 placeholders .* image_take names 8 embeddings"):
        model(input_ids=ids, pixel_values=pictures[:1], image_take=torch.arange(8))


def test_a_model_without_tower_reads_text():
    blind = build(vision=None)
    assert not list(blind.model.towers.parameters())
    assert logits(blind, row(NONE)).shape == (1, len(NONE), VOCABULARY)


# ---- packing


def test_packed_documents_do_not_see_each_other(model, pictures):
    """Packing is only a layout: a row of three documents gives each the logits it has alone."""
    ids = row(ONE, TWO, NONE)
    places = torch.cat([torch.arange(len(d)) for d in (ONE, TWO, NONE)])[None]
    packed = logits(model, ids, pixel_values=pictures, position_ids=places)[0]
    alone = [
        logits(model, row(ONE), pixel_values=pictures[:1])[0],
        logits(model, row(TWO), pixel_values=pictures[1:])[0],
        logits(model, row(NONE))[0],
    ]
    # 4.8e-7 on sdpa with transformers 5.23; without restarting positions 2.3.
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-5)
    leaking = logits(model, ids, pixel_values=pictures)[0]
    assert (leaking - packed).abs().max() > 0.1


def test_packing_holds_in_training_and_without_being_told_about_the_cache(model, pictures):
    """transformers makes a cache by default, and with one it forgets the borders."""
    model = copy.deepcopy(model).train()
    places = torch.cat([torch.arange(len(d)) for d in (ONE, NONE)])[None]
    out = model(input_ids=row(ONE, NONE), pixel_values=pictures[:1], position_ids=places)
    assert out.past_key_values is None
    torch.testing.assert_close(out.logits[0, len(ONE) :], logits(model, row(NONE))[0], rtol=0, atol=1e-5)


# ---- generating


def naive(model: TinyModalForConditionalGeneration, ids: Tensor, steps: int, **inputs: Tensor) -> list[int]:
    """The whole text again for every word."""
    for _ in range(steps):
        ids = torch.cat([ids, logits(model, ids, **inputs)[:, -1:].argmax(-1)], 1)
    return ids[0, -steps:].tolist()


GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}


@pytest.mark.parametrize("text", [{}, {"model_type": "gemma2", "head_dim": 8}, {"model_type": "phi"}])
@pytest.mark.parametrize("vision", [VISION, TOWER], ids=["siglip", "own"])
def test_greedy_generation_equals_naive_decoding(text, vision, pictures):
    model = build(text, vision)
    # The end is forbidden for six words on both sides.
    model.generation_config.eos_token_id = None
    for ids, values in ((row(ONE), pictures[:1]), (row(TWO), pictures[1:]), (row(NONE), None)):
        inputs = {} if values is None else {"pixel_values": values}
        options = {k: v for k, v in GREEDY.items() if k != "min_new_tokens"}
        made = model.generate(ids, **inputs, **options)[0, ids.shape[1] :].tolist()
        assert made == naive(model, ids, 6, **inputs)
        without_cache = model.generate(ids, **inputs, **options, use_cache=False)[0, ids.shape[1] :].tolist()
        assert made == without_cache


def padded(*documents: list[int]) -> dict[str, Tensor]:
    longest = max(map(len, documents))
    ids = torch.tensor([[0] * (longest - len(d)) + d for d in documents])
    mask = torch.tensor([[0] * (longest - len(d)) + [1] * len(d) for d in documents])
    return {"input_ids": ids, "attention_mask": mask}


def test_a_batch_padded_on_the_left_equals_its_members_one_by_one(model, pictures):
    batch = padded(ONE, TWO, NONE)
    together = model.generate(**batch, pixel_values=pictures, **GREEDY)[:, batch["input_ids"].shape[1] :]
    single = [
        model.generate(row(ONE), pixel_values=pictures[:1], **GREEDY)[0, len(ONE) :],
        model.generate(row(TWO), pixel_values=pictures[1:], **GREEDY)[0, len(TWO) :],
        model.generate(row(NONE), **GREEDY)[0, len(NONE) :],
    ]
    assert together.tolist() == [s.tolist() for s in single]
    last = logits(model, batch["input_ids"], pixel_values=pictures, attention_mask=batch["attention_mask"])[
        :, -1
    ]
    alone = logits(model, row(TWO), pixel_values=pictures[1:])[0, -1]
    torch.testing.assert_close(last[1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_beams_of_a_row_with_two_pictures_see_both_in_order(model, pictures, options):
    """Repeated as rows are, pictures a, b would become a, a, b, b, and the second beam would see b twice."""
    ids = row(TWO)
    made = model.generate(ids, pixel_values=pictures[:2], **GREEDY, **options)
    with torch.no_grad():
        media = model.model.media_input("image", pictures[:2], None, None, ids)
        embedded = model.model.embed(ids, {"image": media})
    from_embeddings = model.generate(inputs_embeds=embedded, **GREEDY, **options)
    assert made[:, ids.shape[1] :].tolist() == from_embeddings.tolist()


# ---- heads, loss, embeddings


def test_logits_to_keep_are_the_last_ones(model):
    full = logits(model, row(NONE))
    torch.testing.assert_close(logits(model, row(NONE), logits_to_keep=2), full[:, -2:], rtol=0, atol=1e-5)
    chosen = torch.tensor([0, 3])
    torch.testing.assert_close(
        logits(model, row(NONE), logits_to_keep=chosen), full[:, chosen], rtol=0, atol=1e-5
    )


def test_the_loss_is_the_mean_over_targets(model, pictures):
    ids = row(ONE)
    labels = ids.clone()
    labels[:, :-4] = -100
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pictures[:1], labels=labels)
    each = torch.nn.functional.cross_entropy(out.logits[0, -5:-1], ids[0, -4:], reduction="none")
    torch.testing.assert_close(out.loss, each.mean())


def test_a_tuple_is_returned_on_request(model):
    with torch.no_grad():
        out = model(input_ids=row(NONE), return_dict=False)
    assert isinstance(out, tuple)
    assert torch.equal(out[0], logits(model, row(NONE)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_new_words_get_rows_in_embedding_and_head_and_old_words_keep_theirs(tied, kind, tmp_path):
    sizes = {"model_type": kind, "n_embd": 32, "n_layer": 2, "n_head": 4} if kind == "gpt2" else {}
    model = build({**sizes, "tie_word_embeddings": tied})
    before = logits(model, row(NONE))
    model.resize_token_embeddings(VOCABULARY + 7)
    assert model.get_input_embeddings().num_embeddings == VOCABULARY + 7
    assert model.head_weight().shape[0] == VOCABULARY + 7
    assert model.config.text_config.vocab_size == VOCABULARY + 7
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    torch.testing.assert_close(logits(model, row(NONE))[..., :VOCABULARY], before, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = TinyModalForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, row(NONE)), logits(model, row(NONE)))


# ---- building, saving, precision


@pytest.mark.parametrize("vision", [VISION, TOWER, None], ids=["siglip", "own", "blind"])
def test_a_saved_model_is_the_same_model(vision, tmp_path, pictures):
    model = build(vision=vision)
    model.save_pretrained(tmp_path)
    again, info = TinyModalForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = {"pixel_values": pictures[:1]} if vision else {}
    ids = row(ONE if vision else NONE)
    assert torch.equal(logits(again.eval(), ids, **inputs), logits(model, ids, **inputs))
    core = TinyModalModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        states = core(input_ids=ids, **inputs).last_hidden_state
        assert torch.equal(states, model.model(input_ids=ids, **inputs).last_hidden_state)


@pytest.mark.parametrize("vision", [VISION, TOWER], ids=["siglip", "own"])
def test_building_twice_from_one_seed_gives_one_model_and_initial_weights_are_sane(vision):
    config = TinyModalConfig(text_config=TEXT, vision_config=vision, image_token_id=IMAGE)
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(TinyModalForConditionalGeneration(copy.deepcopy(config)))
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two), name
        assert one.isfinite().all(), name
    connector = models[0].model.connectors["image"].proj[0].weight
    # torch's own start for a linear layer is uniform within 1 / sqrt(32), which has this deviation.
    assert abs(float(connector.detach().std()) - 32**-0.5 / 3**0.5) < 0.01


def test_one_data_type_for_all_parts_whatever_they_were_saved_in():
    model = build({"dtype": "bfloat16"}, {**VISION, "dtype": "float16"})
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_bfloat16_reads_float32_pictures_and_stays_close(model, pictures, tmp_path):
    model.save_pretrained(tmp_path / "full")
    half = TinyModalForConditionalGeneration.from_pretrained(tmp_path / "full", dtype=torch.bfloat16).eval()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    out = logits(half, row(ONE), pixel_values=pictures[:1])
    assert out.dtype == torch.bfloat16
    full = logits(model, row(ONE), pixel_values=pictures[:1])
    # Eight bits of mantissa through four blocks: 0.004 on average, of logits with deviation 0.54.
    assert (out.float() - full).abs().mean() < 0.03
    half.save_pretrained(tmp_path / "half")
    again = TinyModalForConditionalGeneration.from_pretrained(tmp_path / "half", dtype=torch.bfloat16).eval()
    assert torch.equal(logits(again, row(ONE), pixel_values=pictures[:1]), out)


def parts_attention(model: TinyModalForConditionalGeneration) -> set[str | None]:
    tower, language = model.model.towers["image"], model.model.language_model
    return {tower.module.config._attn_implementation, language.config._attn_implementation}


def test_the_choice_of_attention_reaches_tower_and_language_model(model, pictures, tmp_path):
    assert parts_attention(model) == {"sdpa"}
    model.save_pretrained(tmp_path)
    eager = TinyModalForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert parts_attention(eager) == {"eager"}
    expected = logits(model, row(ONE), pixel_values=pictures[:1])
    torch.testing.assert_close(
        logits(eager, row(ONE), pixel_values=pictures[:1]), expected, rtol=0, atol=1e-5
    )
    eager.set_attn_implementation({"vision_config": "sdpa"})
    assert eager.model.towers["image"].module.config._attn_implementation == "sdpa"
    assert eager.model.language_model.config._attn_implementation == "eager"
    eager.set_attn_implementation("sdpa")
    assert parts_attention(eager) == {"sdpa"}
    flex = TinyModalForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flex_attention")
    assert parts_attention(flex) == {"flex_attention"}


def test_packing_is_exact_with_eager_attention_too(model, pictures):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    places = torch.cat([torch.arange(len(d)) for d in (ONE, NONE)])[None]
    packed = logits(eager, row(ONE, NONE), pixel_values=pictures[:1], position_ids=places)
    torch.testing.assert_close(packed[0, len(ONE) :], logits(eager, row(NONE))[0], rtol=0, atol=1e-5)


# The name this project asks for; transformers 5.23 would rather hear activation_checkpointing_enable.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("vision", [VISION, TOWER], ids=["siglip", "own"])
def test_gradient_checkpointing_gives_the_same_gradients(vision, pictures):
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = build(vision=vision).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=row(ONE), pixel_values=pictures[:1], labels=row(ONE)).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert gradient is not None, name
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=1e-6)


def test_a_frozen_tower_makes_no_graph(model, pictures):
    model = copy.deepcopy(model)
    model.requires_grad_(False)
    model.model.connectors.requires_grad_(True)
    features = model.model.towers["image"](pictures[:1])
    assert not features.values.requires_grad
    model(input_ids=row(ONE), pixel_values=pictures[:1], labels=row(ONE)).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".connectors." in name}


# ---- config


def test_a_config_survives_json_with_all_options_spelled_out(tmp_path):
    config = build().config
    config.save_pretrained(tmp_path)
    again = TinyModalConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.connectors["image"]["options"] == {"ratio": 2, "depth": 2, "activation": "gelu"}
    assert isinstance(again.vision_config, PreTrainedConfig)
    assert again.get_text_config() is again.text_config


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"vision_config": VISION, "connectors": {"image": {"name": "mpl"}}}, "did you mean 'mlp'"),
        (
            {"vision_config": VISION, "connectors": {"audio": {"name": "mlp"}}},
            "named by medium, here 'image'",
        ),
        ({"connectors": {"image": {"name": "mlp"}}}, "but no tower"),
        ({"text_config": {"model_type": "lama"}}, "no language model of model_type 'lama'"),
        ({"vision_config": {"model_type": "siglip_vison_model"}}, "did you mean 'siglip_vision_model'"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(values, found):
    with pytest.raises(ValueError, match=found):
        TinyModalConfig(**values)


def test_a_connector_that_cannot_fold_the_grid_is_refused_when_the_tokens_are_counted(pictures):
    config = TinyModalConfig(
        text_config=TEXT,
        vision_config=VISION,
        connectors={"image": {"name": "pixel_shuffle", "options": {"ratio": 4}}},
        image_token_id=IMAGE,
    )
    with pytest.raises(ValueError, match="ratio 4 needs a grid divisible by 4, got 6 x 6 patches"):
        TinyModalForConditionalGeneration(config)(input_ids=row(ONE), pixel_values=pictures[:1])
