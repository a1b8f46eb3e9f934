"""What a training run is: the parts, and the stages one after the other. A plain value, no torch.

Read by ``core.config.load(path, Recipe)``; every key, its unit and its default stand here and in
``pieces.py``, and nowhere else. Paths are relative to the working directory.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, Strict, field_validator, model_validator

from tinymodal.compose.spec import ModelSpec
from tinymodal.core.errors import RecipeError
from tinymodal.core.lookup import nearest
from tinymodal.train.pieces import (
    GROUPS,
    PARTS,
    Augment,
    Choice,
    Count,
    Flag,
    Fraction,
    Group,
    Lora,
    Loss,
    Natural,
    Parallel,
    Rate,
    Source,
    Teacher,
    Value,
    read_choice,
)

__all__ = [
    "GROUPS",
    "PARTS",
    "Augment",
    "Choice",
    "Group",
    "Lora",
    "Parallel",
    "Recipe",
    "Source",
    "Stage",
    "Teacher",
    "read_choice",
]


HARMLESS = (
    "name", "save_every", "keep", "keep_best", "save_async", "threads", "device", "parts", "parallel",
    "trackers", "cache_folder", "cache_gb", "eval_every",
)  # fmt: skip
"""Keys of a recipe that may change between two starts of one run."""
HARMLESS_IN_STAGES = (
    "workers", "bad_steps", "bad_rows", "micro_batch_tokens", "recompute", "held_out", "held_out_every",
    "held_out_samples",
)  # fmt: skip
"""Keys of its stages that may, too: they change how it is computed, and no sample or gradient but for
rounding."""


class Stage(Value):
    """What trains, on what, for how long."""

    name: str
    """Names the folder ``run/stages/<name>``: letters, digits, ``-`` and ``_``."""
    train: dict[str, Rate]
    """Group -> peak learning rate; what is not listed, or has rate 0, is frozen. Groups: vision, audio
    (the two towers), connectors (with the learned marks), language (the decoder, and its embeddings unless
    they are listed or ``only`` names language), embeddings (token embeddings and language head), speech (the
    speech head), adapters (of ``lora``), heads (the cell heads)."""
    only: dict[str, str] = {}  # noqa: RUF012 - pydantic copies it
    """Group -> what of it trains, where that is not all of it: ``from layer 12`` (that block, counted from 0,
    and the ones behind it), ``norms`` (their weights), ``norms with biases``, ``named proj, query`` (modules
    or parameters of these names). For vision, audio, connectors and language."""
    lora: Lora | None = None
    """Adapters, with the rate ``train.adapters``: ``{ rank = 64 }``. Merged when the stage ends."""
    bits: Literal[4, 8] | None = None
    """What the language model's linear layers are stored in while adapters on them train; None: 32."""
    data: tuple[Source, ...]
    """Where samples come from; several sources are mixed by ``weight``."""
    steps: Count | None = None
    """Optimizer steps. None only where the stage ends with its data; rates then follow the share of it that
    was read."""
    ends: Literal["repeat", "stop", "drop"] = "repeat"
    """When the data are read: ``repeat`` starts over, for as many ``steps`` as are given; ``stop`` ends the
    stage with the first source that was read ``epochs`` times; ``drop`` goes on without it, to the last."""

    seq_len: Count = 2048
    """Positions in a row; samples are packed into rows and never cut, a longer one is dropped and counted."""
    batch_tokens: Count = 16_384
    """Positions per optimizer step; a multiple of ``seq_len``."""
    batching: Literal["pack", "grouped"] = "pack"
    """``pack``: several samples in a row, kept apart. ``grouped``: a sample a row, with others of its length
    and media, padded to the longest."""
    micro_batch_tokens: Count | Literal["auto"] | None = None
    """Positions that run at once, for memory; None: the whole batch; ``auto``: as many as fit, tried before
    the first step. The gradient is the same."""
    patches: Count | None = None
    """Image patches in a row at most, the packer's second budget; None: no limit."""
    frames: Count | None = None
    """Positions of the audio tower in a row at most, the packer's third budget; None: no limit."""
    template: str | None = None
    """Chat template of this stage, e.g. ``plain`` for captions; None: the model's own."""
    train_on: Literal["answers", "all"] = "answers"
    """``all``: every word trains, questions too; for teaching a new language model its language."""

    loss: tuple[Loss, ...] = ("text",)
    """``text``: next token where a label is. ``cells``: what each image token shows (made data only).
    ``dpo``: of two answers the chosen one becomes likelier. ``distill``: next tokens as a ``teacher`` has
    them. ``speech``: the codec's frames of spoken answers."""
    loss_weights: dict[Loss, Rate] = {}  # noqa: RUF012 - pydantic copies it
    """Loss -> what it counts in the sum; 1 if it is not listed."""
    beta: Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)] = 0.1
    """``dpo``: the smaller, the further the model may go from what it was when the stage began."""
    teacher: Teacher | None = None
    """``distill``: whom to learn from: ``{ path = "some/model", top_k = 64 }``."""
    cell_classes: tuple[Count, ...] = ()
    """Number of classes of each cell head, in the order of ``Image.targets``; ``cells`` only."""

    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Rate over the stage: rise, then a half cosine; rise, hold, fall; or rise, hold."""
    warmup: Fraction = 0.03
    """Fraction of the steps spent rising from 0 to the peak."""
    decay: Fraction = 0.2
    """Fraction of the steps spent falling, ``wsd`` only."""
    floor: Fraction = 0.1
    """Factor at the last step, relative to the peak; ``cosine`` and ``wsd``."""
    weight_decay: Rate = 0.0
    """AdamW's, on matrices only: norms, biases and embeddings never decay."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's, of the mean and of the mean square of the gradient."""
    clip: Rate = 1.0
    """Norm that the gradient is cut to; 0: never cut."""

    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    """``adamw8bit`` keeps its two numbers for each weight in 8 bits (bitsandbytes); ``adafactor`` keeps rows
    and columns of them only."""
    bad_steps: Natural = 3
    """A step whose loss or gradient is not finite is skipped and its samples are named; the run ends after
    more than so many in a row."""
    bad_rows: Literal["raise", "skip"] | Natural = "raise"
    """``skip``: a row that cannot be read is left out, counted, and listed in ``run/skipped.jsonl``. A
    number: so many at most."""
    cache: Flag = False
    """Keep the features of frozen towers on disk, and encode no picture or sound twice; see
    ``docs/cache.md``."""
    cache_dtype: Literal["bfloat16", "float8"] = "bfloat16"
    """What features are kept in; training reads them so from the first time on."""
    held_out: tuple[Source, ...] = ()
    """Data whose loss is measured and never trained on."""
    held_out_every: Count = 200
    """Steps between two such measurements; the last step has one, too."""
    held_out_samples: Count = 200
    """Samples of ``held_out`` that are read, the same ones each time."""
    workers: Natural = 0
    """Processes that read and encode samples; 0: this one. The batches are the same."""
    seed: Natural | None = None
    """None: the recipe's seed plus the stage's number."""
    recompute: Literal["none", "full"] | Count = "none"
    """Compute activations again in the backward pass, of every block (``full``, about a third more time) or
    of every k-th only: less memory. true and false are understood as ``full`` and ``none``."""

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"'{name}' names a folder; use letters, digits, '-' and '_'")
        return name

    @field_validator("train")
    @classmethod
    def _train(cls, train: dict[str, float]) -> dict[str, float]:
        for group in train:
            if group not in GROUPS:
                hint = nearest(group, GROUPS)
                raise ValueError(f"unknown group '{group}'; groups: {', '.join(GROUPS)}{hint}")
        if not any(train.values()):
            raise ValueError(
                "the stage trains nothing; give a group a rate above 0, e.g. {connectors = 1e-3}"
            )
        return train

    @field_validator("recompute", mode="before")
    @classmethod
    def _recompute(cls, value: object) -> object:
        return {True: "full", False: "none"}[value] if isinstance(value, bool) else value

    @field_validator("only")
    @classmethod
    def _only(cls, only: dict[str, str]) -> dict[str, str]:
        for group, text in only.items():
            if group not in PARTS:
                hint = nearest(group, PARTS)
                raise ValueError(
                    f"'{group}' trains as a whole; groups that need not: {', '.join(PARTS)}{hint}"
                )
            try:
                read_choice(text)
            except ValueError as error:
                raise ValueError(f"{group}: {error}") from None
        return only

    @field_validator("data", "loss")
    @classmethod
    def _some(cls, value: tuple) -> tuple:
        if not value:
            raise ValueError("is empty; give at least one")
        return value

    @model_validator(mode="after")
    def _agree(self) -> Stage:
        if self.batch_tokens % self.seq_len:
            down = self.batch_tokens // self.seq_len * self.seq_len
            near = f"{down} or {down + self.seq_len}" if down else str(self.seq_len)
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is not a multiple of seq_len {self.seq_len}; take {near}"
            )
        micro = self.micro_batch_tokens
        if isinstance(micro, int) and (micro % self.seq_len or self.batch_tokens % micro):
            raise ValueError(
                f"micro_batch_tokens {micro} must be a multiple of seq_len {self.seq_len} "
                f"and divide batch_tokens {self.batch_tokens}"
            )
        if self.steps is None and self.ends == "repeat":
            raise ValueError("missing key 'steps' in Stage; or let the data end it: ends = 'stop' or 'drop'")
        if ("distill" in self.loss) != (self.teacher is not None):
            raise ValueError(
                "loss 'distill' and the key 'teacher' go together; add the other, or take it out"
            )
        if "dpo" in self.loss and "text" in self.loss:
            raise ValueError("'dpo' reads pairs of answers, 'text' single ones; give each its own stage")
        if self.cache and "distill" in self.loss:
            raise ValueError(
                "'cache' keeps what this model's tower says in place of pixels, and a teacher reads pixels; "
                "take one of the two out"
            )
        if self.ends == "repeat" and any(source.epochs != 1 for source in self.data):
            raise ValueError(
                "'epochs' is for data that end; add ends = 'drop' or 'stop', or take it out of the source"
            )
        unread = [name for name in self.loss_weights if name not in self.loss]
        if unread:
            raise ValueError(f"loss_weights.{unread[0]} has a weight, but it is not in 'loss'")
        for part in ("vision", "audio"):
            if self.cache and (self.train.get(part) or (self.lora and part in self.lora.parts)):
                raise ValueError(
                    f"'cache' keeps what the towers say, but the {part} tower trains in this stage; take one "
                    f"out"
                )
        if self.train.get("speech") and "speech" not in self.loss:
            raise ValueError(
                "'train.speech' has a rate, but only the speech loss trains it; add it: loss = ['speech']"
            )
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(
                f"warmup {self.warmup} + decay {self.decay} exceed the stage; together at most 1"
            )
        heads = self.train.get("heads", 0) > 0
        if "cells" in self.loss and not (heads and self.cell_classes):
            raise ValueError(
                "the cells loss needs 'cell_classes' (classes of each head) and a rate for 'train.heads'"
            )
        if "cells" not in self.loss and (self.train.get("heads") or self.cell_classes):
            raise ValueError(
                "'train.heads' and 'cell_classes' are for the cells loss; add it: loss = ['cells']"
            )
        idle = [f"train.{g}" for g in ("language", "embeddings") if self.train.get(g)]
        if self.lora is not None and "language" in self.lora.parts:
            idle.append("train.adapters")
        if self.loss in (("cells",), ("speech",)) and idle:
            raise ValueError(f"'{idle[0]}' has a rate, but only the text loss trains it; add 'text' to loss")
        return self

    @model_validator(mode="after")
    def _choose(self) -> Stage:
        for group in self.only:
            if not self.train.get(group):
                raise ValueError(
                    f"'only.{group}' says what trains, but 'train.{group}' has no rate; give it one"
                )
        if self.lora is None and self.train.get("adapters"):
            raise ValueError("'train.adapters' has a rate, but there are none; add lora = { rank = 64 }")
        if self.lora is not None and not self.train.get("adapters"):
            raise ValueError("'lora' has no rate; add it to 'train', e.g. {adapters = 2e-4}")
        adapted = () if self.lora is None else self.lora.parts
        for group in adapted:
            if self.train.get(group) and group not in self.only:
                raise ValueError(
                    f"'train.{group}' trains the matrices that lora.parts keeps frozen below its adapters; "
                    f"take one of the two out, or name what else trains, e.g. only = {{{group} = 'norms'}}"
                )
        if self.bits is not None and self.train.get("language") and not self.choice("language").norms:
            raise ValueError(
                f"bits = {self.bits} stores the language model's matrices rounded, which cannot train; train "
                f"adapters in its place: train = {{adapters = 2e-4}}, lora = {{rank = 64}}"
            )
        if self.bits == 8 and self.lora is not None and self.lora.kind == "dora":
            # peft 0.21 loses the scales of 8 bits with DoRA's first product on a CPU.
            raise ValueError("bits = 8 does not go with kind = 'dora'; take bits = 4, or kind = 'lora'")
        if self.bits is not None and "language" not in adapted:
            raise ValueError(
                f"bits = {self.bits} is for adapters on the language model; add lora = {{rank = 64}}, or "
                f"take bits out"
            )
        return self

    def choice(self, group: str) -> Choice:
        """What of ``group`` trains; an empty choice: all of it."""
        return read_choice(self.only[group]) if group in self.only else Choice()

    @property
    def micro_batches(self) -> int:
        """Batches that one step of one process reads."""
        return self.split(1)[1]

    def split(self, ranks: int, micro_tokens: int | None = None) -> tuple[int, int]:
        """Positions of a micro-batch, and how many of them each of ``ranks`` processes reads in a step.

        Args:
            ranks: processes that share the step.
            micro_tokens: in place of ``micro_batch_tokens``, once ``auto`` is settled.

        Raises:
            RecipeError: the step cannot be shared evenly.
        """
        wanted = micro_tokens if micro_tokens is not None else self.micro_batch_tokens
        own, rest = divmod(self.batch_tokens, ranks)
        micro = wanted if isinstance(wanted, int) else own
        if rest or own % micro or micro % self.seq_len:
            least = ranks * (wanted if isinstance(wanted, int) else self.seq_len)
            raise RecipeError(
                f"stages.{self.name}.batch_tokens is {self.batch_tokens}, which {ranks} processes cannot "
                f"share in whole micro-batches; take a multiple of {least}"
            )
        return micro, own // micro


NEEDED = {
    "vision": ("vision",),
    "audio": ("audio",),
    "connectors": ("vision", "audio"),
    "speech": ("speech",),
}
"""Group -> parts of the model of which it needs one."""


class EvalEvery(Value):
    """Benchmarks while a run trains, in a process of their own: ``[eval_every]``."""

    on: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names as ``tinymodal eval --on`` takes them."""
    questions: Count = 100
    """The first so many of each."""
    saves: Count = 1
    """Every so many saves; see ``save_every``."""
    data: str | None = None
    """Folder of the field's benchmarks, as ``--data``."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: a GPU if there is one, beside the training; it needs memory for a second model."""


