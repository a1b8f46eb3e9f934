"""A reply is used again only by the run it is of."""

from dataclasses import replace

import torch

from tests.infer.test_engine import speaking
from tinymodal.compose.tiny import tiny_model
from tinymodal.eval.folder import fingerprint
from tinymodal.infer.engine import Engine


def test_one_step_of_training_changes_the_mark():
    engine = Engine(tiny_model())
    before = fingerprint(engine)
    assert before == fingerprint(Engine(tiny_model()))
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.add_(1e-5)
    assert fingerprint(engine) != before


def test_the_mark_changes_with_how_pictures_and_conversations_are_prepared():
    """The weights stay the same in all of these."""
    marks = [fingerprint(Engine(tiny_model()))]
    for sight in ({"resize": "pad"}, {"resize": "native", "fit_pixels": (24 * 24, 48 * 48)}):
        marks.append(fingerprint(Engine(tiny_model(sight=sight))))
    marks.append(fingerprint(Engine(tiny_model(feature_layer=-3))))
    marks.append(fingerprint(Engine(tiny_model(template="vicuna_v1"))))
    reworded = tiny_model()
    reworded.encoder.template = replace(reworded.encoder.template, system="Be brief.")
    marks.append(fingerprint(Engine(reworded)))
    assert len(set(marks)) == len(marks)


def test_the_mark_changes_with_how_sounds_are_prepared_and_with_the_speech_head():
    marks = [fingerprint(Engine(tiny_model(audio="tinymodal_ear")))]
    assert marks == [fingerprint(Engine(tiny_model(audio="tinymodal_ear")))]
    for hearing in ({"window_s": 2.0}, {"max_s": 30.0}, {"step_s": 1.0}):
        marks.append(fingerprint(Engine(tiny_model(audio="tinymodal_ear", hearing=hearing))))
    marks.append(fingerprint(Engine(tiny_model())))
    mouth = speaking()
    mouth.composed.codec = torch.nn.Linear(2, 2)
    mouth.composed.codec.books, mouth.composed.codec.rate_hz = 2, 16_000
    marks.append(fingerprint(mouth))
    with torch.no_grad():
        for parameter in mouth.model.speech_head.parameters():
            parameter.add_(1e-5)
    marks.append(fingerprint(mouth))
    with torch.no_grad():
        mouth.composed.codec.bias.add_(1e-5)
    marks.append(fingerprint(mouth))
    assert len(set(marks)) == len(marks)
