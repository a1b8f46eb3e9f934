"""Make the tokenizer of the starter parts.

    python recipes/starter_tokenizer.py tinymodal/starter/tokenizer

A byte-level BPE of 1,024 tokens, so it can write any text. The words of made scenes come first and are one
token each; what room is left goes to the commonest pieces of English, counted in the documentation that every
Python carries (``pydoc_data.topics``). Digits stand alone, so that a number is read digit by digit.
"""

import re
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tinymodal.core.types import Text
from tinymodal.data.synthetic import Scenes

VOCAB_SIZE = 1024
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "<image>"]


def made_texts(num_samples: int = 20_000) -> list[str]:
    """What made scenes say, the words of questions and captions."""
    sources = [Scenes(form=form, picture="written", wide=True) for form in ("mixed", "captions")]
    samples = (source.sample(i) for source in sources for i in range(num_samples))
    return [part.text for s in samples for m in s.messages for part in m.parts if isinstance(part, Text)]


def english_texts() -> list[str]:
    """Sentences of the Python documentation, without its code."""
    from pydoc_data.topics import topics

    lines = (line.strip() for text in topics.values() for line in text.splitlines())
    return [line for line in lines if re.fullmatch(r"[A-Za-z][A-Za-z ,.;'’-]{30,}", line)]


def make(out: Path) -> None:
    made = made_texts()
    # Every word of the made world stands alone and after a space, often enough that it becomes one token.
    words = sorted({word for text in made for word in re.findall(r"[A-Za-z]+", text)})
    words += ["user", "assistant", "system"]
    texts = [form for word in words for form in (word, f" {word}")] * 2_000 + english_texts()

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=2048,
    ).save_pretrained(out)
    split = [word for word in words for form in (word, f" {word}") if len(tokenizer.encode(form).ids) > 1]
    print(f"{out}: {tokenizer.get_vocab_size()} tokens; {len(words)} made words, in pieces: {split}")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
