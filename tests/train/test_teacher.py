from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tinymodal.compose.tiny import tiny_model
from tinymodal.core.errors import RecipeError
from tinymodal.train.groups import trainable
from tinymodal.train.objective import Objective
from tinymodal.train.teacher import Shelf, Teacher, documents, see_alike

from .talk import WORDS, Talk


@pytest.fixture
def larger():
    return tiny_model(words=WORDS, seed=7)


def objective_of(tiny, teacher):
    trainable(tiny.model, {"language": 1e-3, "connectors": 1e-3})
    found = Objective(tiny.model, ("distill",))
    found.teacher = teacher
    return found


def logits(composed, batch):
    objective = Objective(composed.model.eval())
    return composed.model.head(objective.states(batch)).float()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("blocks", [1, 7])
def test_the_loss_is_the_divergence_of_the_student_from_the_teacher(
    tiny, larger, batches, temperature, blocks, monkeypatch
):
    (batch,) = batches(tiny, 1)
    size = -(-batch.num_targets // blocks)
    monkeypatch.setattr("tinymodal.train.teacher.block_of", lambda states, vocabulary: size)
    vocabulary = len(tiny.model.head_weight())
    objective = objective_of(tiny, Teacher(larger, vocabulary, temperature))
    loss = objective(batch).sums["distill"]
    ours = F.log_softmax(logits(tiny, batch) / temperature, -1)
    theirs = F.log_softmax(logits(larger, batch).detach() / temperature, -1)
    expected = temperature**2 * F.kl_div(ours, theirs, reduction="sum", log_target=True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    parameters = [p for p in tiny.model.parameters() if p.requires_grad]
    got = torch.autograd.grad(loss, parameters, allow_unused=True)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(got, wanted, strict=True) if a is not None)
    assert not any(p.requires_grad for p in larger.model.parameters())


def test_the_likeliest_tokens_come_near_and_never_count_more_than_all(tiny, larger, batches):
    (batch,) = batches(tiny, 1)
    vocabulary = len(tiny.model.head_weight())
    found = []
    for top_k in (1, 8, 64, vocabulary - 1, None):
        objective = objective_of(tiny, Teacher(larger, vocabulary, top_k=top_k))
        found.append(objective(batch).sums["distill"].item())
    assert found == sorted(found)
    assert found[0] < found[2] < found[3]
    assert found[3] == pytest.approx(found[4], rel=1e-4)
    with pytest.raises(RecipeError, match="tokens in common; leave it out"):
        Teacher(larger, vocabulary, top_k=vocabulary)


def test_a_shelf_saves_the_teachers_work_and_changes_no_bit_of_the_loss(tiny, larger, batches, tmp_path):
    vocabulary = len(tiny.model.head_weight())
    several = batches(tiny, 2)
    shelf = Shelf(tmp_path, "a", 1.0, 16)
    teacher = Teacher(larger, vocabulary, top_k=16, shelf=shelf)
    objective = objective_of(tiny, teacher)
    first = [objective(batch).sums["distill"].item() for batch in several]
    asked = []
    teacher._objective.register_forward_pre_hook(lambda *_: asked.append(1))
    teacher._choose = lambda batch: pytest.fail("the teacher was asked again")
    again = [objective(batch).sums["distill"].item() for batch in several]
    assert first == again
    without = objective_of(tiny, Teacher(larger, vocabulary, top_k=16))
    assert first == [without(batch).sums["distill"].item() for batch in several]


def test_a_spoilt_or_missing_file_is_made_again(tiny, larger, batches, tmp_path):
    vocabulary = len(tiny.model.head_weight())
    (batch,) = batches(tiny, 1)
    teacher = Teacher(larger, vocabulary, top_k=16, shelf=Shelf(tmp_path, "a", 1.0, 16))
    whole = teacher.likely(batch)
    files = sorted(tmp_path.rglob("*.safetensors"))
    files[0].write_bytes(b"no tensors")
    files[1].unlink()
    again = teacher.likely(batch)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    assert len(sorted(tmp_path.rglob("*.safetensors"))) == len(files)


def test_another_teacher_temperature_or_picture_is_another_entry(tiny, batches, tmp_path):
    folders = {
        Shelf(tmp_path, *how).folder for how in (("a", 1.0, 8), ("b", 1.0, 8), ("a", 2.0, 8), ("a", 1.0, 9))
    }
    assert len(folders) == 4
    (batch,) = batches(tiny, 1)
    keys = [key for key, _ in documents(batch)]
    assert len(keys) == len(batch.sample_ids)
    brighter = replace(batch, pixel_values=batch.pixel_values + 1)
    changed = [a != b for a, b in zip(keys, (key for key, _ in documents(brighter)), strict=True)]
    shows = [Talk().sample(int(name.split("/")[1])).messages[0].parts for name in batch.sample_ids]
    assert changed == [len(parts) == 2 for parts in shows]


def test_a_disk_that_takes_no_more_is_no_reason_to_stop(tiny, larger, batches, tmp_path):
    (tmp_path / "full").write_text("not a folder")
    vocabulary = len(tiny.model.head_weight())
    (batch,) = batches(tiny, 1)
    teacher = Teacher(larger, vocabulary, top_k=4, shelf=Shelf(tmp_path / "full", "a", 1.0, 4))
    assert torch.isfinite(teacher.divergence(Objective(tiny.model).states(batch), tiny.model.head, batch))


def test_a_teacher_that_reads_otherwise_is_refused_before_the_first_step(tiny, larger):
    reads = [partial(Talk().sample, n) for n in range(4)]
    see_alike(tiny.encoder, larger.encoder, reads)
    with pytest.raises(RecipeError, match="other tokens than the student"):
        see_alike(tiny.encoder, larger.encoder.using(template="plain"), reads[:1])
    others = tiny_model(words=("quite", "another"))
    with pytest.raises(RecipeError, match=r"teacher\.path: it reads talk-0/0 as other tokens"):
        see_alike(tiny.encoder, others.encoder, reads)
