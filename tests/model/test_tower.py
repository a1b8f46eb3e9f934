"""Our own towers: what they compute for a picture depends on that picture and nothing else."""

import pytest
import torch

from tinymodal.model.tower import ConvTower, ConvTowerConfig, WrittenTower, WrittenTowerConfig

SMALL = {"image_size": 24, "channels": (8, 16), "residual_convs": (0, 1), "num_hidden_layers": 2}


def test_a_picture_has_the_same_features_alone_and_in_company():
    """Norms over groups of channels, not over the batch: else packing would change what a model sees."""
    torch.manual_seed(0)
    tower = ConvTower.build(ConvTowerConfig(**SMALL)).train()
    pictures = torch.randn(5, 3, 24, 24)
    together = tower(pictures)
    assert together.grid == (6, 6)
    for i in range(5):
        # 4e-7 measured: other block sizes of the same convolution.
        torch.testing.assert_close(
            tower(pictures[i : i + 1]).values[0], together.values[i], rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(("layer", "blocks"), [(0, 0), (1, 1), (-1, 2), (-2, 1), (2, 2)])
def test_only_the_blocks_that_are_read_are_built(layer, blocks):
    assert len(ConvTower.build(ConvTowerConfig(**SMALL), layer).blocks) == blocks


def test_a_layer_it_does_not_have_is_refused():
    with pytest.raises(ValueError, match="3 hidden states, 0 to 2"):
        ConvTower.build(ConvTowerConfig(**SMALL), 3)


@pytest.mark.parametrize("edge", [25, 26, 27])
def test_a_picture_that_the_stages_do_not_halve_evenly_is_refused(edge):
    """A padded stride rounds up where a count of patches rounds down; the two may not differ."""
    config = ConvTowerConfig(**{**SMALL, "image_size": edge})
    with pytest.raises(ValueError, match="take 24 or 28"):
        ConvTower.grid(config, (edge, edge))


def test_a_written_scene_is_the_sum_of_its_codes_and_its_place():
    tower = WrittenTower.build(WrittenTowerConfig(image_size=2, num_codes=8, hidden_size=4))
    codes = torch.tensor([[[1, 0], [0, 0]], [[2, 0], [0, 0]], [[3, 0], [0, 7]]])
    features = tower((codes / 255)[None])
    expected = tower.codes.weight[[1, 8 + 2, 16 + 3]].sum(0) + tower.positions[0, 0]
    torch.testing.assert_close(features.values[0, 0], expected)
    assert features.grid == (2, 2)


def test_noise_is_there_in_training_only():
    tower = WrittenTower.build(WrittenTowerConfig(hidden_size=8, noise=0.3))
    values = torch.zeros(1, 3, 3, 3)
    assert not torch.equal(tower.train()(values).values, tower(values).values)
    assert torch.equal(tower.eval()(values).values, tower(values).values)
