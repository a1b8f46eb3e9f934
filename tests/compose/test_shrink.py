"""Parts at toy size: the same kinds, the same proportions, and no name that nobody knows."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinymodal.compose import build
from tinymodal.compose.pretrained import read_tokenizer
from tinymodal.compose.published import LANGUAGES, TOWERS
from tinymodal.compose.shrink import image_processor, picture_tokens, scaled, shrink
from tinymodal.compose.spec import LanguageSpec, ModelSpec, VisionSpec
from tinymodal.compose.tiny import tiny_language, tiny_model, tiny_vision
from tinymodal.core.errors import CheckpointError, RecipeError

SIGLIP = "google/siglip-so400m-patch14-384"
NEXT = {"resize": "anyres", "merge": "spatial_unpad", "marks": ("newline",)}
PHI = LanguageSpec(path="microsoft/phi-2", template="phi")


def toy(folder, vision=None, language=PHI, **more):
    return shrink(ModelSpec(language=language, vision=vision), folder, **more)


@pytest.mark.parametrize("name", TOWERS)
def test_every_known_tower_is_played_by_one_of_its_kind(name, tmp_path):
    small = toy(tmp_path, VisionSpec(path=name)).spec.vision
    assert small.path is None
    assert small.config["model_type"] == TOWERS[name]["model_type"]
    assert image_processor(small).typical().tokens == 36  # 6 x 6 patches


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_known_language_model_is_played_by_one_of_its_kind(name, tmp_path):
    small = toy(tmp_path, language=LanguageSpec(path=name)).spec.language
    assert small.config["model_type"] == LANGUAGES[name]["model_type"]
    tied = LANGUAGES[name]["tie_word_embeddings"]
    assert small.config.get("tie_word_embeddings", tied) == tied


@pytest.mark.parametrize(
    ("name", "keys", "tokens"),
    [
        (SIGLIP, {}, 729),
        ("openai/clip-vit-large-patch14-336", {}, 576),
        ("openai/clip-vit-large-patch14", {"keep_class": True}, 257),
        ("openai/clip-vit-large-patch14-336", NEXT, 1176),
        ("timm/eva02_enormous_patch14_clip_224.laion2b_plus", {"size_px": 448, "connector": "sincos"}, 64),
        ("google/siglip2-base-patch16-naflex", {"resize": "native"}, 256),
        ("facebook/dinov2-large", {"connector": "pixel_shuffle", "size_px": 448}, 256),
    ],
)  # fmt: skip
def test_the_real_count_of_tokens_is_known_without_weights(name, keys, tokens):
    """Counts of docs/resolutions.md and docs/connectors.md."""
    assert picture_tokens(VisionSpec(path=name, **keys)) == tokens


def test_two_towers_are_two(tmp_path):
    names = ("openai/clip-vit-large-patch14", "facebook/dinov2-large")
    small = toy(tmp_path, VisionSpec(path=names, normalise="first", connector="interleave")).spec.vision
    assert [tower["model_type"] for tower in small.config["towers"]] == ["clip_vision_model", "dinov2"]
    assert small.config["normalise"] == "first"
    assert picture_tokens(VisionSpec(path=names, connector="interleave")) == 512


def test_a_whole_toy_has_few_parameters_and_the_recipes_choices(tmp_path):
    spec = VisionSpec(
        path=SIGLIP,
        connector="qformer",
        options={"middle": 4096},
        marks=("start", "end"),
        feature_layer=-1,
        final_norm=True,
    )
    small = toy(tmp_path, spec)
    composed = build.build(small.spec)
    assert all(part.parameters < 1_000_000 for part in build.parameter_report(composed.model))
    connector = composed.model.config.connectors["image"]
    assert (connector["name"], connector["marks"]) == ("qformer", ["start", "end"])
    assert connector["options"]["middle"] == 48, "there are two projections, as in the recipe"
    assert composed.model.config.vision_config.final_norm
    assert small.blocks == {"language": (32, 2), "vision": (27, 3), "connectors": (12, 4)}
    assert small.lines[-1] == "a picture of the tower's size: 34 tokens, here 18"


@pytest.mark.parametrize(
    ("layer", "expected"),
    [(-1, -1), (-2, -2), (-9, -4), (26, 3), (14, 2), ((-2, -5, 9), (-2, -4, 1)), (0, 0)],
)
def test_the_feature_layer_keeps_its_place(layer, expected, tmp_path):
    """Of 27 blocks, where the stand-in has 3."""
    got = toy(tmp_path, VisionSpec(path=SIGLIP, feature_layer=layer)).spec.vision.feature_layer
    assert got == expected or (layer == 26 and got == 2), "the last but one may be the last but one here"


@given(real=st.integers(1, 80), toy_blocks=st.integers(1, 6), layer=st.integers(0, 80))
def test_layers_are_renumbered_in_proportion(real, toy_blocks, layer):
    found = scaled(layer, real, toy_blocks)
    assert 0 <= found <= toy_blocks or found == 1
    assert (found == 0) == (layer == 0)
    assert scaled(layer + 1, real, toy_blocks) >= found


def test_tiles_pinpoints_and_limits_keep_their_proportions(tmp_path):
    clip = "openai/clip-vit-large-patch14-336"
    anyres = {"resize": "anyres", "pinpoints": ((336, 672), (1008, 336))}
    small = toy(tmp_path, VisionSpec(path=clip, **anyres)).spec.vision
    assert small.pinpoints == ((24, 48), (72, 24))
    slices = toy(tmp_path, VisionSpec(path=SIGLIP, resize="slices", size_px=448, max_tiles=4)).spec.vision
    assert (slices.size_px, slices.max_tiles) == (28, 4)  # 7 patches where the tower has 6
    folded = toy(
        tmp_path, VisionSpec(path=clip, connector="pixel_shuffle", options={"ratio": 4}, size_px=448)
    )
    assert folded.edge_px == folded.spec.vision.size_px == 48, "12 patches, which 4 divides"
    limits = {"resize": "native", "fit_pixels": (336 * 336, 4 * 336 * 336)}
    assert toy(tmp_path, VisionSpec(path=clip, **limits)).spec.vision.fit_pixels == (24 * 24, 48 * 48)


def test_the_tokenizer_has_the_words_that_the_templates_need(tmp_path):
    small = toy(tmp_path, templates=["plain", "v0"])
    tokenizer = read_tokenizer(small.spec.language.tokenizer, "")
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>", "as with Phi-2"
    told = tokenizer("polite answers to the user's questions. Renewable energy")["input_ids"]
    assert len(told) < 12, "the system's words are tokens, or rows would be long"
    other = toy(tmp_path, language=LanguageSpec(path="google/gemma-2b-it", template="gemma"))
    tokenizer = read_tokenizer(other.spec.language.tokenizer, "")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<pad>")


def test_a_folder_on_this_machine_says_itself_what_it_is(tmp_path):
    for name, config in (("eye", tiny_vision("dinov2")), ("words", tiny_language("gemma2"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    small = toy(
        tmp_path, VisionSpec(path=str(tmp_path / "eye")), LanguageSpec(path=str(tmp_path / "words"))
    ).spec
    assert (small.vision.config["model_type"], small.language.config["model_type"]) == ("dinov2", "gemma2")


def test_a_composed_model_is_taken_apart(tmp_path):
    whole = tiny_model(
        "clip_vision_model",
        "perceiver",
        "qwen2",
        options={"num_queries": 4},
        sight={"resize": "anyres", "marks": ("start",)},
    )
    build.save(whole, tmp_path / "run" / "model")
    small = shrink(ModelSpec(path=str(tmp_path / "run")), tmp_path / "toy").spec
    assert small.path is None
    assert (small.vision.config["model_type"], small.vision.connector) == ("clip_vision_model", "perceiver")
    assert (small.vision.resize, small.vision.marks) == ("anyres", ("start",))
    assert small.vision.options["num_queries"] == 4
    assert small.language.config["model_type"] == "qwen2"
    assert build.build(small).encoder.template.name == "chatml"


def test_a_model_that_only_reads_stays_blind(tmp_path):
    small = toy(tmp_path)
    assert small.spec.vision is None
    assert small.edge_px == 0


def test_a_name_that_nobody_knows_is_told_with_the_nearest(tmp_path):
    with pytest.raises(RecipeError, match=r"model.vision.path: .*did you mean 'google/siglip-so400m"):
        toy(tmp_path, VisionSpec(path="google/siglip-so400-patch14-384"))
    with pytest.raises(RecipeError, match=r"model.language.path: .*did you mean 'microsoft/phi-2'"):
        toy(tmp_path, language=LanguageSpec(path="microsoft/phi2"))
    with pytest.raises(RecipeError, match="no recipe beside this one makes it"):
        shrink(ModelSpec(path="runs/nowhere"), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="not a composed one"):
        shrink(ModelSpec(path=str(tmp_path)), tmp_path)


def test_what_another_recipe_will_make_is_taken_from_it(tmp_path):
    made = {"runs/a/words": PHI, "runs/a/eye": VisionSpec(path=SIGLIP), "runs/a": ModelSpec(language=PHI)}
    small = toy(
        tmp_path,
        VisionSpec(path="runs/a/eye", connector="linear"),
        LanguageSpec(path="runs/a/words", template="phi"),
        made=made.get,
    ).spec
    assert (small.vision.config["model_type"], small.vision.connector) == ("siglip_vision_model", "linear")
    assert small.language.config["model_type"] == "phi"
    assert shrink(ModelSpec(path="runs/a"), tmp_path, made=made.get).spec.language.template == "phi"


def test_the_tokenizers_own_template_needs_the_tokenizer(tmp_path):
    with pytest.raises(RecipeError, match="template 'tokenizer' is the tokenizer's own"):
        toy(tmp_path, language=LanguageSpec(path="microsoft/phi-2", template="tokenizer"))


def test_parts_that_do_not_fit_are_refused_as_at_full_size(tmp_path):
    with pytest.raises(RecipeError, match="27 x 27"):
        toy(tmp_path, VisionSpec(path=SIGLIP, connector="pixel_shuffle"))


CLIP_L = "openai/clip-vit-large-patch14-336"


def new(kind, **values):
    return LanguageSpec(config={**values, "model_type": kind}, tokenizer="none")


def test_a_kind_of_language_model_that_nobody_knows_is_told_in_one_line(tmp_path):
    with pytest.raises(RecipeError, match=r"model.language.config: .*'lama'; did you mean 'llama'\?$"):
        toy(tmp_path, language=new("lama"))
    for config, says in (({"model_type": "gptt"}, "'gptt'; did you mean 'gpt"), ({"a": 1}, "no model_type")):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(RecipeError, match=rf"model.language.path: .*{says}"):
            toy(tmp_path, language=LanguageSpec(path=str(tmp_path)))


@pytest.mark.parametrize("layer", [-99, (-2, 40), 25])
def test_a_layer_that_the_real_tower_lacks_is_refused(layer, tmp_path):
    with pytest.raises(RecipeError, match=r"model.vision: feature_layer .* a tower of 24 blocks"):
        toy(tmp_path, VisionSpec(path=CLIP_L, feature_layer=layer))


def test_timm_gives_no_embedding(tmp_path):
    name = "timm/eva_giant_patch14_clip_224.laion400m_s11b_b41k"
    with pytest.raises(RecipeError, match="feature_layer 0 asks for the embedding"):
        toy(tmp_path, VisionSpec(path=name, feature_layer=0))


def test_a_connector_that_cannot_be_built_at_its_real_size_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"model.vision: .*100"):
        toy(tmp_path, VisionSpec(path=CLIP_L, connector="qformer", options={"width": 100, "num_heads": 12}))
    wide = {**tiny_vision("dinov2"), "hidden_size": 64}
    with pytest.raises(RecipeError, match=r"'identity' needs a tower as wide .* got 64 and 96"):
        toy(tmp_path, VisionSpec(config=wide, connector="identity"), new("llama", hidden_size=96))


def test_a_connector_must_lie_somewhere_or_be_made(tmp_path):
    eye = VisionSpec(path=CLIP_L, connector_path="runs/other")
    with pytest.raises(RecipeError, match=r"model.vision.connector_path: runs/other: there is no"):
        toy(tmp_path, eye)
    made = {"runs/other": ModelSpec(language=PHI)}
    assert toy(tmp_path, eye, made=made.get).spec.vision.connector_path is None


def test_keys_that_the_family_lacks_are_refused_as_at_full_size(tmp_path):
    with pytest.raises(RecipeError, match=r"model.language.config: unknown key 'hiden_size'"):
        toy(tmp_path, language=new("llama", hiden_size=8))
    with pytest.raises(RecipeError, match=r"model.vision.config: unknown key 'hiden_size'"):
        toy(tmp_path, VisionSpec(config={**tiny_vision("dinov2"), "hiden_size": 8}))


def test_the_worst_picture_is_told(tmp_path):
    found = toy(tmp_path, VisionSpec(path=SIGLIP, resize="tiles"))
    assert found.tokens == (729, 13 * 729), "one tile, or twelve and the whole"
    assert found.lines[-1].endswith("of any size: 729 to 9,477 tokens")
    assert toy(tmp_path, VisionSpec(path=SIGLIP)).tokens == (729, 729)


def test_a_stop_that_the_real_tokenizer_must_have_is_told(tmp_path):
    (line,) = [line for line in toy(tmp_path).lines if line.startswith("tokenizer")]
    assert line == ("tokenizer: a new one, given '<|endoftext|>' for the template; the real one must have it")
    chatml = LanguageSpec(path="microsoft/phi-2", template="chatml")
    assert len(toy(tmp_path, language=chatml).lines) == 1


def test_a_tower_in_stages_has_its_own_edge_and_stride(tmp_path):
    config = {**tiny_vision("convnext"), "image_size": 224}
    for connector, size_px, edge_px in (("mlp", 224, 32), ("pixel_shuffle", 256, 64)):
        eye = VisionSpec(config=config, connector=connector, feature_layer=-1, size_px=size_px)
        small = toy(tmp_path, eye)
        assert small.edge_px == edge_px
        assert build.build(small.spec).encoder


def test_an_unknown_part_is_told_without_a_wall_of_names(tmp_path):
    with pytest.raises(RecipeError, match=rf"model.language.path: '{SIGLIP}' is a tower"):
        toy(tmp_path, language=LanguageSpec(path=SIGLIP))
    with pytest.raises(RecipeError, match=r"docs/published-recipes.md does not list it") as caught:
        toy(tmp_path, VisionSpec(path="someone/something"))
    assert "did you mean" not in str(caught.value)
    assert "TinyLlama" not in str(caught.value)


def test_the_page_lists_every_known_name():
    page = (Path(__file__).resolve().parents[2] / "docs" / "published-recipes.md").read_text("utf-8")
    assert [name for name in (*TOWERS, *LANGUAGES) if f"`{name}`" not in page] == []
