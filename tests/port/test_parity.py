"""How 'equal' is judged."""

import pytest
import torch

from tests.port.foreign import numbers
from tinymodal.compose.tiny import tiny_model
from tinymodal.port.parity import Case, cases, differing, greedy, judge, picture, prepared, record


class Same:
    """Our own model as the other side; ``shift`` is added to one logit."""

    name = "itself"

    def __init__(self, ours, shift=0.0):
        self.ours, self.shift = ours, shift

    def inputs(self, case, ours):
        return ours

    @torch.no_grad()
    def logits(self, inputs):
        logits = self.ours.model(**inputs).logits[0]
        logits[-1, 7] += self.shift
        return logits

    def greedy(self, inputs, num):
        return greedy(self.ours.model, inputs, num)


@pytest.fixture(scope="module")
def ours():
    composed = tiny_model()
    numbers(composed.model, 1)
    return composed


def test_a_model_equals_itself(ours):
    parity = judge(ours, record(Same(ours), cases(), ours)[0], "itself")
    assert parity.passed
    assert parity.largest == 0.0
    assert [len(row.pictures) for row in parity.rows] == [0, 1, 1, 2]
    assert parity.to_dict()["cases"][1]["pictures"] == ("640 x 480 px",)


@pytest.mark.parametrize(("shift", "passes"), [(0.9e-4, True), (1.2e-4, False)])
def test_one_logit_beyond_the_tolerance_is_enough_to_fail(ours, shift, passes):
    parity = judge(ours, record(Same(ours, shift), cases(), ours)[0], "itself")
    assert parity.passed is passes
    assert parity.largest == pytest.approx(shift, rel=0.05)


def test_another_text_fails_though_the_logits_are_equal(ours):
    theirs = [r._replace(ids=[*r.ids[::-1], 3]) for r in record(Same(ours), cases(), ours)[0]]
    parity = judge(ours, theirs, "itself")
    assert parity.largest == 0.0
    assert not parity.passed


def test_another_prompt_fails(ours):
    theirs = record(Same(ours), cases(), ours)[0]
    longer = [r._replace(inputs={**r.inputs, "input_ids": r.inputs["input_ids"][:, 1:]}) for r in theirs]
    assert judge(ours, longer, "itself").largest == float("inf")


def test_nothing_compared_is_not_equal(ours):
    assert not judge(ours, [], "itself").passed


def test_a_case_beyond_the_context_is_left_out_and_told(ours):
    long = Case("a long text", (), "a " * 2000)
    theirs, left_out = record(Same(ours), [long, cases()[0]], ours)
    assert len(theirs) == 1
    assert len(left_out) == 1
    assert left_out[0].startswith("a long text: ")
    assert left_out[0].endswith("tokens, the language model reads 1024")


def test_made_pictures_have_their_size_and_differ(ours):
    a, b = picture(40, 30, 1), picture(40, 30, 2)
    assert a.size == (40, 30)
    assert a.tobytes() != b.tobytes()
    assert a.tobytes() == picture(40, 30, 1).tobytes()
    assert prepared(ours, cases()[3])["pixel_values"].shape[0] == 2


def test_a_weight_that_differs_by_one_bit_is_named(ours):
    weights = {name: tensor.clone() for name, tensor in ours.model.state_dict().items()}
    assert differing(ours.model, weights) == []
    weights["lm_head.weight"][0, 0] = torch.nextafter(weights["lm_head.weight"][0, 0], torch.tensor(9.0))
    assert differing(ours.model, weights) == ["lm_head.weight"]
