"""llama.cpp itself reads what is exported: the same tokens, the next word, and what a picture becomes.

Where ``llama-cpp-python`` is installed; it has no wheel and builds for a quarter of an hour of one core:
``pip install llama-cpp-python==0.3.36``. The numbers here were measured with that version.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from tests.port.exported import FAMILIES, SIGLIP, a_model
from tinymodal.compose.build import load
from tinymodal.port.export import export
from tinymodal.port.proof import Options

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; it builds for long")
pytest.importorskip("gguf")

TEXTS = (
    "What is this?",
    "The quick brown fox jumps over 13 lazy dogs.",
    "<|im_start|>user\nHow many rings?<|im_end|>\n<|im_start|>assistant\n",
)
LOGITS = 2e-3
"""Of the largest: its keys and values are float16. Measured at most 7e-4."""
SEEN = 1e-3
"""It computes gelu by its tanh form. Measured at most 3.7e-4."""


@pytest.mark.parametrize(("language", "what"), FAMILIES)
def test_it_reads_words_and_pictures_as_we_do(tmp_path, language, what):
    ours = a_model(tmp_path / "ours", language=language, **SIGLIP, **what)
    assert export(str(ours), "gguf", tmp_path / "out", Options(num_prompts=2)).passed
    composed, theirs = load(ours), opened(tmp_path / "out")
    says_the_same(composed, theirs)
    edge = composed.model.config.vision_config.image_size
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (edge, edge, 3), dtype=np.uint8))
    core, prepared = composed.model.model, composed.encoder.processor.prepare(picture)
    with torch.no_grad():
        wanted = core.bank("image", core.perceive("image", tuple(tile[None] for tile in prepared.tiles)))
    found = seen(theirs, tmp_path / "out" / "mmproj.gguf", picture)
    assert np.abs(found - wanted[: len(found)].numpy()).max() <= SEEN


def test_the_starters_words_are_its_own(tmp_path):
    options = Options(without=("vision", "audio", "speech"), num_prompts=2)
    assert export("starter", "gguf", tmp_path / "out", options).passed
    says_the_same(load("starter"), opened(tmp_path / "out"))


def opened(folder: Path):
    return llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=256, logits_all=True, n_threads=1, verbose=False)


def says_the_same(composed, theirs) -> None:
    """Token ids, logits at every position, and the likeliest next word."""
    for text in TEXTS:
        ids = composed.encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ids
        theirs.reset()
        theirs.eval(ids)
        found = np.array(theirs.scores[: len(ids)])
        with torch.no_grad():
            wanted = composed.model(input_ids=torch.tensor([ids])).logits[0].numpy()
        found = found[:, : wanted.shape[1]]
        assert np.abs(found - wanted).max() <= LOGITS * np.abs(wanted).max()
        assert (found.argmax(1) == wanted.argmax(1)).all()


def seen(theirs, file: Path, picture: PIL.Image.Image) -> np.ndarray:
    """What a picture of the tower's own size becomes there, float32 [tokens, width]."""
    mtmd = pytest.importorskip("llama_cpp.mtmd_cpp")
    how = mtmd.mtmd_context_params_default()
    how.use_gpu, how.print_timings, how.warmup, how.n_threads = False, False, False, 1
    context = mtmd.mtmd_init_from_file(str(file).encode(), theirs.model, how)
    assert context
    pixels = (ctypes.c_uint8 * (3 * picture.width * picture.height)).from_buffer_copy(picture.tobytes())
    bitmap = mtmd.mtmd_bitmap_init(*picture.size, pixels)
    chunks, words = mtmd.mtmd_input_chunks_init(), b"a " + mtmd.mtmd_default_marker() + b" b"
    text = mtmd.mtmd_input_text(text=words, text_len=len(words), add_special=False, parse_special=True)
    bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
    assert mtmd.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1) == 0
    found = []
    for n in range(mtmd.mtmd_input_chunks_size(chunks)):
        chunk = mtmd.mtmd_input_chunks_get(chunks, n)
        if mtmd.mtmd_input_chunk_get_type(chunk) == mtmd.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            assert mtmd.mtmd_encode_chunk(context, chunk) == 0
            tokens, width = mtmd.mtmd_input_chunk_get_n_tokens(chunk), theirs.n_embd()
            at = ctypes.cast(mtmd.mtmd_get_output_embd(context), ctypes.POINTER(ctypes.c_float))
            found.append(np.ctypeslib.as_array(at, (tokens * width,)).reshape(tokens, width).copy())
    mtmd.mtmd_input_chunks_free(chunks)
    mtmd.mtmd_bitmap_free(bitmap)
    mtmd.mtmd_free(context)
    (one,) = found
    return one
