"""After a step exactly what was to train has moved: what is an error, and what may wait."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tinymodal.compose import build
from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import RecipeError
from tinymodal.train import adapters
from tinymodal.train import stage as one_stage
from tinymodal.train.groups import trainable
from tinymodal.train.loop import run
from tinymodal.train.objective import Objective
from tinymodal.train.optim import build_optimizer, set_rates
from tinymodal.train.recipe import Lora
from tinymodal.train.step import step
from tinymodal.train.watch import Watch, checksums, fingerprint

from .talk import WORDS


class Trial:
    """A model, its optimizer and a watch over both."""

    def __init__(self, composed, stage, train, only=None, lora=None, rate=1.0) -> None:
        names = [] if lora is None else adapters.inject(composed.model, lora)
        groups = trainable(composed.model, train, only=only, adapted=names)
        self.model, self.objective = composed.model, Objective(composed.model)
        self.optimizer = build_optimizer(groups, stage)
        set_rates(self.optimizer, rate)
        self.watch = Watch(composed.model, None, self.optimizer)
        self.done = 0

    def take(self, batch) -> str:
        step(self.objective, self.optimizer, [batch])
        self.done += 1
        return self.watch.after(self.done, batch.pixel_values is not None)


@pytest.fixture
def trial(tiny, stage):
    return lambda train, **options: Trial(tiny, stage, train, **options)


def test_a_step_that_changes_what_it_should_and_nothing_else_is_told_so(trial, tiny, batches):
    told = trial({"connectors": 1e-2}).take(batches(tiny, 1)[0])
    assert told == (
        "after step 1: 6 of 6 tensors that train have moved, 0 wait for a gradient, "
        "none of the 56 frozen ones moved"
    )


def test_a_frozen_tensor_that_moves_by_one_bit_is_named(trial, tiny, batches):
    trying = trial({"connectors": 1e-2})
    norm = tiny.model.model.language_model.norm.weight
    one = norm.data[3:4]
    one.copy_(torch.nextafter(one, one + 1))
    with pytest.raises(RecipeError) as caught:
        trying.take(batches(tiny, 1)[0])
    assert "after step 1, of 62 tensors 1 moved that are frozen: model.language_model.norm.weight" in str(
        caught.value
    )


def test_a_running_mean_of_a_frozen_part_that_drifts_is_named(tiny, stage, batches):
    tower = tiny.model.model.towers["image"]
    tower.add_module("stem", nn.BatchNorm2d(3))
    trying = Trial(tiny, stage, {"connectors": 1e-2})
    tower.stem.train()
    tower.register_forward_pre_hook(lambda module, args: (module.stem(args[0]),))
    with pytest.raises(
        RecipeError, match=r"3 moved that are frozen: model\.towers\.image\.stem\.running_mean"
    ):
        trying.take(batches(tiny, 1)[0])


def test_a_tensor_that_trains_but_stands_in_no_path_is_named(tiny, stage, batches):
    """LLaVA's resampler and MiniCPM's: told to train, and never reached."""
    tiny.model.model.connectors["image"].add_module("unused", nn.Linear(4, 4))
    trying = Trial(tiny, stage, {"connectors": 1e-2})
    with pytest.raises(RecipeError) as caught:
        trying.take(batches(tiny, 1)[0])
    assert "2 train but no gradient reaches them: model.connectors.image.unused.weight" in str(caught.value)


def test_a_tensor_that_the_optimizer_forgets_is_named(trial, tiny, batches):
    trying = trial({"connectors": 1e-2})
    kept = trying.optimizer.param_groups[0]["params"]
    del kept[0]
    with pytest.raises(RecipeError, match=r"1 train and have a gradient but did not move: model\."):
        trying.take(batches(tiny, 1)[0])


def test_a_step_without_pictures_may_leave_towers_and_connectors_for_later(trial, tiny, batches):
    trying = trial({"connectors": 1e-2, "vision": 1e-2, "language": 1e-2})
    words, pictures = batches(tiny, 1, pictures=False)[0], batches(tiny, 1)[0]
    assert "wait for a gradient" in trying.take(words)
    assert {name.split(".")[1] for name in trying.watch.waiting} == {"connectors", "towers"}
    assert trying.take(words)  # step 2
    assert trying.take(words) == ""
    assert trying.take(words)  # step 4
    assert trying.take(pictures)  # the first pictures, so it looks at once
    assert trying.watch.waiting == ()


def test_of_an_adapter_a_waits_for_b(trial, tiny, batches):
    trying = trial({"adapters": 1e-2}, lora=Lora(rank=2, dropout=0.0))
    batch = batches(tiny, 1)[0]
    trying.take(batch)
    assert all("lora_A" in name for name in trying.watch.waiting)
    assert len(trying.watch.waiting) == 14
    trying.take(batch)
    assert trying.watch.waiting == ()


def test_a_step_too_small_for_float32_is_no_error(trial, tiny, batches):
    # A weight of 1.0 does not move by 1e-9; its matrix beside it, 1000 times smaller, does.
    trying = trial({"connectors": 1e-2, "language": 1e-2}, only={"language": "norms"}, rate=1e-7)
    trying.take(batches(tiny, 1)[0])
    assert any("norm" in name for name in trying.watch.waiting)


def test_marks_may_stand_in_no_picture_of_a_step(tiny, stage, batches):
    tiny.model.model.marks = nn.ModuleDict({"image": nn.Embedding(3, 32)})
    trying = Trial(tiny, stage, {"connectors": 1e-2})
    trying.take(batches(tiny, 1)[0])
    assert trying.watch.waiting == ("model.marks.image.weight",)


def test_rows_of_the_embeddings_that_no_text_uses_do_not_move(trial, tiny, batches):
    trying = trial({"embeddings": 1e-2})
    batch = batches(tiny, 1)[0]
    table = tiny.model.get_input_embeddings().weight
    before = table.detach().clone()
    trying.take(batch)
    rows = (table != before).any(1).nonzero().flatten().tolist()
    assert set(rows) <= set(batch.input_ids.unique().tolist())
    assert rows


def test_any_one_bit_changes_the_checksum_whatever_the_type():
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.bool):
        tensor = torch.zeros(5, 3).to(dtype)
        # Fifteen numbers, and eight that begin in the middle of the memory.
        for part in (tensor, tensor.flatten()[4:12]):
            before = checksums({"a": part.clone()})
            assert checksums({"a": part}) == before
            tensor[2, 1] = 1 - tensor[2, 1].to(torch.int8)
            assert checksums({"a": part}) != before
    nans = torch.full((4,), float("nan"))
    assert checksums({"a": nans}) == checksums({"a": nans.clone()})


def test_the_fingerprint_is_of_the_numbers_and_the_names(tiny, tmp_path):
    build.save(tiny, tmp_path / "model")
    assert fingerprint(build.load(tmp_path / "model").model) == fingerprint(tiny.model)
    assert fingerprint(tiny_model(words=WORDS, seed=1).model) != fingerprint(tiny.model)


def test_a_run_stops_after_its_first_step_and_saves_nothing_where_a_frozen_part_moves(
    recipe, tmp_path, monkeypatch
):
    real = one_stage.step

    def meddle(objective, *rest, **options):
        report = real(objective, *rest, **options)
        with torch.no_grad():
            objective.model.model.language_model.norm.weight[0] += 1
        return report

    monkeypatch.setattr(one_stage, "step", meddle)
    with pytest.raises(RecipeError) as caught:
        run(recipe(train={"connectors": 1e-3}), tmp_path / "run", progress=False)
    told = str(caught.value)
    assert told.startswith("stages.only: after step 1, of 62 tensors 1 moved that are frozen: model.language")
    assert "\n" not in told
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_stops_at_a_stages_end_where_a_frozen_part_moved_later(recipe, tmp_path, monkeypatch):
    real, seen = one_stage.step, []

    def meddle(objective, *rest, **options):
        report = real(objective, *rest, **options)
        seen.append(report)
        if len(seen) == 3:
            with torch.no_grad():
                objective.model.model.language_model.norm.weight[0] += 1
        return report

    monkeypatch.setattr(one_stage, "step", meddle)
    with pytest.raises(RecipeError, match=r"stages\.only: at the end, of 56 tensors 1 moved"):
        run(recipe(train={"connectors": 1e-3}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "model").exists()


def test_steps_of_one_size_up_and_down_do_not_cancel_in_the_checksum():
    """AdamW's first steps have the size of the rate; a norm's numbers lie close together."""
    before = torch.full((8,), 1.5)
    after = before + 2**-12 * torch.tensor([1.0, -1.0] * 4)
    assert checksums({"norm": before}) != checksums({"norm": after})