class Recipe(Value):
    """A run, complete on one screen."""

    name: str
    """What the run is called; the folder is ``runs/<name>`` unless another is given."""
    model: ModelSpec
    """What is trained: ``[model]``."""
    stages: tuple[Stage, ...]
    """What is done, one ``[[stages]]`` after the other."""
    seed: Natural = 0
    """Fixes random weights, the order of samples and dropout."""
    save_every: Natural = 200
    """Steps between two checkpoints; 0: only at the end of each stage."""
    keep: Count = 2
    """Newest checkpoints that stay."""
    keep_best: Flag = False
    """Keep the one with the lowest held-out loss of its stage as well."""
    save_async: Flag = True
    """Write checkpoints while training goes on, from a copy in the host's memory."""
    threads: Count | None = None
    """Threads of torch; None: torch decides. On a busy small machine 1 is often fastest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: a GPU if there is one."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the passes compute in (autocast), and what frozen weights are held in on a GPU; weights that train
    and the optimizer stay float32. ``float16`` scales the loss, for GPUs without bfloat16."""
    parallel: Parallel = Parallel()
    """How several processes share the work."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where the metrics go besides ``metrics.jsonl``."""
    eval_every: EvalEvery | None = None
    """Benchmarks that saved models are scored on while the run goes on."""
    cache_folder: str | None = None
    """Where stages with ``cache`` keep features, and those that learn to speak codes, for all runs; None:
    ``~/.cache/tinymodal/features``."""
    cache_gb: Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)] = 50.0
    """What this folder may hold; what was not used for longest goes first."""
    parts: dict[Literal["vision", "audio", "language", "speech"], str] = {}  # noqa: RUF012 - pydantic copies it
    """Part -> folder that it is saved in alone, at the end of the run."""

    @field_validator("stages")
    @classmethod
    def _stages(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        if not stages:
            raise ValueError("is empty; a recipe has at least one [[stages]]")
        names = [stage.name for stage in stages]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two stages are called '{name}'; each needs its own name")
        return stages

    @model_validator(mode="after")
    def _best_of_some(self) -> Recipe:
        if self.keep_best and not any(stage.held_out for stage in self.stages):
            raise ValueError(
                "'keep_best' needs a held-out loss to tell by; give a stage held_out, or take it out"
            )
        return self

    @model_validator(mode="after")
    def _parts_exist(self) -> Recipe:
        if self.model.path is not None:
            return self
        model = self.model
        for i, stage in enumerate(self.stages):
            for group, needed in NEEDED.items():
                if any(getattr(model, part) is not None for part in needed):
                    continue
                without = " and ".join(f"no {part} part" for part in needed)
                if stage.train.get(group):
                    raise ValueError(
                        f"stages[{i}].train.{group} has a rate, but the model has {without}; "
                        f"add [model.{needed[0]}] or remove the group"
                    )
                if stage.lora is not None and group in stage.lora.parts:
                    raise ValueError(
                        f"stages[{i}].lora.parts names {group}, but the model has {without}; "
                        f"add [model.{needed[0]}] or remove the part"
                    )
        for part in ("vision", "audio", "speech"):
            if part in self.parts and getattr(model, part) is None:
                raise ValueError(f"parts.{part} is named, but the model has no {part} part")
        return self

    def essence(self) -> Recipe:
        """The recipe without what may change between two starts of one run: ``HARMLESS``."""
        plain = type(self).model_fields
        same = {key: plain[key].get_default(call_default_factory=True) for key in HARMLESS if key != "name"}
        own = Stage.model_fields
        of_stage = {key: own[key].default for key in HARMLESS_IN_STAGES}
        stages = tuple(stage.model_copy(update=of_stage) for stage in self.stages)
        return self.model_copy(update={**same, "name": "", "stages": stages})

    def stage_seed(self, index: int) -> int:
        """Seed of stage ``index``."""
        own = self.stages[index].seed
        return self.seed + index if own is None else own
